// What warps do with their sums, D fragments of mma with output rows on the 16-side and tokens on the 8-side: add them to
// those of other warps, and store them in the order of memory.
#pragma once

#include <cstdint>

#include "cuda/epilogue.cuh"
#include "cuda/ptx.cuh"
#include "cuda/stages.h"

namespace lowbit::cuda {

// To shared memory [token][row], kPaddedRows a token: 8 tokens, rows 16i + g, 16i + g + 8 of fragment i.
__device__ inline void place_fragment(float* to, int lane, int fragment, const float (&d)[4]) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int r = 0; r < 4; ++r)
    to[(2 * t + r % 2) * kPaddedRows + 16 * fragment + g + 8 * (r / 2)] = d[r];
}

// Adds the sums of kWarps warps, each of all 64 rows x 8 * kBlocks8 tokens, in the order of warps. values[2j] and
// values[2j + 1] of this thread are then the rows 2 * lane and 2 * lane + 1 of token warp + kWarps * j.
template <int kWarps, int kFragments, int kBlocks8, int kCount>
__device__ void add_warps(const float (&sums)[kFragments][kBlocks8][4], int warp, int lane,
                          float (&values)[kCount]) {
  constexpr int tokens = 8 * kBlocks8;
  static_assert(kCount == 2 * tokens / kWarps && tokens % kWarps == 0,
                "whole tokens for every warp");
  float* exchange = reinterpret_cast<float*>(dynamic_shared());
  ptx::sync_block();  // the exchange lies over rings that other warps may still read
#pragma unroll
  for (int b = 0; b < kBlocks8; ++b) {
#pragma unroll
    for (int i = 0; i < kFragments; ++i)
      place_fragment(exchange + (warp * tokens + 8 * b) * kPaddedRows, lane, i, sums[i][b]);
  }
  ptx::sync_block();
#pragma unroll
  for (int j = 0; j < kCount / 2; ++j) {
    float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float2 part = *reinterpret_cast<const float2*>(
          exchange + (w * tokens + warp + kWarps * j) * kPaddedRows + 2 * lane);
      sum.x += part.x;
      sum.y += part.y;
    }
    values[2 * j] = sum.x;
    values[2 * j + 1] = sum.y;
  }
}

// y = what add_warps() made of the sums, + bias: of the tokens from m on and the rows from n on, where m < M and n < N.
template <int kWarps, int kCount>
__device__ void store_added(const OutParams& y, int64_t m, int64_t M, int64_t n, int64_t N,
                            int warp, int lane, const float (&values)[kCount]) {
  const int64_t row = n + 2 * lane;
  float bias[2];
  load_bias(y, row, N, bias);
#pragma unroll
  for (int j = 0; j < kCount / 2; ++j) {
    const int64_t token = m + warp + kWarps * j;
    if (inside(token, M)) store_row(y, token, row, N, values + 2 * j, bias);
  }
}

// y[m .. m + 8 * kBlocks8, n .. n + 64) = sums + bias, where m < M and n < N. Eight tokens at a time through `turned`
// (8 * kPaddedRows floats of the warp's own): D has neighbouring tokens in a lane, y has neighbouring rows in memory.
template <int kFragments, int kBlocks8>
__device__ void store_sums(const OutParams& y, int64_t m, int64_t M, int64_t n, int64_t N, int lane,
                           float* turned, const float (&sums)[kFragments][kBlocks8][4]) {
  const int first = lane % 8 * 8;
  float bias[8];
  load_bias(y, n + first, N, bias);
#pragma unroll 1
  for (int b = 0; b < kBlocks8; ++b) {
    at_index<kBlocks8>(b, [&](auto block) {
#pragma unroll
      for (int i = 0; i < kFragments; ++i) place_fragment(turned, lane, i, sums[i][block()]);
    });
    ptx::sync_warp();
#pragma unroll 1
    for (int token = lane / 8; token < 8; token += 4) {
      if (inside(m + 8 * b + token, M))
        store_row(y, m + 8 * b + token, n + first, N, turned + token * kPaddedRows + first, bias);
    }
    ptx::sync_warp();
  }
}

}  // namespace lowbit::cuda
