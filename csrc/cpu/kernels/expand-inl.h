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
    default:  // kInt8
      return body([](const uint8_t* p) { return V::to_f(V::isub(V::iload_u8(p), V::iset1(128))); });
  }
}

inline V::F super_values(const WeightView& w, const WeightView::Table& t, const uint8_t* strip,
                         int64_t g) {
  const int64_t bytes = w.super_dtype == ScaleDtype::kFloat32 ? 64 : 32;
  return load16(strip + t.offset + (g >> t.shift) * bytes, w.super_dtype);
}

// to[g - first] = decode(codes of g) * super of g, for rows of 16; the row of super scales is loaded once for all its groups.
template <class Decode>
void expand_table(const WeightView& w, const WeightView::Table& supers, const uint8_t* strip,
                  int64_t codes, int64_t first, int64_t count, const Decode& decode, float* to) {
  const uint8_t* p = strip + codes + first * 16;
  const int64_t end = first + count;
  if (supers.offset == 0) {
    for (int64_t g = first; g < end; ++g, p += 16, to += 16) V::store(to, decode(p));
    return;
  }
  for (int64_t g = first; g < end;) {
    const V::F super = super_values(w, supers, strip, g);
    const int64_t next = ((g >> supers.shift) + 1) << supers.shift;
    for (const int64_t last = next < end ? next : end; g < last; ++g, p += 16, to += 16)
      V::store(to, V::mul(decode(p), super));
  }
}

// Looked up for all groups before anything is loaded of it: a load of what has just been stored piece by piece would wait.
void expand_dynamic(const WeightView& w, const uint8_t* strip, int64_t first, int64_t count,
                    float* scales) {
  const uint8_t* p = strip + w.scales_offset + first * 16;
  for (int64_t i = 0; i < count * 16; ++i) scales[i] = w.scale_code[p[i]];
  const V::F plus = super_values(w, w.super_zeros, strip, 0);  // one for all
  for (int64_t g = first; g < first + count; ++g, scales += 16) {
    const V::F s = V::mul(V::load(scales), super_values(w, w.supers, strip, g));
    V::store(scales, V::add(s, plus));
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
  if (w.scale_dtype == ScaleDtype::kDynamic8) return expand_dynamic(w, base, first, count, scales);
  with_scale_decoder(w, [&](const auto& decode) {
    expand_table(w, w.supers, base, w.scales_offset, first, count, decode, scales);
    if (zeros == nullptr) return;
    if (w.scale_dtype == ScaleDtype::kUInt4) {  // offsets stand in the same bytes
      const auto high = [](const uint8_t* p) { return V::to_f(V::shr<4>(V::iload_u8(p))); };
      expand_table(w, w.super_zeros, base, w.scales_offset, first, count, high, zeros);
    } else {
      expand_table(w, w.super_zeros, base, w.zeros_offset, first, count, decode, zeros);
    }
  });
}
