// What the kernels that multiply 8x8 matrices share: tiles in threadgroup memory, fragments, and the way out.
//
// A threadgroup of four SIMD-groups makes kTokens x 64 results. Per step it brings a tile of activations and a tile of decoded
// weights into threadgroup memory, and every SIMD-group multiplies its 32 x 32 (32 x 16) of them. The weights are decoded once
// per threadgroup, one chunk per thread and turn; a GEMM body never sees bits.
//
//   kTokens = 64     results -> 32       32         kTokens = 32     16     16     16     16
//                  32 tokens    simd 0   simd 1                      simd 0 simd 1 simd 2 simd 3
//                  32 tokens    simd 2   simd 3
#pragma once

#include "metal/shaders/rows.h"

namespace lowbit {

constant constexpr int kMatrixThreads = 128;
constant constexpr int kMatrixColumns = 64;  // results per token

template <class T, int kTokenCount, int kStepSize>
struct MatrixTile {
  enum : int {
    kTokens = kTokenCount,
    kStep = kStepSize,           // of what is summed over
    kPad = 16 / int(sizeof(T)),  // rows start in different banks, and at multiples of 16 bytes
    kStride = kStep +
        kPad,  // of a row of the tile of activations, and of weights as [column][step]
    kWideStride = kMatrixColumns + kPad,  // of weights as [step][column]
    kSumStride = kMatrixColumns + 4,      // of results
    kSimdTokens = kTokens / 32,           // SIMD-groups along tokens
    kSimdColumns = 4 / kSimdTokens,
    kFragments = kMatrixColumns / kSimdColumns /
        8,  // of a SIMD-group along results; 4 along tokens
    kRowsBytes = kTokens * kStride * int(sizeof(T)),
    kWeightBytes = (kMatrixColumns * kStride > kStep * kWideStride ? kMatrixColumns * kStride
                                                                   : kStep * kWideStride) *
        int(sizeof(T)),
    kSumBytes = kTokens * kSumStride * 4,
  };
};

// Results take the place of the tiles once those are used up.
template <class Tile>
struct MatrixShared {
  enum : int {
    kBytes = Tile::kRowsBytes + Tile::kWeightBytes > Tile::kSumBytes
        ? Tile::kRowsBytes + Tile::kWeightBytes
        : Tile::kSumBytes,
  };
  static_assert(kBytes <= 32768, "Metal has 32 KB of threadgroup memory");
  float4 space[kBytes / 16];
};

template <class T>
inline void store_eight(threadgroup T* to, thread const float (&x)[8]) {
  ((threadgroup vec<T, 4>*)to)[0] = vec<T, 4>(T(x[0]), T(x[1]), T(x[2]), T(x[3]));
  ((threadgroup vec<T, 4>*)to)[1] = vec<T, 4>(T(x[4]), T(x[5]), T(x[6]), T(x[7]));
}

// rows[token][step]: x from `first_column` on, zeros past its columns. Rows past M are read as the last one: nobody asks for
// what becomes of them.
template <class Tile, class T>
inline void load_rows(device const T* x, int first_row, uint first_column, uint columns,
                      uint thread_index, thread const Gemm& p, threadgroup T* rows) {
  for (int i = int(thread_index); inside(i, Tile::kTokens * Tile::kStep / 8); i += kMatrixThreads) {
    const int token = i / (Tile::kStep / 8), piece = i % (Tile::kStep / 8);
    const int row = min(first_row + token, p.M - 1);
    float values[8];
    load_eight(x + long(row) * long(p.x_stride), first_column + uint(8 * piece), columns,
               has_vectors(p.kinds), values);
    store_eight(rows + token * Tile::kStride + 8 * piece, values);
  }
}

// What a chunk holds for the tile: weights, or exact codes whose scales are applied to sums of products.
template <Format kFormat, bool kCodes>
inline void decode_chunk(device const uchar* w, int strip, uint chunk, thread const Gemm& p,
                         thread float (&values)[4][8]) {
  if (!inside(strip, p.strips) || !inside(chunk, uint(p.chunks))) {
    for (int row = 0; row < 4; ++row) {
      for (int k = 0; k < 8; ++k) values[row][k] = 0.0f;
    }
  } else if (kCodes) {
    chunk_codes<kFormat>(strip_of(w, strip, p), chunk, group_of(chunk * 8u, p), p, values);
  } else {
    chunk_weights<kFormat>(strip_of(w, strip, p), chunk, p, values);
  }
}

// A block of `kBlockRows` rows of W and `kBlockK` k, as [row][k] with rows `stride` apart.
template <Format kFormat, class T, int kBlockRows, int kBlockK, bool kCodes>
inline void load_weights(device const uchar* w, int first_strip, uint first_chunk, int stride,
                         uint thread_index, thread const Gemm& p, threadgroup T* tile) {
  for (int i = int(thread_index); inside(i, kBlockRows / 4 * (kBlockK / 8)); i += kMatrixThreads) {
    const int strip = i / (kBlockK / 8), chunk = i % (kBlockK / 8);
    float values[4][8];
    decode_chunk<kFormat, kCodes>(w, first_strip + strip, first_chunk + uint(chunk), p, values);
    for (int row = 0; row < 4; ++row) {
      store_eight(tile + (4 * strip + row) * stride + 8 * chunk, values[row]);
    }
  }
}

// ---- fragments ---------------------------------------------------------------------------------------------------------

template <class Tile>
struct Sums {
  simdgroup_matrix<float, 8, 8> of[4][Tile::kFragments];  // [tokens][results]
};

template <class Tile>
inline void clear(thread Sums<Tile>& sums) {
  LOWBIT_UNROLL
  for (int i = 0; i < 4; ++i) {
    LOWBIT_UNROLL
    for (int j = 0; j < Tile::kFragments; ++j) {
      sums.of[i][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    }
  }
}

// The SIMD-group's first token and first result in the threadgroup's tile.
template <class Tile>
inline int simd_token(uint simd) {
  return 32 * int(simd / uint(Tile::kSimdColumns));
}
template <class Tile>
inline int simd_column(uint simd) {
  return 8 * Tile::kFragments * int(simd % uint(Tile::kSimdColumns));
}

// One step: sums += rows * weights. kWide: weights are [step][result], not [result][step].
template <class Tile, bool kWide, class T>
inline void multiply(threadgroup const T* rows, threadgroup const T* weights, uint simd,
                     thread Sums<Tile>& sums) {
  const int token = simd_token<Tile>(simd), column = simd_column<Tile>(simd);
  for (int k = 0; k < Tile::kStep; k += 8) {
    simdgroup_matrix<T, 8, 8> a[4], b[Tile::kFragments];
    LOWBIT_UNROLL
    for (int i = 0; i < 4; ++i) {
      simdgroup_load(a[i], rows + (token + 8 * i) * Tile::kStride + k, Tile::kStride);
    }
    LOWBIT_UNROLL
    for (int j = 0; j < Tile::kFragments; ++j) {
      if (kWide) {
        simdgroup_load(b[j], weights + k * Tile::kWideStride + column + 8 * j, Tile::kWideStride);
      } else {
        simdgroup_load(b[j], weights + (column + 8 * j) * Tile::kStride + k, Tile::kStride,
                       ulong2(0), true);
      }
    }
    LOWBIT_UNROLL
    for (int i = 0; i < 4; ++i) {
      LOWBIT_UNROLL
      for (int j = 0; j < Tile::kFragments; ++j) {
        simdgroup_multiply_accumulate(sums.of[i][j], a[i], b[j], sums.of[i][j]);
      }
    }
  }
}

// The SIMD-group's own part of to[token][result].
template <class Tile>
inline void store_sums(thread const Sums<Tile>& sums, uint simd, threadgroup float* to) {
  to += simd_token<Tile>(simd) * Tile::kSumStride + simd_column<Tile>(simd);
  LOWBIT_UNROLL
  for (int i = 0; i < 4; ++i) {
    LOWBIT_UNROLL
    for (int j = 0; j < Tile::kFragments; ++j) {
      simdgroup_store(sums.of[i][j], to + 8 * i * Tile::kSumStride + 8 * j, Tile::kSumStride);
    }
  }
}

}  // namespace lowbit
