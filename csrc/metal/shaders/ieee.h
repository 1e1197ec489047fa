// fp32 and fp64 in integers: IEEE 754 arithmetic, rounded to nearest even, with subnormals, infinities and NaN.
//
// For results that are the CPU's to the bit (the quantizer's, quantize/rules-inl.h). Apple's GPUs have no fp64, may take
// subnormal fp32 numbers for zero, and how they divide and contract is the compiler's choice: nothing here depends on any of
// it. One operation is 20 to 100 instructions.
//
// A number is its bits. Operations are written once for both sizes, on uint and on ulong.
#pragma once

#include "metal/shaders/language.h"

namespace lowbit {

// Bits of the mantissa, the largest exponent (infinity, NaN), and the first bit of a mantissa before it is rounded: below the
// sign's, so that a carry has room.
template <class Bits>
struct Ieee;
template <>
struct Ieee<uint> {
  typedef int Signed;
  enum : int { kMantissa = 23, kInfinity = 255, kFirst = 30 };
};
template <>
struct Ieee<ulong> {
  typedef long Signed;
  enum : int { kMantissa = 52, kInfinity = 2047, kFirst = 62 };
};

template <class Bits>
inline Bits sign_of(Bits a) {
  return a >> (Ieee<Bits>::kFirst + 1) << (Ieee<Bits>::kFirst + 1);
}
template <class Bits>
inline Bits magnitude_of(Bits a) {
  return a << 1 >> 1;
}
template <class Bits>
inline Bits negative_of(Bits a) {
  return a ^ Bits(1) << (Ieee<Bits>::kFirst + 1);
}
template <class Bits>
inline int exponent_of(Bits a) {
  return int(magnitude_of(a) >> Ieee<Bits>::kMantissa);
}
template <class Bits>
inline Bits fraction_of(Bits a) {
  return a & ((Bits(1) << Ieee<Bits>::kMantissa) - Bits(1));
}
template <class Bits>
inline Bits infinity_of() {
  return Bits(Ieee<Bits>::kInfinity) << Ieee<Bits>::kMantissa;
}
template <class Bits>
inline Bits nan_of() {
  return infinity_of<Bits>() | Bits(1) << (Ieee<Bits>::kMantissa - 1);
}
template <class Bits>
inline bool is_nan_of(Bits a) {
  return magnitude_of(a) > infinity_of<Bits>();
}

inline int leading_zeros(uint a) { return int(clz(a)); }
inline int leading_zeros(ulong a) {
  const uint upper = uint(a >> 32);
  return upper != 0u ? int(clz(upper)) : 32 + int(clz(uint(a)));
}

// ---- rounding ----------------------------------------------------------------------------------------------------------

// a / 2^count; what is lost leaves a bit behind, so that rounding later on knows of it.
template <class Bits>
inline Bits shifted(Bits a, int count) {
  if (count > Ieee<Bits>::kFirst + 1) return Bits(a != 0 ? 1 : 0);
  const Bits kept = a >> count;
  return kept | Bits(kept << count != a ? 1 : 0);
}

// A mantissa from bit kFirst on and a biased exponent.
template <class Bits>
inline Bits rounded_of(Bits sign, int exponent, Bits mantissa) {
  const int extra = Ieee<Bits>::kFirst - Ieee<Bits>::kMantissa;
  if (exponent >= Ieee<Bits>::kInfinity) return sign | infinity_of<Bits>();
  if (exponent < 1) {  // subnormal, or rounded up from there
    mantissa = shifted(mantissa, 1 - exponent);
    exponent = 1;
  }
  const Bits half_less_one = (Bits(1) << (extra - 1)) - Bits(1);
  const Bits rounded = (mantissa + half_less_one + (mantissa >> extra & Bits(1))) >> extra;
  // The mantissa's first bit adds 1 to the exponent, and so does a carry.
  return sign | ((Bits(exponent - 1) << Ieee<Bits>::kMantissa) + rounded);
}

// A finite number's mantissa from the uppermost bit on, and its biased exponent, below 1 for subnormal numbers. 0 for 0.
template <class Bits>
inline Bits normalized(Bits a, thread int& exponent) {
  const int above = Ieee<Bits>::kFirst + 1 - Ieee<Bits>::kMantissa;
  exponent = exponent_of(a);
  if (exponent != 0) return (fraction_of(a) | Bits(1) << Ieee<Bits>::kMantissa) << above;
  const Bits fraction = fraction_of(a);
  if (fraction == 0) return Bits(0);
  const int zeros = leading_zeros(fraction);
  exponent = above + 1 - zeros;
  return fraction << zeros;
}

// ---- operations --------------------------------------------------------------------------------------------------------

template <class Bits>
inline Bits sum_of(Bits a, Bits b) {
  if (magnitude_of(a) < magnitude_of(b)) {
    const Bits larger = b;
    b = a;
    a = larger;
  }
  const Bits sign = sign_of(a);
  const bool same = sign == sign_of(b);
  if (magnitude_of(a) >= infinity_of<Bits>()) {
    const bool undefined = is_nan_of(a) || (!same && magnitude_of(a) == magnitude_of(b));
    return undefined ? nan_of<Bits>() : a;
  }
  // A bit's room above for a carry, and some below: for what the smaller one loses.
  const int room = Ieee<Bits>::kFirst - 1 - Ieee<Bits>::kMantissa;
  const Bits first = Bits(1) << Ieee<Bits>::kMantissa;
  const int exponent = max(exponent_of(a), 1), distance = exponent - max(exponent_of(b), 1);
  const Bits larger = (fraction_of(a) | (exponent_of(a) != 0 ? first : Bits(0))) << room;
  Bits smaller = (fraction_of(b) | (exponent_of(b) != 0 ? first : Bits(0))) << room;
  smaller = shifted(smaller, distance);
  const Bits total = same ? larger + smaller : larger - smaller;
  if (total == 0) return same ? sign : Bits(0);
  const int up = leading_zeros(total) - 1;
  return rounded_of(sign, exponent + 1 - up, total << up);
}

// The upper half of a product, with a bit for what is below it.
inline uint upper_product(uint a, uint b) {
  const ulong product = ulong(a) * ulong(b);
  return uint(product >> 32) | (uint(product) != 0u ? 1u : 0u);
}
inline ulong upper_product(ulong a, ulong b) {
  const uint a1 = uint(a >> 32), a0 = uint(a), b1 = uint(b >> 32), b0 = uint(b);
  const ulong low = ulong(a0) * ulong(b0), cross = ulong(a1) * ulong(b0),
              other = ulong(a0) * ulong(b1);
  const ulong middle = (low >> 32) + ulong(uint(cross)) + ulong(uint(other));
  const ulong high = ulong(a1) * ulong(b1) + (cross >> 32) + (other >> 32) + (middle >> 32);
  return high | ((uint(low) | uint(middle)) != 0u ? 1ul : 0ul);
}

template <class Bits>
inline Bits product_of(Bits a, Bits b) {
  const Bits sign = sign_of(a ^ b);
  const Bits infinity = infinity_of<Bits>();
  if (magnitude_of(a) >= infinity || magnitude_of(b) >= infinity) {
    const bool undefined =
        is_nan_of(a) || is_nan_of(b) || magnitude_of(a) == 0 || magnitude_of(b) == 0;
    return undefined ? nan_of<Bits>() : sign | infinity;
  }
  int exponent_a, exponent_b;
  const Bits from_a = normalized(a, exponent_a), from_b = normalized(b, exponent_b);
  if (from_a == 0 || from_b == 0) return sign;
  Bits product = upper_product(from_a, from_b);
  int exponent = exponent_a + exponent_b - Ieee<Bits>::kInfinity / 2;
  if (product >> (Ieee<Bits>::kFirst + 1) != 0) {
    product = product >> 1 | (product & Bits(1));
    ++exponent;
  }
  return rounded_of(sign, exponent, product);
}

// a / b from 1 to 2, as a mantissa from bit kFirst on, with a bit for the remainder; a and b have their uppermost bit set.
inline uint divided(uint a, uint b) {
  a >>= 8;
  b >>= 8;
  if (a < b) a <<= 1;
  // A guess by the hardware, of any quality up to 2^-20, made right by the remainder, which fits into 32 bits.
  uint quotient = uint(float(a) / float(b) * 33554432.0f);
  int remainder = int((a << 25) - quotient * b);
  for (; remainder < 0; remainder += int(b)) --quotient;
  for (; remainder >= int(b); remainder -= int(b)) ++quotient;
  return quotient << 5 | (remainder != 0 ? 1u : 0u);
}
inline ulong divided(ulong a, ulong b) {
  a >>= 11;
  b >>= 11;
  if (a < b) a <<= 1;
  ulong quotient = 0;
  for (int i = 0; i < 55; ++i) {
    quotient <<= 1;
    if (a >= b) {
      a -= b;
      quotient |= 1ul;
    }
    a <<= 1;
  }
  return quotient << 8 | (a != 0 ? 1ul : 0ul);
}

template <class Bits>
inline Bits quotient_of(Bits a, Bits b) {
  const Bits sign = sign_of(a ^ b);
  const Bits infinity = infinity_of<Bits>();
  const Bits from = magnitude_of(a), by = magnitude_of(b);
  if (from >= infinity || by >= infinity || from == 0 || by == 0) {
    const bool undefined =
        is_nan_of(a) || is_nan_of(b) || (from == by && (from == 0 || from == infinity));
    return undefined ? nan_of<Bits>() : from == 0 || by == infinity ? sign : sign | infinity;
  }
  int exponent_a, exponent_b;
  const Bits from_a = normalized(a, exponent_a), from_b = normalized(b, exponent_b);
  const int exponent = exponent_a - exponent_b + Ieee<Bits>::kInfinity / 2;
  return rounded_of(sign, from_a < from_b ? exponent - 1 : exponent, divided(from_a, from_b));
}

// Bits in the order of the numbers; both zeros are the same.
template <class Bits>
inline typename Ieee<Bits>::Signed order_of(Bits a) {
  typedef typename Ieee<Bits>::Signed Signed;
  return sign_of(a) != 0 ? -Signed(magnitude_of(a)) : Signed(a);
}
template <class Bits>
inline bool less_of(Bits a, Bits b) {
  return !is_nan_of(a) && !is_nan_of(b) && order_of(a) < order_of(b);
}
template <class Bits>
inline bool equal_of(Bits a, Bits b) {
  return !is_nan_of(a) && order_of(a) == order_of(b);
}

// ---- from one size to the other ----------------------------------------------------------------------------------------

enum : int { kBiases = 1023 - 127 };

inline ulong widened(uint a) {
  const ulong sign = ulong(sign_of(a)) << 32;
  if (is_nan_of(a)) return nan_of<ulong>();
  if (exponent_of(a) == Ieee<uint>::kInfinity) return sign | infinity_of<ulong>();
  int exponent;
  const uint mantissa = normalized(a, exponent);
  if (mantissa == 0u) return sign;
  return sign | ulong(exponent + kBiases) << 52 | ulong(mantissa << 1) << 20;
}

inline uint narrowed(ulong a) {
  const uint sign = uint(sign_of(a) >> 32);
  if (is_nan_of(a)) return nan_of<uint>();
  const int exponent = exponent_of(a);
  if (exponent == Ieee<ulong>::kInfinity) return sign | infinity_of<uint>();
  if (exponent == 0) return sign;  // less than any fp32 number, or 0
  const ulong mantissa = shifted(fraction_of(a) | 1ul << 52, 52 - Ieee<uint>::kFirst);
  return rounded_of(sign, exponent - kBiases, uint(mantissa));
}

// ---- as the quantizer's rules write them -------------------------------------------------------------------------------

struct Float64;

struct Float32 {
  uint bits;
  Float32() = default;
  Float32(float value) : bits(as_type<uint>(value)) {}
  explicit Float32(int value) : bits(as_type<uint>(float(value))) {}
  explicit inline Float32(Float64 value);
  explicit operator int() const { return int(as_type<float>(bits)); }
};

struct Float64 {
  ulong bits;
  Float64() = default;
  explicit Float64(int value) : bits(widened(Float32(value).bits)) {}
  explicit Float64(Float32 value) : bits(widened(value.bits)) {}
};

inline Float32::Float32(Float64 value) : bits(narrowed(value.bits)) {}

inline uint float_bits(Float32 value) { return value.bits; }
inline Float32 bits_float(uint bits) {
  Float32 value;
  value.bits = bits;
  return value;
}
inline Float64 bits_double(ulong bits) {
  Float64 value;
  value.bits = bits;
  return value;
}
// Of |value| < 2^22; what the hardware may take for zero is rounded to zero anyway.
inline Float32 round_even(Float32 value) { return rint(as_type<float>(value.bits)); }

inline Float32 operator-(Float32 a) { return bits_float(negative_of(a.bits)); }
#define LOWBIT_OPERATORS(Float, make)                                                            \
  inline Float operator+(Float a, Float b) { return make(sum_of(a.bits, b.bits)); }              \
  inline Float operator-(Float a, Float b) { return make(sum_of(a.bits, negative_of(b.bits))); } \
  inline Float operator*(Float a, Float b) { return make(product_of(a.bits, b.bits)); }          \
  inline Float operator/(Float a, Float b) { return make(quotient_of(a.bits, b.bits)); }         \
  inline bool operator<(Float a, Float b) { return less_of(a.bits, b.bits); }                    \
  inline bool operator>(Float a, Float b) { return less_of(b.bits, a.bits); }                    \
  inline bool operator==(Float a, Float b) { return equal_of(a.bits, b.bits); }                  \
  inline bool operator!=(Float a, Float b) { return !equal_of(a.bits, b.bits); }                 \
  inline bool operator<=(Float a, Float b) { return a < b || a == b; }                           \
  inline bool operator>=(Float a, Float b) { return b < a || a == b; }
LOWBIT_OPERATORS(Float32, bits_float)
LOWBIT_OPERATORS(Float64, bits_double)
#undef LOWBIT_OPERATORS

}  // namespace lowbit
