// gemm for bf16 activations with bf16 dot products: codes are looked up as bf16, in registers, and where there are few rows
// each weight is read once. Half the instructions of gemm_stream-inl.h, which looks up floats, and no panel as
// gemm_panel_bf16-inl.h has, which goes through memory.
//
// Values of codes are exact in bf16, but for the levels of NF4 and bitsandbytes' FP4, which are rounded to it once. Scales are
// not: the sums over a group take them in fp32. Every sum is two chains whose order depends on K alone, not on M or on the other rows, so this kernel is
// batch-invariant. x comes with the middle two of every four k exchanged, as decode_bf16-inl.h has them. Included after V,
// codec-inl.h, decode_bf16-inl.h, epilogue-inl.h and pairs-inl.h; V needs broadcast_pair and dot2.

// Bytes ahead. Zen 4 at M = 1, shares of a streaming read's speed with 1024, 1536, 2048: int3-g64 66, 70, 68 %; nf4-g64 81, 76,
// 85; int4-g32 84, 80, 80; int5-g64 83, 74, 78; int6-g64 86, 79, 79; fp8 94 and, with 2048, 77. Four rows in tiles of two strips
// wait for arithmetic: with 1024, 2048, 4096 int5 takes 211, 169, 162 us (1024 x 4096), int6 249, 186, 178, fp8 276, 250, 242.
template <int kBits, int NR>
constexpr int64_t kPairPrefetch = NR < 4      ? 4096
                                  : kBits > 4 ? 1024
                                              : 2048;

// A tile is MR rows of x times NR strips, two sums each.
template <int MR, int NR>
using PairSums = V::F[MR][NR][2];

