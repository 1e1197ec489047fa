#include "cpu/workspace.h"

#include <algorithm>

#include "common/desc.h"
#include "cpu/kernels/job.h"
#include "cpu/split.h"

namespace lowbit {

int64_t int32_segment(const CpuTile16& tile) {
  return std::min<int64_t>(tile.shape.group_size, 32768);
}

int64_t gemm_scratch_bytes(int64_t M, const CpuTile16& tile) {
  const int64_t chunk = std::min<int64_t>(M, kMaxRows);
  const int64_t segments = tile.shape.groups * div_up(tile.shape.group_size, int32_segment(tile));
  const int64_t as_floats = scratch_bytes(chunk * tile.K_padded, 4);
  const int64_t as_codes =
      scratch_bytes(chunk * tile.K_padded, 1) + scratch_bytes(chunk * segments, 4);
  return scratch_bytes(tile.shape.N, 4) +
         std::max({as_floats, as_codes, split_scratch_bytes(M, tile)});
}

int64_t cpu_workspace_size(int64_t M, int64_t N, int64_t K, const Desc& desc) {
  // 63 bytes of slack: a tensor need not start on a 64-byte boundary, the kernels' buffers do.
  return gemm_scratch_bytes(M, cpu_tile16(N, K, desc)) + 63;
}

}  // namespace lowbit
