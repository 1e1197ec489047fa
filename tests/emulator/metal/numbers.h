// half and bfloat, as Metal rounds them: to nearest even, half with subnormals.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace metal {

using uchar = unsigned char;
using ushort = unsigned short;
using uint = unsigned int;
using ulong = unsigned long;

inline uint emulated_bits(float value) {
  uint bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float emulated_float(uint bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline ushort half_from_float(float value) {
  const uint bits = emulated_bits(value), sign = bits >> 16 & 0x8000u,
             magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return ushort(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return ushort(sign | 0x7c00u);  // rounds to 2^16 or more
  if (magnitude < 0x38800000u) {
    // Below 2^-14. Adding 0.5 rounds to a multiple of 2^-24, the spacing of half's subnormals.
    return ushort(sign | (emulated_bits(emulated_float(magnitude) + 0.5f) - 0x3f000000u));
  }
  const uint rebiased = magnitude - 0x38000000u;
  return ushort(sign | (rebiased + 0xfffu + (rebiased >> 13 & 1u)) >> 13);
}
inline float float_from_half(ushort bits) {
  const uint magnitude = bits & 0x7fffu;
  const uint special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;  // infinity and NaN keep theirs
  const float value = emulated_float(magnitude << 13) * 5.192296858534828e33f;  // 2^112: rebased
  return emulated_float(emulated_bits(value) | special | (bits & 0x8000u) << 16);
}

struct half {
  ushort bits;
  half() = default;
  template <class T>
  explicit half(T value) : bits(half_from_float(float(value))) {}
  half(float value) : bits(half_from_float(value)) {}
  operator float() const { return float_from_half(bits); }
};
// fp32 holds sums and products of halves well enough: rounding twice is rounding once (24 >= 2 * 11 + 2).
inline half operator+(half a, half b) { return half(float(a) + float(b)); }
inline half operator-(half a, half b) { return half(float(a) - float(b)); }
inline half operator*(half a, half b) { return half(float(a) * float(b)); }

struct bfloat {
  ushort bits;
  bfloat() = default;
  explicit bfloat(float value) {
    const uint wide = emulated_bits(value);
    bits = (wide & 0x7fffffffu) > 0x7f800000u ? ushort(wide >> 16 | 0x40u)
                                              : ushort((wide + 0x7fffu + (wide >> 16 & 1u)) >> 16);
  }
  operator float() const { return emulated_float(uint(bits) << 16); }
};

}  // namespace metal
