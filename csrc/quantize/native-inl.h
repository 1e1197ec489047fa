// The numbers of quantize/rules-inl.h and search-inl.h where the machine has them.

using Float32 = float;
using Float64 = double;

LOWBIT_HD inline float bits_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

LOWBIT_HD inline uint32_t float_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

// Round to an integer, ties to even, for |value| < 2^22. A NaN comes out as `low` of the caller's clamp.
LOWBIT_HD inline float round_even(float value) { return (value + 12582912.0f) - 12582912.0f; }
