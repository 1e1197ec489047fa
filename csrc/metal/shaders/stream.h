// y[m, n] for few rows of x: every weight is read once, whatever M is.
//
// A SIMD-group takes kStrips strips of 4 rows of W and up to kM rows of x. Its lanes divide K: lane l reads chunk l, 32 + l,
// 64 + l, ... of each strip, one contiguous piece per load. A chunk's 32 codes are decoded once and multiplied with every row
// of x; the eight inputs that a chunk needs serve its four rows.
//
//                 K ->  lane 0    lane 1          lane 31    lane 0
//   strip        row 0 | chunk 0 | chunk 1 | ... | chunk 31 | chunk 32 | ...
//                row 1 |  4 x 8  |         |     |          |
//                row 2 |         |         |     |          |
//                row 3 |         |         |     |          |
//
// Where there are few strips and K is long, `split` SIMD-groups of a threadgroup share a strip: SIMD-group s takes chunks
// 32 s + l, 32 (s + split) + l, ..., and their sums are added in the order of s. What is added in which order depends on N and
// K and on nothing else, so that a row's bits are the same for every M and every kM.
#pragma once

#include "metal/shaders/rows.h"

namespace lowbit {

constant constexpr int kStreamGroups = 4;   // SIMD-groups of a threadgroup
constant constexpr int kStreamValues = 32;  // sums of a SIMD-group, at most

struct StreamShared {
  float sums[kStreamGroups][kStreamValues];
};

// The products of one chunk, onto the sums [4][kM] of its strip.
template <Format kFormat, class T, int kM, bool kAffine>
inline void add_chunk(device const uchar* strip, uint chunk, device const T* x,
                      device const float* x_scales, int first_row, thread const Gemm& p,
                      thread float (&sums)[4][kM]) {
  const uint k = chunk * 8u;
  const uint group = group_of(k, p);
  const float4 scales = load_scales(strip, group, p);
  float w[4][8];
  if (kAffine) {
    affine_weights<kFormat>(strip, chunk, group, p, scales, w);
  } else {
    chunk_codes<kFormat>(strip, chunk, group, p, w);
  }
  LOWBIT_UNROLL
  for (int m = 0; m < kM; ++m) {
    // Rows past M are read as the last one: their sums are thrown away.
    const int row = min(first_row + m, p.M - 1);
    float xs[8];
    load_eight(x + long(row) * long(p.x_stride), k, uint(p.K), has_vectors(p.kinds), xs);
    float4 factors = kAffine ? float4(1.0f) : scales;
    if (p.x_groups > 1) factors *= x_scales[long(row) * long(p.x_groups) + long(k / 128u)];
    LOWBIT_UNROLL
    for (int r = 0; r < 4; ++r) {
      float dot = w[r][0] * xs[0];
      LOWBIT_UNROLL
      for (int i = 1; i < 8; ++i) dot = fma(w[r][i], xs[i], dot);
      sums[r][m] = fma(factors[r], dot, sums[r][m]);
    }
  }
}

// group.x: strips; group.y: rows of x, kM at a time.
template <Format kFormat, class T, int kM, int kStrips, bool kAffine>
[[kernel]] void stream(LOWBIT_GEMM_ARGUMENTS, device const uchar* w [[buffer(11)]],
                       device const T* x [[buffer(12)]], device uchar* y [[buffer(13)]],
                       device const uchar* bias [[buffer(14)]],
                       device const float* x_scales [[buffer(15)]], LOWBIT_POSITION) {
  LOWBIT_SHARED(StreamShared, shared);
  static_assert(4 * kStrips * kM <= kStreamValues, "one value per lane");
  const Gemm p = LOWBIT_GEMM_PARAMS;
  const uint split = uint(p.split), share = simd % split;
  const int first_strip = int(group.x * (uint(kStreamGroups) / split) + simd / split) * kStrips;
  const int first_row = int(group.y) * kM;

  float sums[kStrips][4][kM];
  LOWBIT_UNROLL
  for (int s = 0; s < kStrips; ++s) {
    LOWBIT_UNROLL
    for (int r = 0; r < 4; ++r) {
      LOWBIT_UNROLL
      for (int m = 0; m < kM; ++m) sums[s][r][m] = 0.0f;
    }
  }
  for (uint chunk = share * 32u + lane; inside(chunk, uint(p.chunks)); chunk += 32u * split) {
    LOWBIT_UNROLL
    for (int s = 0; s < kStrips; ++s) {
      // Strips past the last are read as the last one.
      device const uchar* strip = strip_of(w, min(first_strip + s, p.strips - 1), p);
      add_chunk<kFormat, T, kM, kAffine>(strip, chunk, x, x_scales, first_row, p, sums[s]);
    }
  }

  // Lane i keeps value i.
  float mine = 0.0f;
  LOWBIT_UNROLL
  for (int i = 0; i < 4 * kStrips * kM; ++i) {
    const float total = simd_sum(sums[i / (4 * kM)][i / kM % 4][i % kM]);
    mine = int(lane) == i ? total : mine;
  }
  if (split > 1u) {
    shared.sums[simd][lane] = mine;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (share != 0u) return;
    for (uint s = 1; s < split; ++s) mine += shared.sums[simd + s][lane];
  }
  // Value i: row i % kM of x and row i / kM of the strips.
  const int i = int(lane);
  if (i < 4 * kStrips * kM) {
    write_result(mine, first_row + i % kM, 4 * first_strip + i / kM, bias, y, x_scales, p);
  }
}

}  // namespace lowbit
