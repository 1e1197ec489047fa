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

// Bytes ahead. Few bits wait for arithmetic, and want the memory to be far ahead; more bits wait for the memory, which is
// fastest where the hardware's own prefetching leads. Measured on Zen 4 at M = 1 with huge pages, as shares of a streaming read's
// speed: 2 bits 58, 69, 70 % with 1024, 1536, 2048; 3 bits 62, 67, 66; 4 bits 87, 80, 80; 5 bits 77, 71, 76; 6 bits 84, 74,
// 70; 8 bits 98, 88, 79.
template <int kBits>
constexpr int64_t kPrefetch = kBits < 4 ? 2048 : 1024;

// A tile is MR rows of x times NR strips: an element of x is broadcast once for NR dot products. Zen 4 broadcasts from
// memory every other cycle, so that one strip at a time would wait for that. V::kPlaneSums counts the vectors of sums that
// registers hold.
template <int P, int MR>
constexpr int kPlaneStrips = V::kPlaneSums / (P * MR) >= 4 ? 4 : V::kPlaneSums / (P * MR);

template <int P, int MR, int NR>
using PlaneSums = V::I[MR][NR][P];

// Codes of one block of NR strips on their way to dot products. Where registers are to spare their vectors are loaded once,
// in address order; else for every quad.
template <int kBits, int NR, bool kKept>
struct BlockCodes {
  V::I vectors[NR][kKept ? kBits : 1];

  template <int Q>
  LOWBIT_UNROLLED void load(const uint8_t* const (&block)[NR], int64_t offset) {
    constexpr CodePiece kPiece = code_pieces(kBits, Q).piece[0];
    if constexpr (kKept && kPiece.shift == 0) {
#pragma GCC unroll 4
      for (int s = 0; s < NR; ++s)
        vectors[s][kPiece.vector] = V::kept(V::iload(block[s] + offset + kPiece.vector * 64));
    }
  }
  template <int Q>
  LOWBIT_UNROLLED V::I quad(const uint8_t* const (&block)[NR], int64_t offset, int s) const {
    if constexpr (kKept) {
      return Codes<kBits>::template quad_of<Q>([&](int v) LOWBIT_FORCED { return vectors[s][v]; });
    } else {
      return Codes<kBits>::template quad<Q>(block[s] + offset);
    }
  }
};

template <int Q, int kBits, int P, int MR, int NR, bool kKept>
LOWBIT_UNROLLED inline void plane_quad(const uint8_t* const (&block)[NR], int64_t offset,
                                       const int8_t* x, BlockCodes<kBits, NR, kKept>& from,
                                       PlaneSums<P, MR, NR>& sums) {
  V::I codes[NR];
  from.template load<Q>(block, offset);
#pragma GCC unroll 4
  for (int s = 0; s < NR; ++s) codes[s] = from.template quad<Q>(block, offset, s);
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

// Which dtype it is gets asked once for all strips. Integers have scales of their own in every row.
template <int NR>
LOWBIT_UNROLLED inline void load_scales(const WeightView& w, const uint8_t* const (&strip)[NR],
                                        int64_t g, V::F (&scale)[NR]) {
  const int64_t at = w.scales_offset + g * 16 * w.scale_bytes;
  if (w.scale_dtype == ScaleDtype::kBFloat16) {
#pragma GCC unroll 4
    for (int s = 0; s < NR; ++s) scale[s] = V::load_bfloat(strip[s] + at);
  } else if (w.scale_dtype == ScaleDtype::kFloat16) {
#pragma GCC unroll 4
    for (int s = 0; s < NR; ++s) scale[s] = V::load_half(strip[s] + at);
  } else {
#pragma GCC unroll 4
    for (int s = 0; s < NR; ++s) scale[s] = load16(strip[s] + at, ScaleDtype::kFloat32);
  }
}

// The zeros of a group, split as in zeros-inl.h, but for offsets: there any integer near -offset / scale will do.
template <int kBits>
LOWBIT_UNROLLED inline V::I split_zeros(const WeightView& w, const uint8_t* strip, int64_t g,
                                        V::F& scale, V::F& rest) {
  if (w.zero_kind != ZeroKind::kOffset) {
    const SegmentZeros z = segment_zeros<kBits>(w, strip, g);
    rest = z.rest;
    return z.integer;
  }
  const V::F offset = group_zeros(w, strip, g);
  scale = load16(strip + w.scales_offset + g * 16 * w.scale_bytes, w.scale_dtype);
  const V::F zero = V::mul(V::sub(V::zero(), offset), V::near_reciprocal(scale));
  const V::I integer = V::to_i(V::clamp(zero, V::zero(), V::set1(255.0f)));
  rest = V::fma(V::to_f(integer), scale, offset);
  return integer;
}

// Sums of one segment begin with what the zeros take off. Scales are set where offsets have asked for them.
template <int kBits, int P, int MR, int NR>
LOWBIT_UNROLLED inline void start_sums(const WeightView& w, const uint8_t* const (&strip)[NR],
                                       int64_t g, const SplitSegment* x, int64_t stride,
                                       PlaneSums<P, MR, NR>& sums, V::F (&scale)[NR],
                                       V::F (&rest)[NR]) {
  if (w.zero_kind == ZeroKind::kNone) {
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      const V::I zero = V::izero();
      const V::I low = V::isub(zero, V::shl<kBits - 1>(V::iset1(x[m * stride].low)));
      const V::I high = V::isub(zero, V::shl<kBits - 1>(V::iset1(x[m * stride].high)));
#pragma GCC unroll 4
      for (int s = 0; s < NR; ++s) {
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) sums[m][s][p] = p == 0 ? low : p == 2 ? high : zero;
      }
    }
    return;
  }
