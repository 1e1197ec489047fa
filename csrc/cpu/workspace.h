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

// Rows of x that are prepared and multiplied at a time. Tiles come with the number of planes that x is split into; more
// rows make fewer passes over the weight, which they decode.
int64_t pass_rows(bool tiles, int planes);

// Prepared rows of one pass, as fp32, and as int8 codes with their sums per segment.
int64_t float_rows_bytes(int64_t rows, const CpuTile16& tile);
int64_t code_rows_bytes(int64_t rows, const CpuTile16& tile);

// The same as tiles (kernels/amx.h). Of 16 rows:
int64_t float_tile_bytes(int planes, const CpuTile16& tile);
int64_t code_tile_bytes(const CpuTile16& tile);

// For gemm and gemm_a8, whichever kernel is chosen and whatever the dtypes: one pass, and bias.
int64_t gemm_scratch_bytes(int64_t M, const CpuTile16& tile);

// Bytes of a workspace tensor for gemm_out and gemm_a8_out.
int64_t cpu_workspace_size(int64_t M, int64_t N, int64_t K, const Desc& desc);

}  // namespace lowbit