template <int Q, int MR, int NR, class Codec>
LOWBIT_UNROLLED inline void pair_quad(const Codec& codec, const typename Codec::State (&state)[NR],
                                      const uint8_t* const (&block)[NR],
                                      const uint16_t* const (&x)[MR], int64_t k,
                                      PairSums<MR, NR>& sums) {
  Pairs w[NR];
#pragma GCC unroll 4
  for (int s = 0; s < NR; ++s) w[s] = codec.template quad<Q>(block[s], state[s]);
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

// One block of 32 k.
template <int MR, int NR, class Codec>
LOWBIT_UNROLLED inline void pair_block(const Codec& codec, const typename Codec::State (&state)[NR],
                                       const uint8_t* const (&block)[NR],
                                       const uint16_t* const (&x)[MR], int64_t k,
                                       PairSums<MR, NR>& sums) {
  pair_quad<0>(codec, state, block, x, k, sums);
  pair_quad<1>(codec, state, block, x, k, sums);
  pair_quad<2>(codec, state, block, x, k, sums);
  pair_quad<3>(codec, state, block, x, k, sums);
  pair_quad<4>(codec, state, block, x, k, sums);
  pair_quad<5>(codec, state, block, x, k, sums);
  pair_quad<6>(codec, state, block, x, k, sums);
  pair_quad<7>(codec, state, block, x, k, sums);
}

template <int NR>
LOWBIT_INLINE inline void blocks_at(const uint8_t* const (&base)[NR], int64_t offset,
                                    const uint8_t* (&block)[NR]) {
#pragma GCC unroll 4
  for (int s = 0; s < NR; ++s) block[s] = base[s] + offset;
}

// Sums over the blocks of one group.
template <int MR, int NR, class Codec>
LOWBIT_UNROLLED inline void sum_pairs(const Codec& codec, const typename Codec::State (&state)[NR],
                                      const WeightView& w, const uint8_t* const (&base)[NR],
                                      const uint16_t* const (&x)[MR], int64_t k, int64_t end,
                                      PairSums<MR, NR>& sums) {
  for (int64_t offset = k / 32 * w.block_bytes; k < end; k += 32, offset += w.block_bytes) {
    prefetch_blocks<Codec::kBits>(w, base, offset + kPairPrefetch<Codec::kBits, NR>);
    const uint8_t* block[NR];
    blocks_at(base, offset, block);
    pair_block(codec, state, block, x, k, sums);
  }
}

// The same for one row and one strip where a zero is larger than ZeroPairs' table: codes go through floats, and through memory.
struct WideSums {
  V::F even, odd;
};
[[gnu::noinline]] WideSums sum_wide_zeros(const WeightView& w, const uint8_t* base, int64_t g,
                                          const uint16_t* x, int64_t k, int64_t end) {
  using Wide = IntCodec<ZeroPairs::kBits, Zeros::kGiven>;
  const Wide wide(w);
  const TileGroup group = tile_group(w, base, g);
  alignas(64) uint8_t decoded[32 * 32];
  const uint8_t* const block[1] = {decoded};
  const uint16_t* const row[1] = {x};
  const DecodedPairs::State state[1];
  PairSums<1, 1> sums = {{{V::zero(), V::zero()}}};
  V::I unused = V::izero();
  for (; k < end; k += 32) {
    decode_codes<Wide>(&wide, base + k / 32 * w.block_bytes, group, decoded, unused);
    pair_block(DecodedPairs(), state, block, row, k, sums);
  }
  return {sums[0][0][0], sums[0][0][1]};
}

// Not part of every tile: it is as long as a short tile itself.
[[gnu::noinline]] void write_pairs(const GemmJob& job, int64_t m0, int rows, int64_t strip,
                                   int strips, const float* totals) {
  for (int m = 0; m < rows; ++m) {
    for (int s = 0; s < strips; ++s, totals += 16)
      write_tile_row(job.y, job.w.N, m0 + m, (strip + s) * 16, V::load(totals));
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
    const int64_t begin = g * w.group_size;
    const int64_t end = g + 1 == w.groups ? w.K_padded : begin + w.group_size;
    typename Codec::State state[NR];
    bool fits = true;
    prefetch_scales(w, base, g);
    PairSums<MR, NR> sums;
#pragma GCC unroll 4
    for (int s = 0; s < NR; ++s) {
      state[s] = typename Codec::State(w, base[s], g);
      fits = fits && state[s].fits();
#pragma GCC unroll 4
      for (int m = 0; m < MR; ++m) sums[m][s][0] = sums[m][s][1] = V::zero();
    }
    if (fits) {
      sum_pairs<MR, NR>(codec, state, w, base, x, begin, end, sums);
    } else {
      for (int m = 0; m < MR; ++m) {
        for (int s = 0; s < NR; ++s) {
          const WideSums wide = sum_wide_zeros(w, base[s], g, x[m], begin, end);
          sums[m][s][0] = wide.even;
          sums[m][s][1] = wide.odd;
        }
      }
    }
#pragma GCC unroll 4
    for (int s = 0; s < NR; ++s) {
      const V::F scale = group_scales(w, base[s], g);
#pragma GCC unroll 4
      for (int m = 0; m < MR; ++m)
        total[m][s] = V::fma(V::add(sums[m][s][0], sums[m][s][1]), scale, total[m][s]);
    }
  }
  float totals[MR * NR * 16];
  for (int m = 0; m < MR; ++m) {
    for (int s = 0; s < NR; ++s) V::store(totals + (m * NR + s) * 16, total[m][s]);
  }
  write_pairs(job, m0, MR, strip, NR, totals);
}

// All rows against NR strips, which from the second tile of rows on come from cache.
template <int MR, int NR, class Codec>
void pair_rows(const Codec& codec, const GemmJob& job, int64_t strip, int64_t m) {
  for (; m + MR <= job.x.M; m += MR) pair_tile<MR, NR>(codec, job, strip, m);
  // One strip alone is what few columns leave: its last rows go one by one.
  if constexpr (MR > 1) pair_rows<NR == 1 ? 1 : MR / 2, NR>(codec, job, strip, m);
}

// As many strips as registers hold sums for.
template <class Codec>
void pair_strips(const GemmJob& job, int64_t strip, int64_t end) {
  const Codec codec(job.w);
  for (; strip + 4 <= end && job.x.M < 4; strip += 4) pair_rows<2, 4>(codec, job, strip, 0);
  for (; strip + 2 <= end; strip += 2) pair_rows<4, 2>(codec, job, strip, 0);
  for (; strip < end; ++strip) pair_rows<4, 1>(codec, job, strip, 0);
}

// Only code books, and integers of at most six bits, without zeros or of four bits, reach this kernel.
void gemm_stream_bf16(const GemmJob& job, int64_t begin, int64_t end) {
  if (job.w.zero_kind == ZeroKind::kInt) return pair_strips<ZeroPairs>(job, begin, end);
  switch (job.w.bits) {
    case 2:
      return pair_strips<CodePairs<2>>(job, begin, end);
    case 3:
      return pair_strips<CodePairs<3>>(job, begin, end);
    case 4:
      return pair_strips<CodePairs<4>>(job, begin, end);
    case 5:
      return pair_strips<CodePairs<5>>(job, begin, end);
    case 6:
      return pair_strips<CodePairs<6>>(job, begin, end);
    default:
      return pair_strips<BytePairs>(job, begin, end);
  }
}
