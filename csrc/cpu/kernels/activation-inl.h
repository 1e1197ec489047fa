// quantize_activation: one row of fp32 -> int8 or fp8 codes with a scale per token or per group of K.
// Included after V, quantize/rules-inl.h and quantize-inl.h (range_of).

inline float bounded(float value) { return clamp(value, -65536.0f, 65536.0f); }

// The largest magnitude, as range_of finds it. Bits of magnitudes are in the order of their values, NaN above all.
inline Range magnitude_of(const float* x, int64_t count) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t magnitude = float_bits(x[i]) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  return {0.0f, 0.0f, bits_float(largest), largest > 0x7f800000u};
}

// body(x, codes) for every 16 values; of the last, ragged ones on copies.
template <class Body>
inline void for_sixteen(const float* x, int64_t count, uint8_t* codes, const Body& body) {
  int64_t k = 0;
  for (; k + 16 <= count; k += 16) body(x + k, codes + k);
  if (k == count) return;
  float values[16] = {};
  uint8_t last[16];
  for (int64_t i = 0; k + i < count; ++i) values[i] = x[k + i];
  body(values, last);
  for (int64_t i = 0; k + i < count; ++i) codes[k + i] = last[i];
}

// clamp(rne(bounded(x / scale)) + zero, low, 127)
inline void int8_codes(const float* x, int64_t count, float scale, float zero, float low,
                       uint8_t* codes) {
  const V::F unit = V::set1(scale), least = V::set1(low), most = V::set1(127.0f);
  if (zero == 0.0f) {  // integers as limits: clamped before or after rounding is the same
    for_sixteen(x, count, codes, [&](const float* from, uint8_t* to) {
      V::store_bytes(to, V::to_i(V::clamp(V::div(V::load(from), unit), least, most)));
    });
    return;
  }
  const V::F bound = V::set1(65536.0f), minus_bound = V::set1(-65536.0f), shift = V::set1(zero);
  for_sixteen(x, count, codes, [&](const float* from, uint8_t* to) {
    const V::I rounded = V::to_i(V::clamp(V::div(V::load(from), unit), minus_bound, bound));
    V::store_bytes(to, V::to_i(V::clamp(V::add(V::to_f(rounded), shift), least, most)));
  });
}

// SmallFloat<4, 3>::encode(clamp(x / scale, -448, 448))
inline void fp8_codes(const float* x, int64_t count, float scale, uint8_t* codes) {
  using E4m3 = SmallFloat<4, 3>;
  const V::F unit = V::set1(scale), least = V::set1(-448.0f), most = V::set1(448.0f);
  const V::F inverse_spacing = V::set1(E4m3::inverse_spacing());
  const V::I half = V::iset1((1 << (E4m3::kDrop - 1)) - 1 - ((127 - E4m3::kBias) << 23));
  const V::I smallest_normal = V::iset1(E4m3::kSmallestNormal);
  for_sixteen(x, count, codes, [&](const float* from, uint8_t* to) {
    const V::I bits = V::as_i(V::clamp(V::div(V::load(from), unit), least, most));
    const V::I magnitude = V::band(bits, V::iset1(0x7fffffff));
    const V::I odd = V::band(V::shr<E4m3::kDrop>(magnitude), V::iset1(1));
    const V::I normal = V::shr<E4m3::kDrop>(V::iadd(magnitude, V::iadd(odd, half)));
    const V::I subnormal = V::to_i(V::mul(V::as_f(magnitude), inverse_spacing));
    const V::I code =
        V::as_i(V::select_lt(magnitude, smallest_normal, V::as_f(subnormal), V::as_f(normal)));
    V::store_bytes(to, V::bor(code, V::shl<7>(V::shr<31>(bits))));
  });
}

inline void int8_row(const QuantizeActivationJob& job) {
  const bool fixed = job.static_scale != nullptr;
  const Range range = fixed || job.symmetric ? magnitude_of(job.x, job.K) : range_of(job.x, job.K);
  float scale = 1.0f, zero = 0.0f, low = -128.0f;
  if (fixed) {
    scale = *job.static_scale;
    if (job.static_zero != nullptr) zero = static_cast<float>(*job.static_zero);
  } else if (job.symmetric) {
    scale = range.magnitude / 127.0f;
    low = -127.0f;
  } else {
    const float least = range.low < 0.0f ? range.low : 0.0f;
    const float most = range.high > 0.0f ? range.high : 0.0f;
    scale = (most - least) / 255.0f;
    if (scale > 0.0f) zero = clamp(round_even(bounded(-128.0f - least / scale)), -128.0f, 127.0f);
  }
  if (scale == 0.0f) scale = 1.0f;
  if (range.has_nan) scale = bits_float(0x7fc00000u);
  int8_codes(job.x, job.K, scale, zero, low, static_cast<uint8_t*>(job.codes));
  *job.scales = scale;
  if (job.zeros != nullptr) *job.zeros = static_cast<int32_t>(zero);
}

inline void fp8_row(const QuantizeActivationJob& job) {
  uint8_t* codes = static_cast<uint8_t*>(job.codes);
  for (int64_t begin = 0, g = 0; begin < job.K; begin += job.group_size, ++g) {
    const int64_t count = job.group_size < job.K - begin ? job.group_size : job.K - begin;
    const Range range = magnitude_of(job.x + begin, count);
    float scale = job.static_scale != nullptr ? *job.static_scale : range.magnitude / 448.0f;
    if (scale == 0.0f) scale = 1.0f;
    if (range.has_nan) scale = bits_float(0x7fc00000u);
    fp8_codes(job.x + begin, count, scale, codes + begin);
    job.scales[g] = scale;
  }
}

void quantize_activation_row(const QuantizeActivationJob& job) {
  if (job.format == Element::kInt8) {
    int8_row(job);
  } else {
    fp8_row(job);
  }
}
