// gemm for few rows of floats with integer dot products: x as int8 planes (split_rows-inl.h), weights as they are stored.
//
//   sum_k x[k] (q[k] - z) = scale * sum_p 256^p sum_k d_p[k] (q[k] - z)  +  sum over spilled k of x[k] (q[k] - z)
//
// The integers are exact: a segment is at most 256 long, so that |sum v (q - z)| <= 255 * 32639 * 256 < 2^31 for two
// planes, and sums that wrap on the way come back. Per segment there is one rounding to fp32 (three with four planes) and
// one addition to the total; the order does not depend on M, nor on the other rows. A vector of 64 bytes costs one dot
// product per 64 codes, plane and row, where fp32 lanes need four multiply-adds, four shifts and four conversions.
// Included after V, codec-inl.h, zeros-inl.h and
// split_rows-inl.h.

// Bytes ahead. Measured on Zen 4 at M = 1 as a share of a streaming read's speed, with 1024, 2048 and 6144: 8 bits 95, 75 and
// 75 %, 4 bits 79, 76 and 73, but 6 bits, whose blocks have two planes, 60, 70 and 68.
template <int kBits>
constexpr int64_t kPrefetch = 8 % kBits == 0 ? 1024 : 2048;

// A tile is MR rows of x times NR strips: an element of x is broadcast once for NR dot products. Zen 4 broadcasts from
// memory every other cycle, so that one strip at a time would wait for that. V::kPlaneSums counts the vectors of sums that
// registers hold.
template <int P, int MR>
constexpr int kPlaneStrips = V::kPlaneSums / (P * MR) >= 4 ? 4 : V::kPlaneSums / (P * MR);

template <int P, int MR, int NR>
using PlaneSums = V::I[MR][NR][P];

template <int Q, int kBits, int P, int MR, int NR>
LOWBIT_UNROLLED inline void plane_quad(const uint8_t* const (&block)[NR], int64_t offset,
                                       const int8_t* x, PlaneSums<P, MR, NR>& sums) {
  V::I codes[NR];
#pragma GCC unroll 4
  for (int s = 0; s < NR; ++s) codes[s] = Codes<kBits>::template quad<Q>(block[s] + offset);
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      const V::I digits = V::broadcast4(x + ((Q * MR + m) * P + p) * 4);
#pragma GCC unroll 4
      for (int s = 0; s < NR; ++s)
        sums[m][s][p] = dot_codes<kBits>(sums[m][s][p], codes[s], digits);
    }
  }
}

// sum v (q - z) as floats, in units of the segment's scale.
template <int P>
LOWBIT_UNROLLED inline V::F join_planes(const V::I (&sums)[P], V::I low_zeros, V::I high_zeros) {
  const V::F low = V::to_f(V::isub(V::iadd(V::shl<8>(sums[1]), sums[0]), low_zeros));
  if constexpr (P == 2) return low;
  const V::I high = V::isub(V::iadd(V::shl<8>(sums[P - 1]), sums[P - 2]), high_zeros);
  return V::fma(V::to_f(high), V::set1(65536.0f), low);
}

// Adds one segment of one row to its total.
template <int kBits, int P>
LOWBIT_UNROLLED inline V::F add_segment(const WeightView& w, const SegmentZeros& z,
                                        const V::I (&sums)[P], const SplitSegment& x, V::F total) {
  V::I low, high = V::izero();
  if (w.zero_kind == ZeroKind::kNone) {
    low = V::iset1(static_cast<int32_t>(static_cast<uint32_t>(x.low) << (kBits - 1)));
    high = V::iset1(static_cast<int32_t>(static_cast<uint32_t>(x.high) << (kBits - 1)));
  } else {
    low = V::imul(z.integer, V::iset1(x.low));
    if constexpr (P > 2) high = V::imul(z.integer, V::iset1(x.high));
  }
  V::F sum = V::mul(join_planes<P>(sums, low, high), V::set1(x.scale));
  if (w.zero_kind == ZeroKind::kFloat) sum = V::sub(sum, V::mul(z.rest, V::set1(x.total)));
  total = V::fma(sum, z.scale, total);
  return w.zero_kind == ZeroKind::kOffset ? V::fma(z.rest, V::set1(x.total), total) : total;
}

