// What a format's codes are: their bits, whether they are integers and, for kernels that decode code by code, the small
// floats in fp32. Those have their bits put where fp32 has its exponent; a multiplication by a power of two corrects the
// bias, of subnormals too.
#pragma once

#include <cstdint>

#include "common/enums.h"
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

}  // namespace lowbit::cuda
