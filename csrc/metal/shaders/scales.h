// Scales that are codes: what they stand for. The only place that knows.
#pragma once

#include "metal/shaders/numbers.h"

namespace lowbit {

// bitsandbytes' dynamic map of 256 numbers: the upper half, from the 128th on.
constant constexpr float kDynamicHalf[127] = {
#include "formats/dynamic_half.inc"
};

inline float dynamic8_value(uint code) {
  if (code == 127u) return 0.0f;
  if (code == 255u) return 1.0f;
  return code > 127u ? kDynamicHalf[code - 128u] : -kDynamicHalf[126u - code];
}

// A power of two: the code is fp32's exponent field, but for 0, which is 2^-127, and 255, a NaN.
inline float e8m0_value(uint code) {
  return as_type<float>(code == 0u ? 0x00400000u : code == 255u ? 0x7fc00000u : code << 23);
}

inline float scale_code_value(uint code, ScaleDtype dtype) {
  switch (dtype) {
    case ScaleDtype::kE8m0:
      return e8m0_value(code);
    case ScaleDtype::kE4m3:
      return fp8_e4m3_value(code);
    case ScaleDtype::kInt6:
      return float(int(code) - 32);
    case ScaleDtype::kInt8:
      return float(int(code) - 128);
    case ScaleDtype::kDynamic8:
      return dynamic8_value(code);
    default:
      return float(code);
  }
}

}  // namespace lowbit
