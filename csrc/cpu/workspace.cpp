#include "cpu/workspace.h"

#include <algorithm>

#include "common/desc.h"
#include "cpu/kernels/amx.h"
#include "cpu/split.h"

namespace lowbit {

int64_t int32_segment(const CpuTile16& tile) {
  return std::min<int64_t>(tile.shape.group_size, 32768);
}

int64_t pass_rows(bool tiles, int planes) {
  return tiles ? kTilePassRows / planes / 16 * 16 : static_cast<int64_t>(kMaxRows);
}

int64_t float_rows_bytes(int64_t rows, const CpuTile16& tile) {
  return scratch_bytes(rows * tile.K_padded, 4);
}

int64_t code_rows_bytes(int64_t rows, const CpuTile16& tile) {
  const int64_t segments = tile.shape.groups * div_up(tile.shape.group_size, int32_segment(tile));
  return scratch_bytes(rows * tile.K_padded, 1) + scratch_bytes(rows * segments, 4);
}

int64_t float_tile_bytes(int planes, const CpuTile16& tile) {
  return planes * div_up(tile.K_padded, 32) * kTileBytes;
}

int64_t code_tile_bytes(const CpuTile16& tile) {
  const int64_t before = (tile.shape.groups - 1) * tile.shape.group_size;
  const int64_t steps = (tile.shape.groups - 1) * div_up(tile.shape.group_size, 64) +
                        div_up(tile.K_padded - before, 64);
  return steps * kTileBytes;
}

int64_t gemm_scratch_bytes(int64_t M, const CpuTile16& tile) {
  const int64_t rows = std::min(M, pass_rows(false, 0));
  int64_t most = std::max(
      {float_rows_bytes(rows, tile), code_rows_bytes(rows, tile), split_scratch_bytes(M, tile)});
  if (tile.kb == 32) {
    for (int planes = 1; planes <= 3; ++planes) {
      const int64_t pass = std::min(M, pass_rows(true, planes));
      const int64_t tiles = div_up(pass, 16) * float_tile_bytes(planes, tile);
      // Quantized activations are made floats first.
      most = std::max(most, tiles + (planes == 3 ? float_rows_bytes(pass, tile) : 0));
    }
    const int64_t pass = std::min(M, pass_rows(true, 1));
    most = std::max(most, code_rows_bytes(pass, tile) + div_up(pass, 16) * code_tile_bytes(tile));
  }
  return scratch_bytes(tile.shape.N, 4) + most;
}

int64_t cpu_workspace_size(int64_t M, int64_t N, int64_t K, const Desc& desc) {
  // 63 bytes of slack: a tensor need not start on a 64-byte boundary, the kernels' buffers do.
  return gemm_scratch_bytes(M, cpu_tile16(N, K, desc)) + 63;
}

}  // namespace lowbit