#pragma GCC unroll 4
  for (int s = 0; s < NR; ++s) {
    const V::I integer = split_zeros<kBits>(w, strip[s], g, scale[s], rest[s]);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) sums[m][s][p] = V::izero();
      sums[m][s][0] = V::imul(integer, V::iset1(-x[m * stride].low));
      if constexpr (P > 2) sums[m][s][2] = V::imul(integer, V::iset1(-x[m * stride].high));
    }
  }
}

// sum v (q - z) as floats, in units of the segment's scale.
template <int P>
LOWBIT_UNROLLED inline V::F join_planes(const V::I (&sums)[P]) {
  const V::F low = V::to_f(V::iadd(V::shl<8>(sums[1]), sums[0]));
  if constexpr (P == 2) return low;
  const V::F high = V::to_f(V::iadd(V::shl<8>(sums[P - 1]), sums[P - 2]));
  return V::fma(high, V::set1(65536.0f), low);
}

template <ZeroKind kZeros, int P, int MR, int NR>
LOWBIT_UNROLLED inline void add_sums(const PlaneSums<P, MR, NR>& sums, const V::F (&scale)[NR],
                                     const V::F (&rest)[NR], const SplitSegment* x, int64_t stride,
                                     V::F (&total)[MR][NR]) {
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) {
    const V::F unit = V::set1(x[m * stride].scale), x_total = V::set1(x[m * stride].total);
#pragma GCC unroll 4
    for (int s = 0; s < NR; ++s) {
      V::F sum = V::mul(join_planes<P>(sums[m][s]), unit);
      if constexpr (kZeros == ZeroKind::kFloat) sum = V::sub(sum, V::mul(rest[s], x_total));
      total[m][s] = V::fma(sum, scale[s], total[m][s]);
      if constexpr (kZeros == ZeroKind::kOffset)
        total[m][s] = V::fma(rest[s], x_total, total[m][s]);
    }
  }
}

// Adds one segment of every row to its total.
template <int P, int MR, int NR>
LOWBIT_UNROLLED inline void finish_sums(const WeightView& w, const uint8_t* const (&strip)[NR],
                                        int64_t g, const SplitSegment* x, int64_t stride,
                                        const PlaneSums<P, MR, NR>& sums, V::F (&scale)[NR],
                                        const V::F (&rest)[NR], V::F (&total)[MR][NR]) {
  if (w.zero_kind != ZeroKind::kOffset) load_scales(w, strip, g, scale);
  if (w.zero_kind == ZeroKind::kOffset) {
    add_sums<ZeroKind::kOffset, P>(sums, scale, rest, x, stride, total);
  } else if (w.zero_kind == ZeroKind::kFloat) {
    add_sums<ZeroKind::kFloat, P>(sums, scale, rest, x, stride, total);
  } else {
    add_sums<ZeroKind::kNone, P>(sums, scale, rest, x, stride, total);
  }
}

