// What a format's codes are: their bits, whether they are integers and, for kernels that decode code by code, the small
// floats in fp32. Those have their bits put where fp32 has its exponent; a multiplication by a power of two corrects the
// bias, of subnormals too.
#pragma once

#include <cstdint>

#include "common/enums.h"
#include "cuda/books.h"
#include "cuda/ptx.cuh"

namespace lowbit::cuda {

// Integer formats stand first in the enumeration, whose values never change.
constexpr bool is_integer(Format format) {
  return static_cast<int>(format) <= static_cast<int>(Format::kInt8);
}

constexpr int bits_of(Format format) {
  switch (format) {
    case Format::kInt2:
      return 2;
    case Format::kInt3:
      return 3;
    case Format::kInt5:
      return 5;
    case Format::kInt6:
      return 6;
    case Format::kInt8:
    case Format::kFp8E4m3:
    case Format::kFp8E5m2:
      return 8;
    default:
      return 4;
  }
}

__device__ inline float fp8_e4m3_value(uint32_t q) {
  const float value =
      ptx::mul_rn(ptx::bits_as_float((q & 0x80u) << 24 | (q & 0x7fu) << 20), 0x1p120f);
  return (q & 0x7fu) == 0x7fu ? ptx::bits_as_float(0x7fc00000u) : value;
}

// e5m2 is the upper byte of fp16.
__device__ inline float fp8_e5m2_value(uint32_t q) { return ptx::f16_to_float(q << 8); }

__device__ inline float fp4_e2m1_value(uint32_t q) {
  return ptx::mul_rn(ptx::bits_as_float((q & 8u) << 28 | (q & 7u) << 22), 0x1p126f);
}

// ---- scales of one byte ------------------------------------------------------------------------------------------------

// A power of two: the code is fp32's exponent field, but for 0, which is 2^-127, and 255, a NaN.
__device__ inline float e8m0_value(uint32_t q) {
  const uint32_t power = q == 0 ? 0x00400000u : q << 23;
  return ptx::bits_as_float(q == 255 ? 0x7fc00000u : power);
}

__device__ inline float dynamic8_value(uint32_t q) {
  static constexpr float half[127] = {
#include "formats/dynamic_half.inc"
  };
  if (q == 127) return 0.0f;
  if (q == 255) return 1.0f;
  return q > 127 ? half[q - 128] : -half[126 - q];
}

__device__ inline float scale_code_value(ScaleDtype dtype, uint32_t q) {
  switch (dtype) {
    case ScaleDtype::kE8m0:
      return e8m0_value(q);
    case ScaleDtype::kE4m3:
      return fp8_e4m3_value(q);
    case ScaleDtype::kUInt4:
    case ScaleDtype::kUInt6:
      return static_cast<float>(q);
    case ScaleDtype::kInt6:
      return static_cast<float>(static_cast<int32_t>(q) - 32);
    case ScaleDtype::kInt8:
      return static_cast<float>(static_cast<int32_t>(q) - 128);
    default:
      return dynamic8_value(q);
  }
}

}  // namespace lowbit::cuda