// Code of 16 rows at one k, as floats.
template <int kBits>
LOWBIT_UNROLLED inline V::F codes_at(const WeightView& w, const uint8_t* strip, uint32_t k) {
  return V::to_f(Codes<kBits>::at(strip + k / 32 * w.block_bytes, k % 32));
}

// What was spilled of one row, after the rest: a loop per segment would mispredict its end in every one.
template <int kBits>
V::F add_spilled(const GemmJob& job, const uint8_t* strip, int64_t m, int64_t count, V::F total) {
  const WeightView& w = job.w;
  const Spilled* spilled = job.x.spilled + m * job.x.stride;
  const V::F middle = V::set1(static_cast<float>(1 << (kBits - 1)));
  for (int64_t i = 0; i < count; ++i) {
    const V::F codes = codes_at<kBits>(w, strip, spilled[i].k), x = V::set1(spilled[i].x);
    const V::F scale = group_scales(w, strip, spilled[i].group);
    if (w.zero_kind == ZeroKind::kNone) {
      total = V::fma(V::mul(V::sub(codes, middle), x), scale, total);
      continue;
    }
    const V::F zero = group_zeros(w, strip, spilled[i].group);
    const V::F weight = w.zero_kind == ZeroKind::kOffset ? V::add(V::mul(codes, scale), zero)
                                                         : V::mul(V::sub(codes, zero), scale);
    total = V::fma(weight, x, total);
  }
  return total;
}

// Integer sums of one segment: `blocks` blocks of 32 from `offset` on.
template <int kBits, int P, int MR, int NR>
LOWBIT_UNROLLED inline void sum_segment(const WeightView& w, const uint8_t* const (&base)[NR],
                                        int64_t offset, int64_t blocks, const int8_t* x,
                                        PlaneSums<P, MR, NR>& sums) {
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
    for (int s = 0; s < NR; ++s) {
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) sums[m][s][p] = V::izero();
    }
  }
  for (int64_t i = 0; i < blocks; ++i, offset += w.block_bytes, x += 32 * P * MR) {
    prefetch_blocks<kBits>(w, base, offset + kPrefetch<kBits>);
    plane_quad<0, kBits, P, MR, NR>(base, offset, x, sums);
    plane_quad<1, kBits, P, MR, NR>(base, offset, x, sums);
    plane_quad<2, kBits, P, MR, NR>(base, offset, x, sums);
    plane_quad<3, kBits, P, MR, NR>(base, offset, x, sums);
    plane_quad<4, kBits, P, MR, NR>(base, offset, x, sums);
    plane_quad<5, kBits, P, MR, NR>(base, offset, x, sums);
    plane_quad<6, kBits, P, MR, NR>(base, offset, x, sums);
    plane_quad<7, kBits, P, MR, NR>(base, offset, x, sums);
  }
}

template <int kBits, int P, int MR, int NR>
void plane_tile(const GemmJob& job, int64_t strip, int64_t m0) {
  const WeightView& w = job.w;
  const uint8_t* base[NR];
  V::F total[MR][NR];
  for (int s = 0; s < NR; ++s) {
    base[s] = w.data + (strip + s) * w.strip_bytes;
    for (int m = 0; m < MR; ++m) total[m][s] = V::zero();
  }
  const int8_t* x = job.x.planes + m0 * P * job.x.stride;
  const int64_t segments = w.groups * job.x.segments_per_group;
  const SplitSegment* split = job.x.split + m0 * segments;
  int64_t k = 0;
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t group_end = g + 1 == w.groups ? w.K_padded : (g + 1) * w.group_size;
    for (int64_t segment = g * job.x.segments_per_group; k < group_end; ++segment) {
      const int64_t count = job.x.segment < group_end - k ? job.x.segment : group_end - k;
      PlaneSums<P, MR, NR> sums;
      sum_segment<kBits, P, MR, NR>(w, base, k / 32 * w.block_bytes, count / 32, x + k * P * MR,
                                    sums);
      k += count;
#pragma GCC unroll 4
      for (int s = 0; s < NR; ++s) {
        const SegmentZeros zeros = segment_zeros<kBits>(w, base[s], g);
#pragma GCC unroll 16
        for (int m = 0; m < MR; ++m) {
          total[m][s] = add_segment<kBits, P>(w, zeros, sums[m][s], split[m * segments + segment],
                                              total[m][s]);
        }
      }
    }
  }
  for (int s = 0; s < NR; ++s) {
    for (int m = 0; m < MR; ++m) {
      const V::F sum =
          add_spilled<kBits>(job, base[s], m0 + m, job.x.spilled_counts[m0 + m], total[m][s]);
      write_tile_row(job.y, w.N, m0 + m, (strip + s) * 16, sum);
    }
  }
}

