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
  int64_t offset = k0 / 32 * w.block_bytes;
  for (int64_t k = k0; k < k1;) {
    const int64_t g = k / w.group_size < w.groups ? k / w.group_size : w.groups - 1;
    const int64_t group_end = g + 1 == w.groups ? w.K_padded : (g + 1) * w.group_size;
    const int64_t end = group_end < k1 ? group_end : k1;
    const Group group{group_scales(w, base, g),
                      w.zero_kind == ZeroKind::kNone ? V::zero() : group_zeros(w, base, g)};
    for_halves<false>(
        offset, w.block_bytes, k, end, [&](auto half, int64_t at, int64_t block_k) LOWBIT_FORCED {
          const uint8_t* block = base + at;
          prefetch_half<half.kQuad>(block);
          float* to = panel + (block_k - k0) * 16;  // where quad 0 of the block would stand
          decode_quad<half.kQuad>(codec, group, block, to);
          decode_quad<half.kQuad + 1>(codec, group, block, to);
          decode_quad<half.kQuad + 2>(codec, group, block, to);
          decode_quad<half.kQuad + 3>(codec, group, block, to);
        });
    k = end;
  }
}