// What was spilled of one row, after the rest: a loop per segment would mispredict its end in every one. An element of all
// strips at a time, whose chains of additions then overlap.
template <int kBits, int NR>
void add_spilled(const GemmJob& job, const uint8_t* const (&strip)[NR], int64_t m,
                 V::F (&total)[NR]) {
  const WeightView& w = job.w;
  const Spilled* spilled = job.x.spilled + m * job.x.stride;
  const V::F middle = V::set1(static_cast<float>(1 << (kBits - 1)));
  for (int64_t i = 0; i < job.x.spilled_counts[m]; ++i) {
    const uint32_t k = spilled[i].k, g = spilled[i].group;
    const int64_t offset = k / 32 * w.block_bytes;
    const V::F x = V::set1(spilled[i].x);
    V::F scale[NR];
    load_scales(w, strip, g, scale);
#pragma GCC unroll 4
    for (int s = 0; s < NR; ++s) {
      const V::F codes = V::to_f(Codes<kBits>::at(strip[s] + offset, k % 32));
      if (w.zero_kind == ZeroKind::kNone) {
        total[s] = V::fma(V::mul(V::sub(codes, middle), x), scale[s], total[s]);
        continue;
      }
      const V::F zero = group_zeros(w, strip[s], g);
      const V::F weight = w.zero_kind == ZeroKind::kOffset ? V::add(V::mul(codes, scale[s]), zero)
                                                           : V::mul(V::sub(codes, zero), scale[s]);
      total[s] = V::fma(weight, x, total[s]);
    }
  }
}

// Adds integer products of one segment: `blocks` blocks of 32 from `offset` on.
template <int kBits, int P, int MR, int NR>
LOWBIT_UNROLLED inline void sum_segment(const WeightView& w, const uint8_t* const (&base)[NR],
                                        int64_t offset, int64_t blocks, const int8_t* x,
                                        PlaneSums<P, MR, NR>& sums) {
  constexpr bool kKept = V::kSpareForCodes >= P * MR * NR;
  for (int64_t i = 0; i < blocks; ++i, offset += w.block_bytes, x += 32 * P * MR) {
    BlockCodes<kBits, NR, kKept> codes;
    prefetch_blocks<kBits>(w, base, offset + kPrefetch<kBits>);
    plane_quad<quad_in_order(kBits, 0), kBits, P, MR, NR>(base, offset, x, codes, sums);
    plane_quad<quad_in_order(kBits, 1), kBits, P, MR, NR>(base, offset, x, codes, sums);
    plane_quad<quad_in_order(kBits, 2), kBits, P, MR, NR>(base, offset, x, codes, sums);
    plane_quad<quad_in_order(kBits, 3), kBits, P, MR, NR>(base, offset, x, codes, sums);
    plane_quad<quad_in_order(kBits, 4), kBits, P, MR, NR>(base, offset, x, codes, sums);
    plane_quad<quad_in_order(kBits, 5), kBits, P, MR, NR>(base, offset, x, codes, sums);
    plane_quad<quad_in_order(kBits, 6), kBits, P, MR, NR>(base, offset, x, codes, sums);
    plane_quad<quad_in_order(kBits, 7), kBits, P, MR, NR>(base, offset, x, codes, sums);
  }
}

template <int kBits, int P, int MR, int NR>
void plane_tile(const GemmJob& job, int64_t strip, int64_t m0) {
  const WeightView& w = job.w;
  const uint8_t* base[NR];
  V::F total[MR][NR], scale[NR], rest[NR];
  for (int s = 0; s < NR; ++s) {
    base[s] = w.data + (strip + s) * w.strip_bytes;
    scale[s] = rest[s] = V::zero();
    for (int m = 0; m < MR; ++m) total[m][s] = V::zero();
  }
  const int8_t* x = job.x.planes + m0 * P * job.x.stride;
  const int64_t segments = w.groups * job.x.segments_per_group;
  const SplitSegment* split = job.x.split + m0 * segments;
  int64_t k = 0;
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t group_end = g + 1 == w.groups ? w.K_padded : (g + 1) * w.group_size;
    prefetch_scales(w, base, g);
    for (int64_t segment = g * job.x.segments_per_group; k < group_end; ++segment) {
      const int64_t count = job.x.segment < group_end - k ? job.x.segment : group_end - k;
      PlaneSums<P, MR, NR> sums;
      start_sums<kBits, P, MR, NR>(w, base, g, split + segment, segments, sums, scale, rest);
      sum_segment<kBits, P, MR, NR>(w, base, k / 32 * w.block_bytes, count / 32, x + k * P * MR,
                                    sums);
      finish_sums<P, MR, NR>(w, base, g, split + segment, segments, sums, scale, rest, total);
      k += count;
    }
  }
  for (int m = 0; m < MR; ++m) {
    add_spilled<kBits>(job, base, m0 + m, total[m]);
    for (int s = 0; s < NR; ++s) write_tile_row(job.y, w.N, m0 + m, (strip + s) * 16, total[m][s]);
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
