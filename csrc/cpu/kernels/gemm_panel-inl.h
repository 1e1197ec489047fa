// gemm for many rows of x: decode 128 x 16 weights into a panel that stays in L1, multiply it with up to 128 rows.
//
// The order of additions of an output depends on nothing but K (k ascending, in fp32 registers, spilled every 128):
// a row's bits do not depend on M or on its neighbours, so this is also the batch-invariant kernel. Included after V.

enum : int64_t {
  kPanelK = 128
};  // 8 KiB of fp32 per strip: two strips and 8 rows of x fit a 32 KiB L1

// sums[m][s] += x[m][0..k) * panel[s][0..k): MR rows of x against NR strips.
template <int MR, int NR>
void multiply_panel(const float* x, int64_t x_stride, const float* panel, int64_t k_count,
                    float* sums, int64_t sums_stride) {
  V::F acc[MR][NR];
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
    for (int s = 0; s < NR; ++s) acc[m][s] = V::load(sums + m * sums_stride + s * 16);
  }
  for (int64_t k = 0; k < k_count; ++k) {
    V::F w[NR];
#pragma GCC unroll 4
    for (int s = 0; s < NR; ++s) w[s] = V::load(panel + (s * kPanelK + k) * 16);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
      for (int s = 0; s < NR; ++s) acc[m][s] = V::fma1(w[s], x + m * x_stride + k, acc[m][s]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
    for (int s = 0; s < NR; ++s) V::store(sums + m * sums_stride + s * 16, acc[m][s]);
  }
}

template <int NR>
void multiply_rows(const Activations& x, int64_t k0, int64_t k_count, const float* panel,
                   float* sums) {
  constexpr int64_t stride = NR * 16;
  int64_t m = 0;
  for (; m + V::kPanelRows <= x.M; m += V::kPanelRows) {
    multiply_panel<V::kPanelRows, NR>(x.values + m * x.stride + k0, x.stride, panel, k_count,
                                      sums + m * stride, stride);
  }
  for (; m + 2 <= x.M; m += 2)
    multiply_panel<2, NR>(x.values + m * x.stride + k0, x.stride, panel, k_count, sums + m * stride,
                          stride);
  for (; m < x.M; ++m)
    multiply_panel<1, NR>(x.values + m * x.stride + k0, x.stride, panel, k_count, sums + m * stride,
                          stride);
}

template <int NR, class Decode>
void panel_strips(const Decode& decode, const GemmJob& job, int64_t strip) {
  alignas(64) float panel[NR * kPanelK * 16];
  alignas(64) float sums[kMaxRows * NR * 16];
  const WeightView& w = job.w;
  for (int64_t i = 0; i < job.x.M * NR * 16; ++i) sums[i] = 0.0f;
  for (int64_t k0 = 0; k0 < w.K_padded; k0 += kPanelK) {
    const int64_t k1 = w.K_padded - k0 < kPanelK ? w.K_padded : k0 + kPanelK;
    for (int s = 0; s < NR; ++s) decode(w, strip + s, k0, k1, panel + s * kPanelK * 16);
    multiply_rows<NR>(job.x, k0, k1 - k0, panel, sums);
  }
  for (int64_t m = 0; m < job.x.M; ++m) {
    for (int s = 0; s < NR; ++s)
      write_tile_row(job.y, w.N, m, (strip + s) * 16, V::load(sums + (m * NR + s) * 16));
  }
}

// Decode: (weight, strip, k0, k1, panel) -> panel[k1 - k0][16] of scaled fp32 weights.
template <class Decode>
void run_panels(const Decode& decode, const GemmJob& job, int64_t begin, int64_t end) {
  int64_t strip = begin;
  for (; strip + V::kPanelStrips <= end; strip += V::kPanelStrips)
    panel_strips<V::kPanelStrips>(decode, job, strip);
  for (; strip < end; ++strip) panel_strips<1>(decode, job, strip);
}

struct PanelStrips {
  const GemmJob& job;
  int64_t begin, end;

  template <class Codec>
  void operator()(const Codec& codec) const {
    run_panels([&codec](const WeightView& w, int64_t strip, int64_t k0, int64_t k1,
                        float* panel) { decode_panel(codec, w, strip, k0, k1, panel); },
               job, begin, end);
  }
};

void gemm_panel(const GemmJob& job, int64_t strip_begin, int64_t strip_end) {
  with_codec(job.w, PanelStrips{job, strip_begin, strip_end});
}