// All rows against NR strips; from the second tile of rows on these come from cache.
template <int kBits, int P, int NR>
void plane_rows(const GemmJob& job, int64_t strip) {
  int64_t rows;
  for (int64_t m = 0; m < job.x.M; m += rows) {
    rows = rows_of_tile(job.x.M, m, P);
    if (rows == 1) {
      plane_tile<kBits, P, 1, NR>(job, strip, m);
    } else if (kPlaneRows<P> == 2 || rows == 2) {
      if constexpr (kPlaneRows<P> >= 2 && NR <= kPlaneStrips<P, 2>)
        plane_tile<kBits, P, 2, NR>(job, strip, m);
    } else {
      if constexpr (kPlaneRows<P> >= 4 && NR <= kPlaneStrips<P, 4>)
        plane_tile<kBits, P, 4, NR>(job, strip, m);
    }
  }
}

template <int kBits, int P, int NR>
void plane_streams(const GemmJob& job, int64_t strip, int64_t end) {
  for (; strip + NR <= end; strip += NR) plane_rows<kBits, P, NR>(job, strip);
  for (; strip < end; ++strip) plane_rows<kBits, P, 1>(job, strip);
}

// As many strips as the largest tile of rows allows.
template <int kBits, int P>
void plane_strips(const GemmJob& job, int64_t begin, int64_t end) {
  const int64_t rows = rows_of_tile(job.x.M, 0, P);
  if (rows == 1) {
    plane_streams<kBits, P, kPlaneStrips<P, 1>>(job, begin, end);
  } else if (kPlaneRows<P> == 2 || rows == 2) {
    if constexpr (kPlaneRows<P> >= 2) plane_streams<kBits, P, kPlaneStrips<P, 2>>(job, begin, end);
  } else {
    if constexpr (kPlaneRows<P> >= 4) plane_streams<kBits, P, kPlaneStrips<P, 4>>(job, begin, end);
  }
}

template <int kBits>
void plane_bits(const GemmJob& job, int64_t begin, int64_t end) {
  if (job.x.plane_count == 2) {
    plane_strips<kBits, 2>(job, begin, end);
  } else {
    plane_strips<kBits, 4>(job, begin, end);
  }
}

// The widest codes that are multiplied here; kernel_table.cpp sends nothing wider than kPlanes.bits.
#if defined(LOWBIT_FAST_DOT)
constexpr int kWidestCodes = 8;
#else
constexpr int kWidestCodes = 6;
#endif

// Only integer formats reach this kernel.
void gemm_planes(const GemmJob& job, int64_t strip_begin, int64_t strip_end) {
  with_bits(job.w, [&](auto bits) {
    if constexpr (decltype(bits)::value <= kWidestCodes)
      plane_bits<decltype(bits)::value>(job, strip_begin, strip_end);
  });
}

// Measured on Zen 4, 4096 x 4096 int4, against the kernels that multiply floats: two planes win at every M where a dot
// product is one instruction, four up to three rows; where it is three, two win up to two rows and four for one.
#if defined(LOWBIT_FAST_DOT)
static const PlaneKernels kPlanes = {gemm_planes, split_rows, kWidestCodes, INT64_MAX, 3, true};
#elif defined( \
    LOWBIT_SIGNED_DOT)  // one instruction too, for codes that are signed bytes as they are
static const PlaneKernels kPlanes = {gemm_planes, split_rows, kWidestCodes, INT64_MAX, 3, true};
#else
static const PlaneKernels kPlanes = {gemm_planes, split_rows, kWidestCodes, 2, 1, false};
#endif
