// gemm_grad_input for whatever the layout can hold: dx[M, K] = dy[M, N] W[N, K] in fp32. One warp computes sixteen columns
// (a cell) of eight rows of dx; its lanes divide N, as the layout has it:
//
//   lane = 4g + t decodes the rows g, g + 8, ..., g + 56 of every strip at the cell's k = 2t, 2t + 1, 2t + 8, 2t + 9
//
// so that codes are read in 512-byte vectors, and decoded once for eight rows of dy.
#include "cuda/kernels/general.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kRows = 8;  // of dy

// sums[4 * m + c] += dy[m, n] * weights[c].
__device__ void add_products(const GemmParams& p, int64_t m0, int64_t n, const float (&weights)[4],
                             float (&sums)[4 * kRows]) {
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if (!inside(m0 + i, int64_t{p.x.M})) continue;
    const float dy = load_element(p.x.data, (m0 + i) * p.x.stride + n, p.x.type);
#pragma unroll
    for (int c = 0; c < 4; ++c) sums[4 * i + c] = ptx::fma_rn(dy, weights[c], sums[4 * i + c]);
  }
}

// The same for the lane's rows of one strip, decoded.
__device__ void add_strip(const GemmParams& p, const TileReader& reader, const float* levels,
                          int64_t strip, int cell, int64_t m0, int lane, float (&sums)[4 * kRows]) {
  const int g = lane / 4, t = lane % 4;
  const uint8_t* data = reader.strip(strip);
  const bool is_integer = reader.is_integer();
  CodePairs codes[2];
  int64_t group[4];
#pragma unroll
  for (int half = 0; half < 2; ++half) codes[half] = reader.pairs(data, cell, half, g, t);
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    // What lies past K has no group: it takes the cell's first one, and is not stored.
    const int32_t k = 16 * cell + 8 * (c / 2) + 2 * t + c % 2;
    group[c] = (inside(k, p.w.K) ? k : 16 * cell) / p.w.group_size;
  }
#pragma unroll 1
  for (int first = 0; first < kReaderRows; first += 2) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int row = first + j;
      const int64_t n = strip * kStripRows + g + 8 * row;
      if (!inside(n, int64_t{p.w.N})) continue;
      float weights[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const float scale = reader.scale(data, group[c], g, row);
        const float third = reader.third(data, group[c], g, row);
        const float value = code_value(p.w.format, reader.code(codes[c / 2], j, c % 2), levels);
        weights[c] = weight_value(value, scale, third, p.w.zero_kind, is_integer);
      }
      add_products(p, m0, n, weights, sums);
    }
    codes[0].drop_two();
    codes[1].drop_two();
  }
}

static __global__ void __launch_bounds__(32 * kGeneralWarps)
    general_grad_kernel(const GemmParams p) {
  const float* levels = shared_levels(p.w);
  const int lane = static_cast<int>(threadIdx.x) % 32, t = lane % 4;
  const TileReader reader(p.w);
  const int64_t cells = div_up(p.w.K, kCellK);
  const int64_t work = cells * div_up(p.x.M, kRows);
  for (int64_t i = first_warp(); i < work; i += all_warps()) {
    const int cell = static_cast<int>(i % cells);
    const int64_t m0 = i / cells * kRows;
    float sums[4 * kRows] = {};
    for (int64_t strip = 0; strip < p.w.strips; ++strip)
      add_strip(p, reader, levels, strip, cell, m0, lane, sums);
#pragma unroll
    for (int v = 0; v < 4 * kRows; ++v) {
#pragma unroll
      for (int mask = 16; mask >= 4; mask /= 2) sums[v] += ptx::shuffle_xor(sums[v], mask);
      // The sums of all g are in every lane of a t; lane g stores row g.
      const int64_t m = m0 + v / 4;
      const int32_t k = 16 * cell + 2 * t + 8 * (v % 4 / 2) + v % 2;
      if (lane / 4 != v / 4 || !inside(k, p.w.K) || !inside(m, int64_t{p.x.M})) continue;
      const int64_t column = p.w.perm == nullptr ? k : p.w.perm[k];
      store_element(sums[v], p.y.data, m * p.y.stride + column, p.y.type);
    }
  }
}

}  // namespace

void launch_general_grad(const GemmParams& p, Stream stream) {
  const int64_t warps = div_up(p.w.K, kCellK) * div_up(p.x.M, kRows);
  launch("general_grad", general_grad_kernel, general_grid(warps), 32 * kGeneralWarps, kLevelBytes,
         stream, p);
}

}  // namespace lowbit::cuda
