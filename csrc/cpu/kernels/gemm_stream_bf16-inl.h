// gemm for few rows of bf16 and code books (FP8, FP4, NF4) with bf16 dot products: weights are looked up as bf16, in
// registers, and read once. Half the instructions of gemm_stream-inl.h, which looks up floats.
//
// FP8's and FP4's values are exact in bf16; NF4's 16 levels are rounded to it once (their scale is not: sums over a group
// take it in fp32). Every sum is two chains whose order depends on K alone, not on M or on the other rows. x comes with the
// middle two of every four k exchanged, as decode_bf16-inl.h has them. Included after V, codec-inl.h and epilogue-inl.h; V
// needs broadcast_pair, dot2 and ByteLut.

// Bytes ahead: fp8 94 % of a streaming read's speed with 1024 and 77 % with 2048, nf4 75 and 78 (Zen 4, M = 1).
template <int kBits>
constexpr int64_t kPairPrefetch = kBits == 8 ? 1024 : 2048;

// Two registers of pairs: (k0, k2) and (k1, k3) of a quad of 16 rows.
struct Pairs {
  V::I even, odd;
};

// Four bits: one table of 32 words. A look-up takes five bits of every word and so one bit of the next code, for which the
// 16 levels stand twice.
struct NibblePairs {
  static constexpr int kBits = 4;
  V::I table;

  explicit NibblePairs(const WeightView& w) {
    uint16_t words[32];
    for (int q = 0; q < 32; ++q) {
      uint32_t bits;
      __builtin_memcpy(&bits, w.code + q % 16, 4);
      words[q] = static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
    }
    table = V::iload(reinterpret_cast<const uint8_t*>(words));
  }

  template <int Q>
  LOWBIT_UNROLLED Pairs quad(const uint8_t* block) const {
    const V::I codes = V::iload(block + Q / 2 * 64);
    return {V::word_lut32(V::shr16<Q % 2 * 4>(codes), table),
            V::word_lut32(V::shr16<8 + Q % 2 * 4>(codes), table)};
  }
};

// Eight bits: tables of the halves' bytes, as in Fp8TableCodec, and one permutation for each register of pairs.
struct BytePairs {
  static constexpr int kBits = 8;
  Fp8TableCodec bytes;

  explicit BytePairs(const WeightView& w) : bytes(w) {}

  template <int Q>
  LOWBIT_UNROLLED Pairs quad(const uint8_t* block) const {
    const V::I codes = V::iload(block + Q * 64);
    const V::I sign = V::band(codes, V::iset1(static_cast<int32_t>(0x80808080u)));
    const V::I low = V::lut128(codes, bytes.low), high = V::bor(V::lut128(codes, bytes.high), sign);
    return {V::pair_of_halves<0>(low, high), V::pair_of_halves<1>(low, high)};
  }
};

// A tile is MR rows of x times NR strips, two sums each.
template <int MR, int NR>
using PairSums = V::F[MR][NR][2];

template <int Q, int MR, int NR, class Codec>
LOWBIT_UNROLLED inline void pair_quad(const Codec& codec, const uint8_t* const (&base)[NR],
                                      int64_t offset, const uint16_t* const (&x)[MR], int64_t k,
                                      PairSums<MR, NR>& sums) {
  Pairs w[NR];
#pragma GCC unroll 4
  for (int s = 0; s < NR; ++s) w[s] = codec.template quad<Q>(base[s] + offset);
#pragma GCC unroll 4
  for (int m = 0; m < MR; ++m) {
    const V::I even = V::broadcast_pair(x[m] + k + 4 * Q);
    const V::I odd = V::broadcast_pair(x[m] + k + 4 * Q + 2);
#pragma GCC unroll 4
    for (int s = 0; s < NR; ++s) {
      sums[m][s][0] = V::dot2(sums[m][s][0], w[s].even, even);
      sums[m][s][1] = V::dot2(sums[m][s][1], w[s].odd, odd);
    }
  }
}

