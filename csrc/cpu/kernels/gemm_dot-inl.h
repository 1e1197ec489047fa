// gemm_a8 for integer weights and int8 activations: dot products of u8 codes and s8 activations in int32.
//
//   sum_k (xq - xz) * (q - z) = sum xq*q - z * sum xq - xz * (sum q - z * count)
//
// exactly, in int32, over a segment of at most 32768 k (65025 * 32768 < 2^31); then one fp32 multiply-add per segment
// with the weight's scale, and the activation's scale at the end. Included after V, codec-inl.h and segment-inl.h.

#if defined(LOWBIT_SIGNED_DOT)
// Where bytes are multiplied only as signed ones, codes of eight bits go in less 128. Their zeros go down with them:
// q - z stays what it is.
template <int kBits>
constexpr int kLess = kBits == 8 ? 128 : 0;

template <int Q, int kBits>
LOWBIT_INLINE inline V::I dot_operand(const uint8_t* block) {
  return V::signed_codes<kBits>(Codes<kBits>::template quad<Q>(block));
}
template <int kBits>
LOWBIT_INLINE inline V::I dot4_ones(V::I sums, V::I codes) {
  return V::dot4_signed<kBits>(sums, codes, V::iset1(0x01010101));
}
template <int Q, int kBits>
LOWBIT_INLINE inline V::I dot4_row(V::I sums, V::I codes, const int8_t* x) {
  return V::dot4_signed_at<Q, kBits>(sums, codes, x);
}
#else
template <int kBits>
constexpr int kLess = 0;

template <int Q, int kBits>
LOWBIT_INLINE inline V::I dot_operand(const uint8_t* block) {
  return Codes<kBits>::template quad<Q>(block);
}
template <int kBits>
LOWBIT_INLINE inline V::I dot4_ones(V::I sums, V::I codes) {
  return dot_codes<kBits>(sums, codes, V::iset1(0x01010101));
}
template <int Q, int kBits>
LOWBIT_INLINE inline V::I dot4_row(V::I sums, V::I codes, const int8_t* x) {
#if defined(LOWBIT_DOT_PAIRS)
  return V::dot4_at<Q>(sums, codes, x);
#else
  return dot_codes<kBits>(sums, codes, V::broadcast4(x + 4 * Q));
#endif
}
#endif

// Rows that are taken in pairs, on an ISA with products of 2 x 8 and 8 x 2 bytes: their sums lie interleaved meanwhile.
template <int MR>
#if defined(LOWBIT_DOT_PAIRS)
constexpr bool kPairs = MR % 2 == 0;
#else
constexpr bool kPairs = false;
#endif

// A tile is MR rows of x times NR strips: what is broadcast of a row serves NR dot products (see gemm_planes-inl.h).
template <int MR, int NR>
struct DotTile {
  V::I sums[MR][NR];
  V::I code_sums[NR];
};

// Two quads of every strip, the first of them Q.
template <int Q, bool kAsymmetric, int kBits, int MR, int NR>
LOWBIT_UNROLLED inline void dot_octet(const uint8_t* const (&strip)[NR], int64_t offset,
                                      const int8_t* const* x, int64_t k, DotTile<MR, NR>& tile) {
  V::I low[NR], high[NR];
#pragma GCC unroll 4
  for (int s = 0; s < NR; ++s) {
    low[s] = dot_operand<Q, kBits>(strip[s] + offset);
    high[s] = dot_operand<Q + 1, kBits>(strip[s] + offset);
    if constexpr (kAsymmetric)
      tile.code_sums[s] = dot4_ones<kBits>(dot4_ones<kBits>(tile.code_sums[s], low[s]), high[s]);
  }
#if defined(LOWBIT_DOT_PAIRS)
  if constexpr (kPairs<MR>) {
#pragma GCC unroll 16
    for (int m = 0; m < MR; m += 2) {
      for (int s = 0; s < NR; ++s) {
        V::dot8_pair(tile.sums[m][s], tile.sums[m + 1][s], low[s], high[s], x[m] + k + 4 * Q,
                     x[m + 1] + k + 4 * Q);
      }
    }
  }
#endif
  if constexpr (!kPairs<MR>) {
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
      for (int s = 0; s < NR; ++s)
        tile.sums[m][s] = dot4_row<Q, kBits>(tile.sums[m][s], low[s], x[m] + k);
    }
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
      for (int s = 0; s < NR; ++s)
        tile.sums[m][s] = dot4_row<Q + 1, kBits>(tile.sums[m][s], high[s], x[m] + k);
    }
  }
}

// Bytes ahead (Zen 4: int8 at M = 1 107 % of a streaming read's speed with 1024 and 94 % with 2048, int4 92 and 82, but at M = 4
// 61 and 72).
template <int kBits, int MR>
constexpr int64_t kDotPrefetch = kBits == 8 || MR == 1 ? 1024 : 2048;

// Integer sums over [begin, end) of K, which lies in one group.
template <bool kAsymmetric, int kBits, int MR, int NR>
LOWBIT_UNROLLED inline void dot_segment(const WeightView& w, const uint8_t* const (&strip)[NR],
                                        const int8_t* const* x, int64_t begin, int64_t end,
                                        bool is_first, DotTile<MR, NR>& tile) {
#pragma GCC unroll 4
  for (int s = 0; s < NR; ++s) {
    tile.code_sums[s] = V::izero();
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) tile.sums[m][s] = V::izero();
  }
  int64_t offset = begin / 32 * w.block_bytes;
  for_halves<false>(offset, w.block_bytes, begin, end,
                    [&](auto half, int64_t at, int64_t k) LOWBIT_FORCED {
                      // Only the first tile of rows finds the weight in memory.
                      if (half.kQuad == 0 && is_first)
                        prefetch_blocks<kBits>(w, strip, at + kDotPrefetch<kBits, MR>);
                      dot_octet<half.kQuad, kAsymmetric, kBits>(strip, at, x, k, tile);
                      dot_octet<half.kQuad + 2, kAsymmetric, kBits>(strip, at, x, k, tile);
                    });
