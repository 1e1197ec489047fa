// The two 16-bit types that tensor cores multiply, as types that kernels are written over. Values travel as bits, two in
// a register (element 0 in the low half).
#pragma once

#include <cstdint>

#include "common/enums.h"
#include "cuda/ptx.cuh"

namespace lowbit::cuda {

// Both halves the same.
constexpr uint32_t twice(uint32_t half) { return half << 16 | half; }

// A number as a 16-bit type has it, rounded to nearest even, and back. Evaluated by the compiler only: tables of constants.
template <int kMantissaBits, int kBias>
constexpr uint32_t encode16(double value) {
  const uint32_t sign = value < 0 ? 0x8000u : 0u;
  double v = value < 0 ? -value : value;
  if (v == 0) return sign;
  int exponent = 0;  // v * 2^exponent; down to the subnormals', which have the field 1 - 1
  for (; v >= 2; v /= 2) ++exponent;
  for (; v < 1 && exponent > 1 - kBias; v *= 2) --exponent;
  const double scaled = v * (1 << kMantissaBits);
  uint32_t mantissa = static_cast<uint32_t>(scaled);
  const double rest = scaled - mantissa;
  if (rest > 0.5 || (rest == 0.5 && mantissa % 2 == 1)) ++mantissa;
  // The leading one of `mantissa` (none in a subnormal) adds itself to the exponent field, a carry too.
  return sign | ((static_cast<uint32_t>(exponent + kBias - 1) << kMantissaBits) + mantissa);
}
template <int kMantissaBits, int kBias>
constexpr double decode16(uint32_t bits) {
  const int field = static_cast<int>(bits >> kMantissaBits) & (2 * kBias + 1);
  double v = bits & ((1u << kMantissaBits) - 1u);
  if (field > 0) v += 1 << kMantissaBits;
  int exponent = (field > 0 ? field : 1) - kBias - kMantissaBits;
  for (; exponent > 0; --exponent) v *= 2;
  for (; exponent < 0; ++exponent) v /= 2;
  return bits & 0x8000u ? -v : v;
}

struct Float16 {
  static constexpr Element kElement = Element::kFloat16;
  static constexpr ScaleDtype kScaleDtype = ScaleDtype::kFloat16;
  static constexpr int kMantissaBits = 10;
  static constexpr uint32_t bits(double value) { return encode16<10, 15>(value); }
  static constexpr double value(uint32_t bits) { return decode16<10, 15>(bits); }

  static __device__ uint32_t fma(uint32_t a, uint32_t b, uint32_t c) {
    return ptx::fma_f16x2(a, b, c);
  }
  static __device__ uint32_t pack(float low, float high) { return ptx::pack_f16x2(low, high); }
  static __device__ float low(uint32_t pair) { return ptx::f16_to_float(pair); }
  static __device__ float high(uint32_t pair) { return ptx::f16_to_float(pair >> 16); }
  static __device__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    ptx::mma_f16(d, a, b0, b1);
  }
};

struct BFloat16 {
  static constexpr Element kElement = Element::kBFloat16;
  static constexpr ScaleDtype kScaleDtype = ScaleDtype::kBFloat16;
  static constexpr int kMantissaBits = 7;
  static constexpr uint32_t bits(double value) { return encode16<7, 127>(value); }
  static constexpr double value(uint32_t bits) { return decode16<7, 127>(bits); }

  static __device__ uint32_t fma(uint32_t a, uint32_t b, uint32_t c) {
    return ptx::fma_bf16x2(a, b, c);
  }
  static __device__ uint32_t pack(float low, float high) { return ptx::pack_bf16x2(low, high); }
  static __device__ float low(uint32_t pair) { return ptx::bits_as_float(pair << 16); }
  static __device__ float high(uint32_t pair) { return ptx::bits_as_float(pair & 0xffff0000u); }
  static __device__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    ptx::mma_bf16(d, a, b0, b1);
  }
};

// a * b and a + b for pairs, rounded once. A product that is zero keeps its sign: it is -0 that is added.
template <class T>
__device__ uint32_t multiply(uint32_t a, uint32_t b) {
  return T::fma(a, b, 0x80008000u);
}
template <class T>
__device__ uint32_t add(uint32_t a, uint32_t b) {
  return T::fma(a, twice(T::bits(1.0)), b);
}

}  // namespace lowbit::cuda
