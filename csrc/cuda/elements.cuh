// Single elements of tensors, for kernels that are bound by memory: sizes, conversions, alignment, division by a constant
// of the launch.
#pragma once

#include <cstdint>

#include "common/round_up.h"
#include "cuda/device.cuh"
#include "cuda/params.h"
#include "cuda/ptx.cuh"

namespace lowbit::cuda {

__host__ __device__ constexpr int scale_bytes(ScaleDtype type) {
  return type == ScaleDtype::kFloat32                                       ? 4
         : static_cast<int>(type) > static_cast<int>(ScaleDtype::kBFloat16) ? 1
                                                                            : 2;
}

__host__ __device__ constexpr Element element_of(ScaleDtype type) {
  return type == ScaleDtype::kFloat32   ? Element::kFloat32
         : type == ScaleDtype::kFloat16 ? Element::kFloat16
                                        : Element::kBFloat16;
}

// Whether every address of the form base + i * step is a multiple of `bytes`.
inline bool is_aligned(const void* base, int64_t step, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(base) % static_cast<uintptr_t>(bytes) == 0 &&
         step % bytes == 0;
}

// Element i of a float tensor, exact in fp32.
__device__ inline float load_element(const void* from, int64_t i, Element type) {
  if (type == Element::kFloat32) return static_cast<const float*>(from)[i];
  const uint32_t bits = static_cast<const uint16_t*>(from)[i];
  return type == Element::kFloat16 ? ptx::f16_to_float(bits) : ptx::bits_as_float(bits << 16);
}

// Two floats as a pair of 16-bit elements, ties to even. A NaN becomes the device's NaN, whatever its payload was.
__device__ inline uint32_t pack_pair(float low, float high, Element type) {
  return type == Element::kFloat16 ? ptx::pack_f16x2(low, high) : ptx::pack_bf16x2(low, high);
}

__device__ inline void store_element(float value, void* to, int64_t i, Element type) {
  if (type == Element::kFloat32) {
    static_cast<float*>(to)[i] = value;
  } else {
    static_cast<uint16_t*>(to)[i] = static_cast<uint16_t>(pack_pair(value, 0.0f, type));
  }
}

// n / divisor for n < 2^31 by a multiplication: a division costs 20 instructions, as much as decoding eight weights.
// (Granlund and Montgomery, "Division by invariant integers using multiplication", 1994.)
struct Divisor {
  uint32_t divisor, multiplier;
  int32_t shift;

  explicit Divisor(int64_t d) : divisor(static_cast<uint32_t>(d)), multiplier(0), shift(0) {
    while ((uint64_t{1} << shift) < divisor) ++shift;
    multiplier = static_cast<uint32_t>((((uint64_t{1} << shift) - divisor) << 32) / divisor + 1);
  }
  __device__ uint32_t quotient(uint32_t n) const {
    return (static_cast<uint32_t>((static_cast<uint64_t>(n) * multiplier) >> 32) + n) >> shift;
  }
};

}  // namespace lowbit::cuda
