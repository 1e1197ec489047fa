// y[m, n] for many rows of x: weights decoded into threadgroup memory, multiplied by 8x8 matrices, summed in fp32.
#pragma once

#include "metal/shaders/tiles.h"

namespace lowbit {

// 18 KB for tiles of 64 tokens, in 16 and in 32 bits.
template <class T, int kTokens>
struct GemmTile : MatrixTile<T, kTokens, sizeof(T) == 2 ? 64 : 32> {};

// group.x: 64 rows of W; group.y: kTokens rows of x.
template <Format kFormat, class T, int kTokens>
[[kernel]] void matrix(LOWBIT_GEMM_ARGUMENTS, device const uchar* w [[buffer(11)]],
                       device const T* x [[buffer(12)]], device uchar* y [[buffer(13)]],
                       device const uchar* bias [[buffer(14)]],
                       device const float* x_scales [[buffer(15)]], LOWBIT_POSITION) {
  using Tile = GemmTile<T, kTokens>;
  LOWBIT_SHARED(MatrixShared<Tile>, shared);
  const Gemm p = LOWBIT_GEMM_PARAMS;
  threadgroup T* rows = (threadgroup T*)shared.space;
  threadgroup T* weights = rows + kTokens * Tile::kStride;
  const int first_row = kTokens * int(group.y), first_n = kMatrixColumns * int(group.x);

  Sums<Tile> sums;
  clear(sums);
  for (uint k = 0; k < uint(p.K); k += uint(Tile::kStep)) {
    load_rows<Tile>(x, first_row, k, uint(p.K), thread_index, p, rows);
    load_weights<kFormat, T, kMatrixColumns, Tile::kStep, false>(
        w, first_n / 4, k / 8u, Tile::kStride, thread_index, p, weights);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    multiply<Tile, false>(rows, weights, simd, sums);
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  threadgroup float* results = (threadgroup float*)shared.space;
  store_sums(sums, simd, results);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = int(thread_index); i < kTokens * kMatrixColumns; i += kMatrixThreads) {
    const int token = i / kMatrixColumns, column = i % kMatrixColumns;
    write_result(results[token * Tile::kSumStride + column], first_row + token, first_n + column,
                 bias, y, x_scales, p);
  }
}

// ---- 8-bit activations -------------------------------------------------------------------------------------------------

// x holds codes minus their zeros, exact in half, and so are the weights' codes: products are exact in fp32, and so are sums
// of integers over kExact k (255 * 128 * 512 < 2^24). At the end of each group, and after kExact k, they are scaled and added
// to the totals in fp32.
constant constexpr uint kExact = 512;

using ExactTile = MatrixTile<half, 64, 32>;

struct ExactShared {
  float4 tiles[(ExactTile::kRowsBytes + ExactTile::kWeightBytes) / 16];
  float sums[ExactTile::kTokens * ExactTile::kSumStride];
};

// The sums of the k before `end`, scaled, onto the totals of a lane: 32 tokens of one result. Activation scales per 128 of K
// are those of the last k.
inline void add_scaled(threadgroup const float* sums, device const uchar* w, int n, int first_row,
                       uint end, device const float* x_scales, thread const Gemm& p,
                       thread float (&totals)[32]) {
  const int strip = min(n / 4, p.strips - 1);
  const float scale = load_scales(strip_of(w, strip, p), group_of(end - 1u, p), p)[n % 4];
  for (int token = 0; token < 32; ++token) {
    float factor = scale;
    if (p.x_groups > 1) {
      const int row = min(first_row + token, p.M - 1);
      factor *= x_scales[long(row) * long(p.x_groups) + long((end - 1u) / 128u)];
    }
    totals[token] = fma(factor, sums[token * ExactTile::kSumStride], totals[token]);
  }
}

// group.x: 64 rows of W; group.y: 64 rows of x. Groups are multiples of 32 k.
template <Format kFormat>
[[kernel]] void matrix_exact(LOWBIT_GEMM_ARGUMENTS, device const uchar* w [[buffer(11)]],
                             device const half* x [[buffer(12)]], device uchar* y [[buffer(13)]],
                             device const uchar* bias [[buffer(14)]],
                             device const float* x_scales [[buffer(15)]], LOWBIT_POSITION) {
  static_assert(is_exact(kFormat), "half does not hold the format's levels");
  using Tile = ExactTile;
  LOWBIT_SHARED(ExactShared, shared);
  const Gemm p = LOWBIT_GEMM_PARAMS;
  threadgroup half* rows = (threadgroup half*)shared.tiles;
  threadgroup half* weights = rows + Tile::kTokens * Tile::kStride;
  const int first_row = Tile::kTokens * int(group.y), first_n = kMatrixColumns * int(group.x);
  // Each lane takes a result of its SIMD-group, and all 32 tokens.
  const int my_token = simd_token<Tile>(simd), my_column = simd_column<Tile>(simd) + int(lane);
  threadgroup const float* my_sums = shared.sums + my_token * Tile::kSumStride + my_column;

  float totals[32];
  for (int token = 0; token < 32; ++token) totals[token] = 0.0f;
  Sums<Tile> sums;
  clear(sums);
  for (uint k = 0; k < uint(p.K); k += uint(Tile::kStep)) {
    load_rows<Tile>(x, first_row, k, uint(p.K), thread_index, p, rows);
    load_weights<kFormat, half, kMatrixColumns, Tile::kStep, true>(
        w, first_n / 4, k / 8u, Tile::kStride, thread_index, p, weights);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    multiply<Tile, false>(rows, weights, simd, sums);
    const uint end = min(k + uint(Tile::kStep), uint(p.K));
    const bool last = end == uint(p.K);
    if (last || end % uint(p.group_size) == 0u || end % kExact == 0u ||
        (p.x_groups > 1 && end % 128u == 0u)) {
      store_sums(sums, simd, shared.sums);
      simdgroup_barrier(mem_flags::mem_threadgroup);
      add_scaled(my_sums, w, first_n + my_column, first_row + my_token, end, x_scales, p, totals);
      clear(sums);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  for (int token = 0; token < 32; ++token) {
    write_result(totals[token], first_row + my_token + token, first_n + my_column, bias, y,
                 x_scales, p);
  }
}

}  // namespace lowbit
