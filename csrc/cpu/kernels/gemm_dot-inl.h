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

// Two quads, the first of them Q.
template <int Q, int MR, bool kAsymmetric, int kBits>
LOWBIT_UNROLLED inline void dot_octet(const uint8_t* block, const int8_t* const* x, int64_t k,
                                      V::I (&sums)[MR], V::I& code_sum) {
  const V::I low = dot_operand<Q, kBits>(block), high = dot_operand<Q + 1, kBits>(block);
#if defined(LOWBIT_DOT_PAIRS)
  if constexpr (kPairs<MR>) {
#pragma GCC unroll 16
    for (int m = 0; m < MR; m += 2)
      V::dot8_pair(sums[m], sums[m + 1], low, high, x[m] + k + 4 * Q, x[m + 1] + k + 4 * Q);
  }
#endif
  if constexpr (!kPairs<MR>) {
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) sums[m] = dot4_row<Q, kBits>(sums[m], low, x[m] + k);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) sums[m] = dot4_row<Q + 1, kBits>(sums[m], high, x[m] + k);
  }
  if constexpr (kAsymmetric) code_sum = dot4_ones<kBits>(dot4_ones<kBits>(code_sum, low), high);
}

template <int MR, bool kAsymmetric, int kBits>
void dot_strip(const GemmJob& job, int64_t strip, int64_t m0, int64_t rows) {
  const WeightView& w = job.w;
  const Activations& x = job.x;
  const uint8_t* base = w.data + strip * w.strip_bytes;
  const uint8_t* block = base;
  const int8_t* xm[MR];
  int64_t row[MR];
  V::F total[MR];
  for (int m = 0; m < MR; ++m) {
    row[m] = m0 + (m < rows ? m : rows - 1);
    xm[m] = x.codes + row[m] * x.stride;
    total[m] = V::zero();
  }
  const int64_t segments = w.groups * x.segments_per_group;
  for (int64_t segment = 0; segment < segments; ++segment) {
    const int64_t g = segment / x.segments_per_group;
    const int64_t group_end = g + 1 == w.groups ? w.K_padded : (g + 1) * w.group_size;
    const int64_t begin = g * w.group_size + segment % x.segments_per_group * x.segment;
    const int64_t end = begin + x.segment < group_end ? begin + x.segment : group_end;
    if (begin >= end) continue;  // the ragged last group has fewer segments
    V::I sums[MR];
    V::I code_sum = V::izero();
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) sums[m] = V::izero();
    for (int64_t k = begin; k < end; k += 32, block += w.block_bytes) {
      __builtin_prefetch(block + 1024);
      dot_octet<0, MR, kAsymmetric, kBits>(block, xm, k, sums, code_sum);
      dot_octet<2, MR, kAsymmetric, kBits>(block, xm, k, sums, code_sum);
      dot_octet<4, MR, kAsymmetric, kBits>(block, xm, k, sums, code_sum);
      dot_octet<6, MR, kAsymmetric, kBits>(block, xm, k, sums, code_sum);
    }
#if defined(LOWBIT_DOT_PAIRS)
    for (int m = 0; kPairs<MR> && m < MR; m += 2) V::split_pair(sums[m], sums[m + 1]);
#endif
    const SegmentZeros zeros = segment_zeros<kBits>(w, base, g);
    const int32_t count = static_cast<int32_t>((end < w.K ? end : w.K) - begin);
    // Codes past K are 0, up to the end of their block: they went into the sum as -kLess.
    if constexpr (kAsymmetric && kLess<kBits> != 0) {
      const int32_t past = static_cast<int32_t>((end - begin + 31) / 32 * 32) - count;
      code_sum = V::iadd(code_sum, V::iset1(kLess<kBits> * past));
    }
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      const int32_t x_zero = kAsymmetric ? x.zeros[row[m]] : 0;
      const int32_t x_total = x.sums[row[m] * segments + segment] - x_zero * count;
      total[m] = V::add(total[m], finish_segment(w.zero_kind, zeros, sums[m], x_total, code_sum,
                                                 x_zero, kLess<kBits>));
    }
  }
  for (int m = 0; m < rows; ++m)
    write_tile_row(job.y, w.N, m0 + m, strip * 16, V::mul(total[m], V::set1(x.scales[row[m]])));
}

template <bool kAsymmetric, int kBits>
void dot_strips(const GemmJob& job, int64_t begin, int64_t end) {
  for (int64_t strip = begin; strip < end; ++strip) {
    for (int64_t m = 0; m < job.x.M; m += V::kDotRows) {
      const int64_t rows = job.x.M - m < V::kDotRows ? job.x.M - m : V::kDotRows;
      if (rows == 1) {
        dot_strip<1, kAsymmetric, kBits>(job, strip, m, rows);
      } else if (rows <= 4) {
        dot_strip<4, kAsymmetric, kBits>(job, strip, m, rows);
      } else {
        dot_strip<V::kDotRows, kAsymmetric, kBits>(job, strip, m, rows);
      }
    }
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
  switch (job.w.format) {
    case Format::kInt2:
      return dot_bits<2>(job, strip_begin, strip_end);
    case Format::kInt3:
      return dot_bits<3>(job, strip_begin, strip_end);
    case Format::kInt4:
      return dot_bits<4>(job, strip_begin, strip_end);
    case Format::kInt5:
      return dot_bits<5>(job, strip_begin, strip_end);
    case Format::kInt6:
      return dot_bits<6>(job, strip_begin, strip_end);
    default:
      return dot_bits<8>(job, strip_begin, strip_end);
  }
}
