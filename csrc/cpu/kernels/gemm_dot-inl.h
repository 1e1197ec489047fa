// gemm_a8 for integer weights and int8 activations: dot products of u8 codes and s8 activations in int32.
//
//   sum_k (xq - xz) * (q - z) = sum xq*q - z * sum xq - xz * (sum q - z * count)
//
// exactly, in int32, over a segment of at most 32768 k (65025 * 32768 < 2^31); then one fp32 multiply-add per segment
// with the weight's scale, and the activation's scale at the end. Included after V, codec-inl.h and segment-inl.h.

template <int Q, int MR, bool kAsymmetric, int kBits>
LOWBIT_UNROLLED inline void dot_quad(const uint8_t* block, const int8_t* const* x, int64_t k,
                                     V::I (&sums)[MR], V::I& code_sum) {
  const V::I codes = Codes<kBits>::template quad<Q>(block);
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
    sums[m] = dot_codes<kBits>(sums[m], codes, V::broadcast4(x[m] + k + 4 * Q));
  if constexpr (kAsymmetric) code_sum = dot_codes<kBits>(code_sum, codes, V::iset1(0x01010101));
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
      dot_quad<0, MR, kAsymmetric, kBits>(block, xm, k, sums, code_sum);
      dot_quad<1, MR, kAsymmetric, kBits>(block, xm, k, sums, code_sum);
      dot_quad<2, MR, kAsymmetric, kBits>(block, xm, k, sums, code_sum);
      dot_quad<3, MR, kAsymmetric, kBits>(block, xm, k, sums, code_sum);
      dot_quad<4, MR, kAsymmetric, kBits>(block, xm, k, sums, code_sum);
      dot_quad<5, MR, kAsymmetric, kBits>(block, xm, k, sums, code_sum);
      dot_quad<6, MR, kAsymmetric, kBits>(block, xm, k, sums, code_sum);
      dot_quad<7, MR, kAsymmetric, kBits>(block, xm, k, sums, code_sum);
    }
    const SegmentZeros zeros = segment_zeros<kBits>(w, base, g);
    const int32_t count = static_cast<int32_t>((end < w.K ? end : w.K) - begin);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      const int32_t x_zero = kAsymmetric ? x.zeros[row[m]] : 0;
      const int32_t x_total = x.sums[row[m] * segments + segment] - x_zero * count;
      total[m] =
          V::add(total[m], finish_segment(w.zero_kind, zeros, sums[m], x_total, code_sum, x_zero));
    }
  }
  for (int m = 0; m < rows; ++m)
    write_tile_row(job.y, w.N, m0 + m, strip * 16, V::mul(total[m], V::set1(x.scales[row[m]])));
}

template <bool kAsymmetric, int kBits>
void dot_strips(const GemmJob& job, int64_t begin, int64_t end) {
  for (int64_t strip = begin; strip < end; ++strip) {
    for (int64_t m = 0; m < job.x.M; m += 8) {
      const int64_t rows = job.x.M - m < 8 ? job.x.M - m : 8;
      if (rows == 1) {
        dot_strip<1, kAsymmetric, kBits>(job, strip, m, rows);
      } else if (rows <= 4) {
        dot_strip<4, kAsymmetric, kBits>(job, strip, m, rows);
      } else {
        dot_strip<8, kAsymmetric, kBits>(job, strip, m, rows);
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