#if defined(LOWBIT_DOT_PAIRS)
  for (int m = 0; kPairs<MR> && m < MR; m += 2) {
    for (int s = 0; s < NR; ++s) V::split_pair(tile.sums[m][s], tile.sums[m + 1][s]);
  }
#endif
}

// Rows [m0, m0 + rows) against NR strips; rows beyond the last repeat it and are not stored.
template <bool kAsymmetric, int kBits, int MR, int NR>
void dot_tile(const GemmJob& job, int64_t first, int64_t m0, int64_t rows) {
  const WeightView& w = job.w;
  const Activations& x = job.x;
  const uint8_t* strip[NR];
  const int8_t* xm[MR];
  int64_t row[MR];
  V::F total[MR][NR];
  for (int s = 0; s < NR; ++s) strip[s] = w.data + (first + s) * w.strip_bytes;
  for (int m = 0; m < MR; ++m) {
    row[m] = m0 + (m < rows ? m : rows - 1);
    xm[m] = x.codes + row[m] * x.stride;
    for (int s = 0; s < NR; ++s) total[m][s] = V::zero();
  }
  const int64_t segments = w.groups * x.segments_per_group;
  for (int64_t segment = 0; segment < segments; ++segment) {
    const int64_t g = segment / x.segments_per_group;
    const int64_t group_end = g + 1 == w.groups ? w.K_padded : (g + 1) * w.group_size;
    const int64_t begin = g * w.group_size + segment % x.segments_per_group * x.segment;
    // A segment is a multiple of 32 but for the one of a group of all of K, which ends where the padding does.
    const bool whole = x.segments_per_group == 1 || begin + x.segment > group_end;
    const int64_t end = whole ? group_end : begin + x.segment;
    if (begin >= end) continue;  // the ragged last group has fewer segments
    DotTile<MR, NR> tile;
    dot_segment<kAsymmetric, kBits>(w, strip, xm, begin, end, m0 == 0, tile);
    const int32_t count = static_cast<int32_t>((end < w.K ? end : w.K) - begin);
#pragma GCC unroll 4
    for (int s = 0; s < NR; ++s) {
      const SegmentZeros zeros = segment_zeros<kBits>(w, strip[s], g);
      // Codes past K are 0: they went into the sum as -kLess.
      if constexpr (kAsymmetric && kLess<kBits> != 0) {
        const int32_t past = static_cast<int32_t>(end - begin) - count;
        tile.code_sums[s] = V::iadd(tile.code_sums[s], V::iset1(kLess<kBits> * past));
      }
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m) {
        const int32_t x_zero = kAsymmetric ? x.zeros[row[m]] : 0;
        const int32_t x_total = x.sums[row[m] * segments + segment] - x_zero * count;
        total[m][s] =
            V::add(total[m][s], finish_segment(w.zero_kind, zeros, tile.sums[m][s], x_total,
                                               tile.code_sums[s], x_zero, kLess<kBits>));
      }
    }
  }
  for (int s = 0; s < NR; ++s) {
    for (int m = 0; m < rows; ++m) {
      write_tile_row(job.y, w.N, m0 + m, (first + s) * 16,
                     V::mul(total[m][s], V::set1(x.scales[row[m]])));
    }
  }
}

// All rows against NR strips; from the second tile of rows on these come from cache.
template <bool kAsymmetric, int kBits, int NR>
void dot_rows(const GemmJob& job, int64_t strip) {
  for (int64_t m = 0; m < job.x.M; m += V::kDotRows) {
    const int64_t rows = job.x.M - m < V::kDotRows ? job.x.M - m : V::kDotRows;
    if (rows == 1) {
      dot_tile<kAsymmetric, kBits, 1, NR>(job, strip, m, rows);
    } else if (rows == 2) {
      dot_tile<kAsymmetric, kBits, 2, NR>(job, strip, m, rows);
    } else if (rows <= 4) {
      dot_tile<kAsymmetric, kBits, 4, NR>(job, strip, m, rows);
    } else {
      dot_tile<kAsymmetric, kBits, V::kDotRows, NR>(job, strip, m, rows);
    }
  }
}

template <bool kAsymmetric, int kBits>
void dot_strips(const GemmJob& job, int64_t strip, int64_t end) {
  for (; strip + V::kDotStrips <= end; strip += V::kDotStrips)
    dot_rows<kAsymmetric, kBits, V::kDotStrips>(job, strip);
  if constexpr (V::kDotStrips > 1) {
    for (; strip < end; ++strip) dot_rows<kAsymmetric, kBits, 1>(job, strip);
  }
}

template <int kBits>
void dot_bits(const GemmJob& job, int64_t begin, int64_t end) {
  if (job.x.zeros != nullptr) {
    dot_strips<true, kBits>(job, begin, end);
  } else {
    dot_strips<false, kBits>(job, begin, end);
  }
}

// Only integer formats reach this kernel: code books are decoded to fp32.
void gemm_dot(const GemmJob& job, int64_t strip_begin, int64_t strip_end) {
  with_bits(job.w,
            [&](auto bits) { dot_bits<decltype(bits)::value>(job, strip_begin, strip_end); });
}
