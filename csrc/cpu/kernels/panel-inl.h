// Decoding a piece of a strip to fp32: panel[k][16], scaled. Shared by the panel GEMM and the input gradient.
// Included after V and codec-inl.h.

template <int Q, class Codec>
LOWBIT_UNROLLED inline void decode_quad(const Codec& codec, const Group& group,
                                        const uint8_t* block, float* panel) {
  V::F w[4] = {codec.template value<Q, 0>(block, group), codec.template value<Q, 1>(block, group),
               codec.template value<Q, 2>(block, group), codec.template value<Q, 3>(block, group)};
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    V::store(panel + (4 * Q + j) * 16, Codec::kScaledInside ? w[j] : V::mul(w[j], group.scale));
  }
}

// Elements [k0, k1) of a strip, both multiples of 32.
template <class Codec>
void decode_panel(const Codec& codec, const WeightView& w, int64_t strip, int64_t k0, int64_t k1,
                  float* panel) {
  const uint8_t* base = w.data + strip * w.strip_bytes;
  int64_t g = -1;
  Group group{};
  for (int64_t k = k0; k < k1; k += 32, panel += 32 * 16) {
    const int64_t here = k / w.group_size < w.groups ? k / w.group_size : w.groups - 1;
    if (here != g) {
      g = here;
      group.scale = group_scales(w, base, g);
      group.zero = w.zero_kind == ZeroKind::kNone ? V::zero() : group_zeros(w, base, g);
    }
    const uint8_t* block = base + k / 32 * w.block_bytes;
    __builtin_prefetch(block + 1024);
    decode_quad<0>(codec, group, block, panel);
    decode_quad<1>(codec, group, block, panel);
    decode_quad<2>(codec, group, block, panel);
    decode_quad<3>(codec, group, block, panel);
    decode_quad<4>(codec, group, block, panel);
    decode_quad<5>(codec, group, block, panel);
    decode_quad<6>(codec, group, block, panel);
    decode_quad<7>(codec, group, block, panel);
  }
}
