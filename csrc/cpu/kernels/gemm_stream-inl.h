// gemm for few rows of x: decode straight into registers and multiply at once. Each weight is read once.
//
// Lanes are 16 output rows; x is broadcast. Sums run in fp32 over one group, then take the group's scale: a group's
// scale is applied once per 16 rows, not to every weight. Included after V and codec-inl.h.

// Independent chains of additions per row of x: an FMA takes four cycles and one or two start per cycle.
template <int MR>
constexpr int kChains = MR == 1   ? 4
                        : MR == 2 ? 2
                                  : 1;

template <int Q, int J, int MR, class Codec>
LOWBIT_UNROLLED inline void stream_element(const Codec& codec, const Group& group,
                                           const uint8_t* block, const float* const* x, int64_t k,
                                           V::F (&sums)[MR][kChains<MR>]) {
  const V::F w = codec.template value<Q, J>(block, group);
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) {
    V::F& sum = sums[m][J % kChains<MR>];
    sum = V::fma1(w, x[m] + k + 4 * Q + J, sum);
  }
}

template <int Q, int MR, class Codec>
LOWBIT_UNROLLED inline void stream_quad(const Codec& codec, const Group& group,
                                        const uint8_t* block, const float* const* x, int64_t k,
                                        V::F (&sums)[MR][kChains<MR>]) {
  stream_element<Q, 0>(codec, group, block, x, k, sums);
  stream_element<Q, 1>(codec, group, block, x, k, sums);
  stream_element<Q, 2>(codec, group, block, x, k, sums);
  stream_element<Q, 3>(codec, group, block, x, k, sums);
}

template <int MR, class Codec>
void stream_strip(const Codec& codec, const GemmJob& job, int64_t strip, const float* const* x,
                  V::F (&total)[MR]) {
  const WeightView& w = job.w;
  const uint8_t* base = w.data + strip * w.strip_bytes;
  int64_t offset = 0;
  for (int m = 0; m < MR; ++m) total[m] = V::zero();
  for (int64_t g = 0; g < w.groups; ++g) {
    Group group;
    group.scale = group_scales(w, base, g);
    group.zero = w.zero_kind == ZeroKind::kNone ? V::zero() : group_zeros(w, base, g);
    V::F sums[MR][kChains<MR>];
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      for (int c = 0; c < kChains<MR>; ++c) sums[m][c] = V::zero();
    }
    const int64_t end = g + 1 == w.groups ? w.K_padded : (g + 1) * w.group_size;
    for_halves<MR == 1>(offset, w.block_bytes, g * w.group_size, end,
                        [&](auto half, int64_t at, int64_t k) LOWBIT_FORCED {
                          const uint8_t* block = base + at;
                          prefetch_half<half.kQuad>(block);
                          stream_quad<half.kQuad>(codec, group, block, x, k, sums);
                          stream_quad<half.kQuad + 1>(codec, group, block, x, k, sums);
                          stream_quad<half.kQuad + 2>(codec, group, block, x, k, sums);
                          stream_quad<half.kQuad + 3>(codec, group, block, x, k, sums);
                        });
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      V::F sum = sums[m][0];
      for (int c = 1; c < kChains<MR>; ++c) sum = V::add(sum, sums[m][c]);
      total[m] = Codec::kScaledInside ? V::add(total[m], sum) : V::fma(sum, group.scale, total[m]);
    }
  }
}

// Rows [m0, m0 + rows) of one strip; rows beyond the last repeat it and are not stored.
template <int MR, class Codec>
void stream_rows(const Codec& codec, const GemmJob& job, int64_t strip, int64_t m0, int64_t rows) {
  const float* x[MR];
  for (int m = 0; m < MR; ++m)
    x[m] = job.x.values + (m0 + (m < rows ? m : rows - 1)) * job.x.stride;
  V::F total[MR];
  stream_strip<MR>(codec, job, strip, x, total);
  for (int m = 0; m < rows; ++m) write_tile_row(job.y, job.w.N, m0 + m, strip * 16, total[m]);
}

// Up to kStreamRows rows with the smallest MR of 1, 2, 4, ... that holds them.
template <int MR, class Codec>
void stream_fitting(const Codec& codec, const GemmJob& job, int64_t strip, int64_t m0,
                    int64_t rows) {
  if constexpr (MR < V::kStreamRows) {
    if (rows > MR) return stream_fitting<2 * MR>(codec, job, strip, m0, rows);
  }
  stream_rows<MR>(codec, job, strip, m0, rows);
}

struct StreamStrips {
  const GemmJob& job;
  int64_t begin, end;

  template <class Codec>
  void operator()(const Codec& codec) const {
    for (int64_t strip = begin; strip < end; ++strip) {
      for (int64_t m = 0; m < job.x.M; m += V::kStreamRows) {
        const int64_t left = job.x.M - m;
        stream_fitting<1>(codec, job, strip, m, left < V::kStreamRows ? left : V::kStreamRows);
      }
    }
  }
};

void gemm_stream(const GemmJob& job, int64_t strip_begin, int64_t strip_end) {
  with_codec(job.w, StreamStrips{job, strip_begin, strip_end});
}