// Sums over one group: `blocks` blocks of 32 k.
template <int MR, int NR, class Codec>
LOWBIT_UNROLLED inline void sum_pairs(const Codec& codec, const WeightView& w,
                                      const uint8_t* const (&base)[NR],
                                      const uint16_t* const (&x)[MR], int64_t k, int64_t end,
                                      PairSums<MR, NR>& sums) {
#pragma GCC unroll 4
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
    for (int s = 0; s < NR; ++s) sums[m][s][0] = sums[m][s][1] = V::zero();
  }
  for (int64_t offset = k / 32 * w.block_bytes; k < end; k += 32, offset += w.block_bytes) {
    prefetch_blocks<Codec::kBits>(w, base, offset + kPairPrefetch<Codec::kBits>);
    pair_quad<0>(codec, base, offset, x, k, sums);
    pair_quad<1>(codec, base, offset, x, k, sums);
    pair_quad<2>(codec, base, offset, x, k, sums);
    pair_quad<3>(codec, base, offset, x, k, sums);
    pair_quad<4>(codec, base, offset, x, k, sums);
    pair_quad<5>(codec, base, offset, x, k, sums);
    pair_quad<6>(codec, base, offset, x, k, sums);
    pair_quad<7>(codec, base, offset, x, k, sums);
  }
}

template <int MR, int NR, class Codec>
void pair_tile(const Codec& codec, const GemmJob& job, int64_t strip, int64_t m0) {
  const WeightView& w = job.w;
  const uint8_t* base[NR];
  const uint16_t* x[MR];
  V::F total[MR][NR];
  for (int s = 0; s < NR; ++s) base[s] = w.data + (strip + s) * w.strip_bytes;
  for (int m = 0; m < MR; ++m) {
    x[m] = job.x.bfloats + (m0 + m) * job.x.stride;
    for (int s = 0; s < NR; ++s) total[m][s] = V::zero();
  }
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t end = g + 1 == w.groups ? w.K_padded : (g + 1) * w.group_size;
    PairSums<MR, NR> sums;
    sum_pairs<MR, NR>(codec, w, base, x, g * w.group_size, end, sums);
#pragma GCC unroll 4
    for (int s = 0; s < NR; ++s) {
      const V::F scale = group_scales(w, base[s], g);
#pragma GCC unroll 4
      for (int m = 0; m < MR; ++m)
        total[m][s] = V::fma(V::add(sums[m][s][0], sums[m][s][1]), scale, total[m][s]);
    }
  }
  for (int s = 0; s < NR; ++s) {
    for (int m = 0; m < MR; ++m) write_tile_row(job.y, w.N, m0 + m, (strip + s) * 16, total[m][s]);
  }
}

// All rows against NR strips, which from the second tile of rows on come from cache.
template <int MR, int NR, class Codec>
void pair_rows(const Codec& codec, const GemmJob& job, int64_t strip, int64_t m) {
  for (; m + MR <= job.x.M; m += MR) pair_tile<MR, NR>(codec, job, strip, m);
  if constexpr (MR > 1) pair_rows<MR / 2, NR>(codec, job, strip, m);
}

// As many strips as registers hold sums for.
template <class Codec>
void pair_strips(const Codec& codec, const GemmJob& job, int64_t strip, int64_t end) {
  for (; strip + 4 <= end && job.x.M < 4; strip += 4) pair_rows<2, 4>(codec, job, strip, 0);
  for (; strip + 2 <= end; strip += 2) pair_rows<4, 2>(codec, job, strip, 0);
  for (; strip < end; ++strip) pair_rows<4, 1>(codec, job, strip, 0);
}

// Only code books reach this kernel.
void gemm_stream_bf16(const GemmJob& job, int64_t strip_begin, int64_t strip_end) {
  if (job.w.bits == 8) {
    pair_strips(BytePairs(job.w), job, strip_begin, strip_end);
  } else {
    pair_strips(NibblePairs(job.w), job, strip_begin, strip_end);
  }
}
