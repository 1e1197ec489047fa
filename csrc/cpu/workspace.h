// How much scratch memory an op needs: pure functions, asked by the ops and by callers who bring a workspace.
#pragma once

#include <cstdint>
#include <string>

#include "common/check.h"
#include "packing/cpu_tile16.h"

namespace lowbit {

// Bytes that `count` elements of `size` bytes take in a Scratch.
inline int64_t scratch_bytes(int64_t count, int64_t size) { return round_up(count * size, 64); }

// The longest stretch of K whose int32 sum of (xq - zero) * (q - zero) cannot overflow: 255 * 255 * 32768 < 2^31.
int64_t int32_segment(const CpuTile16& tile);

// For gemm and gemm_a8, whichever kernel is chosen and whatever the dtypes: one chunk of prepared rows, and bias.
int64_t gemm_scratch_bytes(int64_t M, const CpuTile16& tile);

// Bytes of a workspace tensor for gemm_out and gemm_a8_out.
int64_t cpu_workspace_size(int64_t M, int64_t N, int64_t K, const Desc& desc);

}  // namespace lowbit
