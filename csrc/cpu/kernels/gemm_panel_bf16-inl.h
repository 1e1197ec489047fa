// gemm for many rows of bf16 activations with bf16 dot products: twice the multiply-adds of fp32 per instruction.
//
// Where the codes are exact in bf16 (integers less their zero, FP8, FP4 E2M1, IQ4_NL) and groups are not short, the panel holds codes,
// not weights: sums run over one group (at most 256 of K) and then take its scale in fp32, so that nothing is rounded
// that panel_f32 would not round. Elsewhere it holds weights, rounded to bf16 once, and sums run over 256 of K. As in panel_f32 the order of additions depends on K alone: this
// kernel is batch-invariant. x comes with the middle two of every four k exchanged, as decode_bf16-inl.h has them.
// Included after V, codec-inl.h, decode_bf16-inl.h and epilogue-inl.h; V needs broadcast_pair and dot2.

enum : int64_t { kSegmentK = 256 };  // 8 KiB of bf16 per strip

// sums[m][s] += scale[s] * (x[m][0..2 * pairs) . panel[s]): MR rows of x against NR strips.
template <int MR, int NR>
void multiply_segment(const uint16_t* x, int64_t x_stride, const uint8_t* panel, int64_t pairs,
                      const V::F (&scale)[NR], float* sums) {
  V::F acc[MR][NR];
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
    for (int s = 0; s < NR; ++s) acc[m][s] = V::zero();
  }
  for (int64_t p = 0; p < pairs; ++p) {
    V::I w[NR];
#pragma GCC unroll 4
    for (int s = 0; s < NR; ++s) w[s] = V::iload(panel + (s * kSegmentK / 2 + p) * 64);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      const V::I xm = V::broadcast_pair(x + m * x_stride + 2 * p);
#pragma GCC unroll 4
      for (int s = 0; s < NR; ++s) acc[m][s] = V::dot2(acc[m][s], w[s], xm);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
    for (int s = 0; s < NR; ++s) {
      float* sum = sums + (m * NR + s) * 16;
      V::store(sum, V::fma(acc[m][s], scale[s], V::load(sum)));
    }
  }
}

template <int NR>
void multiply_segment_rows(const Activations& x, int64_t k0, int64_t pairs, const uint8_t* panel,
                           const V::F (&scale)[NR], float* sums) {
  int64_t m = 0;
  for (; m + 8 <= x.M; m += 8)
    multiply_segment<8, NR>(x.bfloats + m * x.stride + k0, x.stride, panel, pairs, scale,
                            sums + m * NR * 16);
  for (; m + 2 <= x.M; m += 2)
    multiply_segment<2, NR>(x.bfloats + m * x.stride + k0, x.stride, panel, pairs, scale,
                            sums + m * NR * 16);
  for (; m < x.M; ++m)
    multiply_segment<1, NR>(x.bfloats + m * x.stride + k0, x.stride, panel, pairs, scale,
                            sums + m * NR * 16);
}

// What fills the panel, and whether it leaves the scale to the sums.
struct PanelDecoder {
  DecodeBlock decode;
  const void* codec;
  bool scaled;
};

// panel[(k1 - k0) / 2][16 rows] of pairs. Returns the scale that is left to the sums.
inline V::F decode_segment(const PanelDecoder& decoder, const WeightView& w, const uint8_t* base,
                           int64_t k0, int64_t k1, uint8_t* panel) {
  V::I unused = V::izero();
  TileGroup group{};
  int64_t group_end = 0;
  for (int64_t k = k0; k < k1; k += 32, panel += 16 * 64) {
    if (k >= group_end) {
      const int64_t g = k / w.group_size < w.groups ? k / w.group_size : w.groups - 1;
      group = tile_group(w, base, g);
      group_end = g + 1 == w.groups ? w.K_padded : (g + 1) * w.group_size;
    }
    const uint8_t* block = base + k / 32 * w.block_bytes;
    __builtin_prefetch(block + 1024);
    decoder.decode(decoder.codec, block, group, panel, unused);
  }
  return decoder.scaled ? V::set1(1.0f) : group.floats.scale;
}

// Weights may be summed across groups, codes only within one.
inline int64_t segment_end(const PanelDecoder& decoder, const WeightView& w, int64_t k) {
  const int64_t g = k / w.group_size;
  const int64_t whole = decoder.scaled || g + 1 >= w.groups ? w.K_padded : (g + 1) * w.group_size;
  return whole - k < kSegmentK ? whole : k + kSegmentK;
}

template <int NR>
void bf16_strips(const PanelDecoder& decoder, const GemmJob& job, int64_t strip) {
  alignas(64) uint8_t panel[NR * kSegmentK * 32];
  alignas(64) float sums[kMaxRows * NR * 16];
  const WeightView& w = job.w;
  for (int64_t i = 0; i < job.x.M * NR * 16; ++i) sums[i] = 0.0f;
  for (int64_t k0 = 0, k1 = 0; k0 < w.K_padded; k0 = k1) {
    k1 = segment_end(decoder, w, k0);
    V::F scale[NR];
    for (int s = 0; s < NR; ++s)
      scale[s] = decode_segment(decoder, w, w.data + (strip + s) * w.strip_bytes, k0, k1,
                                panel + s * kSegmentK * 32);
    multiply_segment_rows<NR>(job.x, k0, (k1 - k0) / 2, panel, scale, sums);
  }
  for (int64_t m = 0; m < job.x.M; ++m) {
    for (int s = 0; s < NR; ++s)
      write_tile_row(job.y, w.N, m, (strip + s) * 16, V::load(sums + (m * NR + s) * 16));
  }
}

struct Bf16Strips {
  const GemmJob& job;
  int64_t begin, end;
  bool scaled;

  void operator()(DecodeBlock decode, const void* codec) const {
    const PanelDecoder decoder{decode, codec, scaled};
    int64_t strip = begin;
    for (; strip + 2 <= end; strip += 2) bf16_strips<2>(decoder, job, strip);
    for (; strip < end; ++strip) bf16_strips<1>(decoder, job, strip);
  }
};

// Below 64 the sums take longer to be scaled than weights.
inline bool keeps_codes(const WeightView& w) {
  return w.group_size >= 64 && w.exact16 &&
         (w.zero_kind == ZeroKind::kNone || w.zero_kind == ZeroKind::kInt);
}

void gemm_panel_bf16(const GemmJob& job, int64_t strip_begin, int64_t strip_end) {
  if (keeps_codes(job.w)) {
    with_code_decoder(job.w, Bf16Strips{job, strip_begin, strip_end, false});
  } else {
    with_weight_decoder(job.w, Bf16Strips{job, strip_begin, strip_end, true});
  }
}
