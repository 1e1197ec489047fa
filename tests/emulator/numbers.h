// 16-bit numbers as PTX rounds them: to nearest even, subnormals kept, every NaN 0x7fff (9.7.4, 9.7.9.21).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace lowbit::emulator {

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline uint64_t bits_of(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline double double_of(uint64_t bits) {
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float bfloat16_value(uint32_t bits) { return float_of(bits << 16); }

// Without a branch, so that loops over fragments become vector code: the exponent is rebased by a multiplication, which
// is exact and turns fp16 subnormals into normal numbers on the way.
inline float half_value(uint32_t bits) {
  const uint32_t magnitude = bits & 0x7fffu;
  const uint32_t special =
      magnitude >= 0x7c00u ? 0x7f800000u : 0u;  // infinity and NaN keep their mantissa
  const float value = float_of(magnitude << 13) * 0x1p112f;
  return float_of(bits_of(value) | special | (bits & 0x8000u) << 16);
}

// The nearest number with `kMantissa` explicit bits and exponents of `kExponent` bits. `value` may be any double: it is
// rounded once.
template <int kExponent, int kMantissa>
uint32_t round_to_16(double value) {
  constexpr int kBias = (1 << (kExponent - 1)) - 1;
  constexpr uint32_t kInfinity = ((1u << kExponent) - 1u) << kMantissa;
  const uint64_t bits = bits_of(value);
  const uint32_t sign = static_cast<uint32_t>(bits >> 63) << 15;
  const uint64_t magnitude = bits & 0x7fffffffffffffffu;
  if (magnitude > 0x7ff0000000000000u) return 0x7fffu;
  const int exponent = static_cast<int>(magnitude >> 52) - 1023;
  if (exponent > kBias) return sign | kInfinity;
  uint64_t mantissa = magnitude & 0xfffffffffffffu;
  int drop = 52 - kMantissa;
  uint64_t result = static_cast<uint64_t>(exponent + kBias) << kMantissa;
  if (exponent <
      1 - kBias) {  // a subnormal result has no hidden bit: it is part of what is shifted
    drop += 1 - kBias - exponent;
    if (drop > 54) return sign;
    mantissa |= uint64_t{1} << 52;
    result = 0;
  }
  const uint64_t rest = mantissa & ((uint64_t{1} << drop) - 1);
  const uint64_t half = uint64_t{1} << (drop - 1);
  result += mantissa >> drop;
  if (rest > half || (rest == half && (result & 1)))
    ++result;  // a carry moves into the exponent, as it should
  return sign | static_cast<uint32_t>(result);
}
inline uint32_t round_to_half(double value) { return round_to_16<5, 10>(value); }
inline uint32_t round_to_bfloat16(double value) { return round_to_16<8, 7>(value); }

// a + b in double, rounded to odd: rounding the result again to fewer bits is then the same as rounding once.
inline double add_to_odd(double a, double b) {
  const double sum = a + b;
  const double b_part = sum - a;
  const double error =
      (a - (sum - b_part)) + (b - b_part);  // exact (Knuth's two-sum); NaN beside infinities
  if (!(error != 0.0) || !std::isfinite(sum) || (bits_of(sum) & 1)) return sum;
  // The neighbour on the side of the error has an odd last bit.
  const bool away = (error > 0.0) == (sum > 0.0);
  return double_of(bits_of(sum) + (away ? uint64_t{1} : ~uint64_t{0}));
}

}  // namespace lowbit::emulator
