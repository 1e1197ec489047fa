// Rounding and encoding that gives the same bits on every ISA: elementwise IEEE operations, ties to even, no
// contraction, and sums over 16 fixed lanes. Plain loops, so that the compiler uses whatever width there is.
// Included after V and codec-inl.h.

// Round to an integer, ties to even, for |value| < 2^22. A NaN comes out as `low` of the caller's clamp.
inline float round_even(float value) { return (value + 12582912.0f) - 12582912.0f; }

inline float clamp(float value, float low, float high) {
  value = value > low ? value : low;  // also for a NaN
  return value < high ? value : high;
}

inline uint32_t float_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

inline float bits_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

inline bool is_nan(float value) { return (float_bits(value) & 0x7fffffffu) > 0x7f800000u; }

// Stores in the scales' dtype and gives back what a reader will see.
inline float store_rounded(float value, ScaleDtype dtype, uint8_t* to) {
  uint8_t row[64];
  const Element element = dtype == ScaleDtype::kFloat32   ? Element::kFloat32
                          : dtype == ScaleDtype::kFloat16 ? Element::kFloat16
                                                          : Element::kBFloat16;
  store16(V::set1(value), element, row);
  __builtin_memcpy(to, row, dtype == ScaleDtype::kFloat32 ? 4 : 2);
  return load1(row, dtype);
}

inline float rounded(float value, ScaleDtype dtype) {
  uint8_t bytes[4];
  return store_rounded(value, dtype, bytes);
}

// The smallest positive number of a dtype: what a scale becomes that would otherwise round to zero.
inline float smallest(ScaleDtype dtype) {
  return dtype == ScaleDtype::kFloat32   ? bits_float(1)
         : dtype == ScaleDtype::kFloat16 ? 0x1p-24f
                                         : bits_float(0x10000u);
}

// A usable scale: 1 for a group of zeros, never 0 for one that is not.
inline float rounded_scale(float scale, ScaleDtype dtype) {
  if (scale == 0.0f) return 1.0f;
  const float result = rounded(scale, dtype);
  return result == 0.0f ? smallest(dtype) : result;
}

// A float with few bits: sign, exponent (IEEE bias), mantissa. |value| is at most the largest finite one.
template <int kExponentBits, int kMantissaBits>
struct SmallFloat {
  static constexpr int kBias = (1 << (kExponentBits - 1)) - 1;
  static constexpr int kDrop = 23 - kMantissaBits;
  static constexpr uint32_t kSmallestNormal = static_cast<uint32_t>(127 + 1 - kBias) << 23;
  // Subnormals are multiples of 1 / kInverseSpacing.
  static constexpr float kInverseSpacing = static_cast<float>(1u << (kBias - 1 + kMantissaBits));

  // fp32 bits of a normal magnitude, rounded to kMantissaBits; the bits dropped are not yet cleared.
  static uint32_t rounded_bits(uint32_t magnitude) {
    return magnitude + (1u << (kDrop - 1)) - 1u + ((magnitude >> kDrop) & 1u);
  }

  static uint8_t encode(float value) {
    const uint32_t bits = float_bits(value);
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t normal =
        (rounded_bits(magnitude) - (static_cast<uint32_t>(127 - kBias) << 23)) >> kDrop;
    const uint32_t subnormal = static_cast<uint32_t>(
        static_cast<int32_t>(round_even(bits_float(magnitude) * kInverseSpacing)));
    const uint32_t code = magnitude < kSmallestNormal ? subnormal : normal;
    return static_cast<uint8_t>(code | (bits >> 31) << (kExponentBits + kMantissaBits));
  }

  // What `encode` decodes to, without a table look-up in the inner loop of the scale search.
  static float nearest(float value) {
    const uint32_t bits = float_bits(value);
    const uint32_t magnitude = bits & 0x7fffffffu;
    const float normal = bits_float(rounded_bits(magnitude) >> kDrop << kDrop);
    const float subnormal = round_even(bits_float(magnitude) * kInverseSpacing) / kInverseSpacing;
    const float result = magnitude < kSmallestNormal ? subnormal : normal;
    return bits_float(float_bits(result) | (bits & 0x80000000u));
  }
};
