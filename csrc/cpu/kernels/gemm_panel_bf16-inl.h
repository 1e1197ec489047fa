// gemm for many rows of bf16 activations with bf16 dot products: twice the multiply-adds of fp32 per instruction.
//
// The panel holds codes, not weights: q - zero, and every FP8 and FP4 value, are exact in bf16, so nothing is rounded
// that panel_f32 would not round. Sums run over one group (at most 256 of K) and then take its scale in fp32. As in
// panel_f32 the order of additions depends on K alone: this kernel is batch-invariant. Included after V, codec-inl.h
// and epilogue-inl.h; V needs pair_bf16, broadcast_pair and dot2.

enum : int64_t { kSegmentK = 256 };  // 8 KiB of bf16 per strip

template <int Q, class Codec>
LOWBIT_UNROLLED inline void decode_quad_bf16(const Codec& codec, const Group& group,
                                             const uint8_t* block, uint8_t* panel) {
  const V::F w0 = codec.template value<Q, 0>(block, group),
             w1 = codec.template value<Q, 1>(block, group);
  const V::F w2 = codec.template value<Q, 2>(block, group),
             w3 = codec.template value<Q, 3>(block, group);
  V::istore(panel + (2 * Q) * 64, V::pair_bf16(w0, w1));
  V::istore(panel + (2 * Q + 1) * 64, V::pair_bf16(w2, w3));
}

// panel[(k1 - k0) / 2][16 rows] of pairs (k, k + 1), within one group.
template <class Codec>
void decode_segment(const Codec& codec, const WeightView& w, const uint8_t* base, int64_t k0,
                    int64_t k1, const Group& group, uint8_t* panel) {
  for (int64_t k = k0; k < k1; k += 32, panel += 16 * 64) {
    const uint8_t* block = base + k / 32 * w.block_bytes;
    __builtin_prefetch(block + 1024);
    decode_quad_bf16<0>(codec, group, block, panel);
    decode_quad_bf16<1>(codec, group, block, panel);
    decode_quad_bf16<2>(codec, group, block, panel);
    decode_quad_bf16<3>(codec, group, block, panel);
    decode_quad_bf16<4>(codec, group, block, panel);
    decode_quad_bf16<5>(codec, group, block, panel);
    decode_quad_bf16<6>(codec, group, block, panel);
    decode_quad_bf16<7>(codec, group, block, panel);
  }
}

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

template <int NR, class Codec>
void bf16_strips(const Codec& codec, const GemmJob& job, int64_t strip) {
  alignas(64) uint8_t panel[NR * kSegmentK * 32];
  alignas(64) float sums[kMaxRows * NR * 16];
  const WeightView& w = job.w;
  for (int64_t i = 0; i < job.x.M * NR * 16; ++i) sums[i] = 0.0f;
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t group_end = g + 1 == w.groups ? w.K_padded : (g + 1) * w.group_size;
    for (int64_t k0 = g * w.group_size; k0 < group_end; k0 += kSegmentK) {
      const int64_t k1 = group_end - k0 < kSegmentK ? group_end : k0 + kSegmentK;
      V::F scale[NR];
      for (int s = 0; s < NR; ++s) {
        const uint8_t* base = w.data + (strip + s) * w.strip_bytes;
        scale[s] = group_scales(w, base, g);
        const Group group{scale[s],
                          w.zero_kind == ZeroKind::kNone ? V::zero() : group_zeros(w, base, g)};
        decode_segment(codec, w, base, k0, k1, group, panel + s * kSegmentK * 32);
      }
      multiply_segment_rows<NR>(job.x, k0, (k1 - k0) / 2, panel, scale, sums);
    }
  }
  for (int64_t m = 0; m < job.x.M; ++m) {
    for (int s = 0; s < NR; ++s)
      write_tile_row(job.y, w.N, m, (strip + s) * 16, V::load(sums + (m * NR + s) * 16));
  }
}

struct Bf16Strips {
  const GemmJob& job;
  int64_t begin, end;

  template <class Codec>
  void operator()(const Codec& codec) const {
    int64_t strip = begin;
    for (; strip + 2 <= end; strip += 2) bf16_strips<2>(codec, job, strip);
    for (; strip < end; ++strip) bf16_strips<1>(codec, job, strip);
  }
};

// Formats whose codes are exact in bf16, symmetric or with integer zeros: kernel_table.cpp sends nothing else here.
void gemm_panel_bf16(const GemmJob& job, int64_t strip_begin, int64_t strip_end) {
  with_codec(job.w, Bf16Strips{job, strip_begin, strip_end});
}
