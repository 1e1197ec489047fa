// Included after V and codec-inl.h.

// Zeros of one segment, split so that what is subtracted in fp32 is small: an integer near the zero, taken off exactly
// in int32, and the rest. Without the split q - zero near 0 would be the difference of two large fp32 numbers.
//
//   float zeros   integer = rint(zero)                rest = zero - integer           w = ((q - integer) - rest) * s
//   offsets       integer = rint(-offset / s)         rest = integer * s + offset     w = (q - integer) * s + rest
struct SegmentZeros {
  V::F scale, rest;
  V::I integer;
};

template <int kBits>
LOWBIT_UNROLLED inline SegmentZeros segment_zeros(const WeightView& w, const uint8_t* strip,
                                                  int64_t g) {
  SegmentZeros z{group_scales(w, strip, g), V::zero(), V::iset1(1 << (kBits - 1))};
  if (w.zero_kind == ZeroKind::kNone) return z;
  if (w.zero_kind == ZeroKind::kInt) {
    z.integer = V::iload_u8(strip + w.zeros_offset + g * 16);
    return z;
  }
  const V::F low = V::zero(), high = V::set1(255.0f), stored = group_zeros(w, strip, g);
  if (w.zero_kind == ZeroKind::kFloat) {
    z.integer = V::to_i(V::clamp(stored, low, high));
    z.rest = V::sub(stored, V::to_f(z.integer));
  } else {
    z.integer = V::to_i(V::clamp(V::div(V::sub(low, stored), z.scale), low, high));
    z.rest = V::add(V::mul(V::to_f(z.integer), z.scale), stored);
  }
  return z;
}
