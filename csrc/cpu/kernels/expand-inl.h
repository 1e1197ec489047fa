// Scales of one byte, of two levels, to fp32: what kernels read in their place (cpu/expanded.h). Included after V and
// codec-inl.h.

// Powers of two: the code is the exponent field of fp32, but for 0, which is 2^-127, and 255, a NaN.
inline V::F powers_of_two(V::I codes) {
  const V::F power =
      V::select_lt(codes, V::iset1(1), V::as_f(V::iset1(0x00400000)), V::as_f(V::shl<23>(codes)));
  return V::select_lt(V::iset1(254), codes, V::as_f(V::iset1(0x7fc00000)), power);
}

inline V::F e4m3_scales(V::I codes) {
#if defined(LOWBIT_QUAD_DECODE)
  return V::fp8_float<0, true>(codes);
#else
  return fp8_values<4, 3, false>(codes);
#endif
}

inline V::F look_up(const uint8_t* p, const float* code) {
  float values[16];
  for (int n = 0; n < 16; ++n) values[n] = code[p[n]];
  return V::load(values);
}

// body(decode): decode(p) gives the sixteen scales at p.
template <class Body>
void with_scale_decoder(const WeightView& w, const Body& body) {
  switch (w.scale_dtype) {
    case ScaleDtype::kE8m0:
      return body([](const uint8_t* p) { return powers_of_two(V::iload_u8(p)); });
    case ScaleDtype::kE4m3:
      return body([](const uint8_t* p) { return e4m3_scales(V::iload_u8(p)); });
    case ScaleDtype::kUInt4:  // an offset may stand in the other half
      return body([](const uint8_t* p) { return V::to_f(V::band(V::iload_u8(p), V::iset1(15))); });
    case ScaleDtype::kUInt6:
      return body([](const uint8_t* p) { return V::to_f(V::iload_u8(p)); });
    case ScaleDtype::kInt6:
      return body([](const uint8_t* p) { return V::to_f(V::isub(V::iload_u8(p), V::iset1(32))); });
    case ScaleDtype::kInt8:
      return body([](const uint8_t* p) { return V::to_f(V::isub(V::iload_u8(p), V::iset1(128))); });
    default:
      return body([&w](const uint8_t* p) { return look_up(p, w.scale_code); });
  }
}

inline V::F super_values(const WeightView& w, const WeightView::Table& t, const uint8_t* strip,
                         int64_t g) {
  const int64_t bytes = w.super_dtype == ScaleDtype::kFloat32 ? 64 : 32;
  return load16(strip + t.offset + (g >> t.shift) * bytes, w.super_dtype);
}

// Offsets are codes in the dtype of the scales, of 4 bits in the same bytes.
template <class Decode>
void expand_offsets(const WeightView& w, const uint8_t* strip, int64_t first, int64_t count,
                    const Decode& decode, float* to) {
  for (int64_t g = first; g < first + count; ++g, to += 16) {
    const V::F codes = w.scale_dtype == ScaleDtype::kUInt4
                           ? V::to_f(V::shr<4>(V::iload_u8(strip + w.scales_offset + g * 16)))
                           : decode(strip + w.zeros_offset + g * 16);
    V::store(to, V::mul(codes, super_values(w, w.super_zeros, strip, g)));
  }
}

void expand_scales(const WeightView& w, int64_t strip, int64_t first, int64_t count, float* scales,
                   float* zeros) {
  const uint8_t* base = w.data + strip * w.strip_bytes;
  if (w.scales_per_group == 1) {  // e8m0 and e4m3 only: the block's scale in every lane
    for (int64_t g = first; g < first + count; ++g, scales += 16)
      V::store(scales, V::set1(w.scale_code[base[w.scales_offset + g]]));
    return;
  }
  with_scale_decoder(w, [&](const auto& decode) {
    float* to = scales;
    for (int64_t g = first; g < first + count; ++g, to += 16) {
      V::F s = decode(base + w.scales_offset + g * 16);
      if (w.supers.offset != 0) s = V::mul(s, super_values(w, w.supers, base, g));
      if (w.scale_dtype == ScaleDtype::kDynamic8)
        s = V::add(s, super_values(w, w.super_zeros, base, g));
      V::store(to, s);
    }
    if (zeros != nullptr) expand_offsets(w, base, first, count, decode, zeros);
  });
}
