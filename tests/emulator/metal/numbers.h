// half and bfloat, as Metal rounds them: to nearest even, half with subnormals.
#pragma once

#include "emulator/numbers.h"

namespace metal {

using uchar = unsigned char;
using ushort = unsigned short;
using uint = unsigned int;
using ulong = unsigned long;

inline ushort half_from_float(float value) {
  const uint bits = lowbit::emulator::bits_of(value), sign = bits >> 16 & 0x8000u,
             magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return ushort(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return ushort(sign | 0x7c00u);  // rounds to 2^16 or more
  if (magnitude < 0x38800000u) {
    // Below 2^-14. Adding 0.5 rounds to a multiple of 2^-24, the spacing of half's subnormals.
    return ushort(sign | (lowbit::emulator::bits_of(lowbit::emulator::float_of(magnitude) + 0.5f) -
                          0x3f000000u));
  }
  const uint rebiased = magnitude - 0x38000000u;
  return ushort(sign | (rebiased + 0xfffu + (rebiased >> 13 & 1u)) >> 13);
}

struct half {
  ushort bits;
  half() = default;
  template <class T>
  explicit half(T value) : bits(half_from_float(float(value))) {}
  half(float value) : bits(half_from_float(value)) {}
  operator float() const { return lowbit::emulator::half_value(bits); }
};
// fp32 holds sums and products of halves well enough: rounding twice is rounding once (24 >= 2 * 11 + 2).
inline half operator+(half a, half b) { return half(float(a) + float(b)); }
inline half operator-(half a, half b) { return half(float(a) - float(b)); }
inline half operator*(half a, half b) { return half(float(a) * float(b)); }

struct bfloat {
  ushort bits;
  bfloat() = default;
  explicit bfloat(float value) {
    const uint wide = lowbit::emulator::bits_of(value);
    bits = (wide & 0x7fffffffu) > 0x7f800000u ? ushort(wide >> 16 | 0x40u)
                                              : ushort((wide + 0x7fffu + (wide >> 16 & 1u)) >> 16);
  }
  operator float() const { return lowbit::emulator::bfloat16_value(bits); }
};

}  // namespace metal
