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

// A decoder: decode(p) gives the sixteen scales at p; where kFourRows, decode.four(p, to) gives the next four rows.
template <class Decode>
constexpr bool kFourRows = false;

#if defined(LOWBIT_BYTE_LUT)
// Two look-ups for 64 scales and a permutation for 16 are a quarter of e4m3_scales().
struct E4m3Rows {
  Fp8TableCodec bytes;

  explicit E4m3Rows(const float* code) : bytes(code) {}

  V::F operator()(const uint8_t* p) const { return e4m3_scales(V::iload_u8(p)); }
  LOWBIT_FORCED void four(const uint8_t* p, V::F (&to)[4]) const {
    const V::I codes = V::iload(p);
    const V::I sign = V::band(codes, V::iset1(static_cast<int32_t>(0x80808080u)));
    const V::I low = V::lut128(codes, bytes.low), high = V::bor(V::lut128(codes, bytes.high), sign);
    to[0] = V::float_of_run<0>(low, high);
    to[1] = V::float_of_run<1>(low, high);
    to[2] = V::float_of_run<2>(low, high);
    to[3] = V::float_of_run<3>(low, high);
  }
};
template <>
constexpr bool kFourRows<E4m3Rows> = true;
#endif

// body(decode) with the decoder of the scales' dtype; dynamic8 has its own below.
template <class Body>
void with_scale_decoder(const WeightView& w, const Body& body) {
  switch (w.scale_dtype) {
    case ScaleDtype::kE8m0:
      return body([](const uint8_t* p) { return powers_of_two(V::iload_u8(p)); });
    case ScaleDtype::kE4m3:
#if defined(LOWBIT_BYTE_LUT)
      return body(E4m3Rows(w.scale_code));
#else
      return body([](const uint8_t* p) { return e4m3_scales(V::iload_u8(p)); });
#endif
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

// The next `count` rows of codes at `p`, by way of scaled(row), to `to`; both move on.
template <class Decode, class Scaled>
LOWBIT_FORCED inline void expand_rows(const Decode& decode, const uint8_t*& p, int64_t count,
                                      const Scaled& scaled, float*& to) {
  if constexpr (kFourRows<Decode>) {
    for (; count >= 4; count -= 4, p += 64, to += 64) {
      V::F rows[4];
      decode.four(p, rows);
      for (int i = 0; i < 4; ++i) V::store(to + 16 * i, scaled(rows[i]));
    }
  }
  for (; count > 0; --count, p += 16, to += 16) V::store(to, scaled(decode(p)));
}

// to[g - first] = decode(codes of g) * super of g, for rows of 16; the row of super scales is loaded once for all its groups.
template <class Decode>
void expand_table(const WeightView& w, const WeightView::Table& supers, const uint8_t* strip,
                  int64_t codes, int64_t first, int64_t count, const Decode& decode, float* to) {
  const uint8_t* p = strip + codes + first * 16;
  if (supers.offset == 0) {
    expand_rows(decode, p, count, [](V::F row) LOWBIT_FORCED { return row; }, to);
    return;
  }
  for (int64_t g = first, end = first + count; g < end;) {
    const V::F super = super_values(w, supers, strip, g);
    const int64_t next = ((g >> supers.shift) + 1) << supers.shift, last = next < end ? next : end;
    expand_rows(
        decode, p, last - g, [super](V::F row) LOWBIT_FORCED { return V::mul(row, super); }, to);
    g = last;
  }
}

// dynamic8: scale = code * super + one number for all.
void expand_dynamic(const WeightView& w, const uint8_t* strip, int64_t first, int64_t count,
                    float* scales) {
  const uint8_t* p = strip + w.scales_offset + first * 16;
  const V::F plus = super_values(w, w.super_zeros, strip, 0);
#if defined(LOWBIT_FLOAT_LUT)
  const V::FloatLut upper = V::make_float_lut(w.scale_code + 128);
#else
  // All before anything is loaded of them: a load of what has just been stored piece by piece would wait.
  for (int64_t i = 0; i < count * 16; ++i) scales[i] = w.scale_code[p[i]];
#endif
  for (int64_t g = first; g < first + count; ++g, p += 16, scales += 16) {
#if defined(LOWBIT_FLOAT_LUT)
    const V::F value = V::mirrored_lut(V::isub(V::iload_u8(p), V::iset1(127)), upper);
#else
    const V::F value = V::load(scales);
#endif
    V::store(scales, V::add(V::mul(value, super_values(w, w.supers, strip, g)), plus));
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
