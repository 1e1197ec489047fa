// dx[m, k] = sum over n of dy[m, n] W[n, k]: as matrix.h, summed over the rows of W. x is dy [M, N], y is dx [M, K].
#pragma once

#include "metal/shaders/matrix.h"

namespace lowbit {

// Columns of dx in the order of the weight's, to where they were before they were sorted.
inline int original_column(int k, device const uchar* w, thread const Gemm& p) {
  if ((p.kinds & metal_params::kHasPerm) == 0) return k;
  const ulong offset = ulong(p.perm_high) << 32 | ulong(p.perm_low);
  return ((device const int*)(w + offset))[k];
}

// group.x: 64 columns of W; group.y: 64 rows of dy.
template <Format kFormat, class T>
[[kernel]] void grad(LOWBIT_GEMM_ARGUMENTS, device const uchar* w [[buffer(11)]],
                     device const T* x [[buffer(12)]], device uchar* y [[buffer(13)]],
                     LOWBIT_POSITION) {
  using Tile = GemmTile<T, 64>;
  LOWBIT_SHARED(MatrixShared<Tile>, shared);
  const Gemm p = LOWBIT_GEMM_PARAMS;
  threadgroup T* rows = (threadgroup T*)shared.space;
  threadgroup T* weights = rows + Tile::kTokens * Tile::kStride;
  const int first_row = Tile::kTokens * int(group.y), first_k = kMatrixColumns * int(group.x);

  Sums<Tile> sums;
  clear(sums);
  for (uint n = 0; n < uint(p.N); n += uint(Tile::kStep)) {
    load_rows<Tile>(x, first_row, n, uint(p.N), thread_index, p, rows);
    load_weights<kFormat, T, Tile::kStep, kMatrixColumns, false>(
        w, int(n) / 4, uint(first_k) / 8u, Tile::kWideStride, thread_index, p, weights);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    multiply<Tile, true>(rows, weights, simd, sums);
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  threadgroup float* results = (threadgroup float*)shared.space;
  store_sums(sums, simd, results);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = int(thread_index); i < Tile::kTokens * kMatrixColumns; i += kMatrixThreads) {
    const int token = i / kMatrixColumns, column = i % kMatrixColumns;
    const int m = first_row + token, k = first_k + column;
    if (!inside(m, p.M) || !inside(k, p.K)) continue;
    store_element(y, long(m) * long(p.y_stride) + long(original_column(k, w, p)),
                  results[token * Tile::kSumStride + column], y_type_of(p.kinds));
  }
}

}  // namespace lowbit
