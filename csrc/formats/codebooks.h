// The decoded value of every code of the non-integer formats.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <limits>

namespace lowbit {

// Books of four bits whose levels follow no rule, ascending: the quantizer counts the midpoints below a number, and kernels look
// levels up, whichever book it is. Where the values come from stands in the files.
inline constexpr std::array<float, 16> kNf4Code = {
#include "formats/nf4.inc"
};
inline constexpr std::array<float, 16> kIq4NlCode = {
#include "formats/iq4_nl.inc"
};
inline constexpr std::array<float, 16> kBnbFp4Code = {
#include "formats/bnb_fp4.inc"
};

// FP4 E2M1 (OCP Microscaling Formats v1.0, 5.3.3): bit 3 is the sign.
inline constexpr std::array<float, 16> kFp4Code = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,
                                                   4.0f,  6.0f,  -0.0f, -0.5f, -1.0f, -1.5f,
                                                   -2.0f, -3.0f, -4.0f, -6.0f};

// A sign bit, `exponent_bits` and `mantissa_bits`, IEEE-style subnormals. E4M3 (OCP OFP8 v1.0) has no infinity and
// one NaN per sign (all ones); E5M2 has both, as IEEE.
template <int kExponentBits, int kMantissaBits, bool kIeee>
std::array<float, 256> make_fp8_code() {
  static_assert(kExponentBits + kMantissaBits == 7, "fp8 has a sign and seven bits");
  constexpr int bias = (1 << (kExponentBits - 1)) - 1;
  constexpr int top = (1 << kExponentBits) - 1;
  std::array<float, 256> code{};
  for (int q = 0; q < 256; ++q) {
    const int exponent = (q >> kMantissaBits) & top;
    const int mantissa = q & ((1 << kMantissaBits) - 1);
    float value;
    if (kIeee && exponent == top) {
      value = mantissa == 0 ? std::numeric_limits<float>::infinity()
                            : std::numeric_limits<float>::quiet_NaN();
    } else if (!kIeee && (q & 0x7f) == 0x7f) {
      value = std::numeric_limits<float>::quiet_NaN();
    } else if (exponent == 0) {
      value = std::ldexp(static_cast<float>(mantissa), 1 - bias - kMantissaBits);
    } else {
      value = std::ldexp(static_cast<float>(mantissa + (1 << kMantissaBits)),
                         exponent - bias - kMantissaBits);
    }
    code[static_cast<size_t>(q)] = (q & 0x80) ? -value : value;
  }
  return code;
}

inline const std::array<float, 256>& fp8_e4m3_code() {
  static const std::array<float, 256> code = make_fp8_code<4, 3, false>();
  return code;
}

inline const std::array<float, 256>& fp8_e5m2_code() {
  static const std::array<float, 256> code = make_fp8_code<5, 2, true>();
  return code;
}

// The positive half of the dynamic map of bitsandbytes (Dettmers 2016, arXiv 1511.04561): 2^i numbers in each decade
// 10^(i-7) .. 10^(i-6), as its writers round them to fp32.
inline constexpr std::array<float, 127> kDynamicHalf = {
#include "formats/dynamic_half.inc"
};

// The negatives, 0, the positives, 1.
inline const std::array<float, 256>& dynamic8_code() {
  static const std::array<float, 256> code = [] {
    std::array<float, 256> all{};
    for (size_t i = 0; i < kDynamicHalf.size(); ++i) {
      all[128 + i] = kDynamicHalf[i];
      all[126 - i] = -kDynamicHalf[i];
    }
    all[255] = 1.0f;
    return all;
  }();
  return code;
}

// Powers of two: 2^(u - 127), 255 is NaN (OCP MX).
inline const std::array<float, 256>& e8m0_code() {
  static const std::array<float, 256> code = [] {
    std::array<float, 256> all{};
    for (int u = 0; u < 255; ++u) all[static_cast<size_t>(u)] = std::ldexp(1.0f, u - 127);
    all[255] = std::numeric_limits<float>::quiet_NaN();
    return all;
  }();
  return code;
}

// Integers from kLow on.
template <int kCount, int kLow>
const float* integer_code() {
  static const std::array<float, kCount> code = [] {
    std::array<float, kCount> all{};
    for (int q = 0; q < kCount; ++q) all[static_cast<size_t>(q)] = static_cast<float>(q + kLow);
    return all;
  }();
  return code.data();
}

}  // namespace lowbit
