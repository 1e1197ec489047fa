// The end of a GEMM: bias in fp32, one rounding, and the store.
#pragma once

#include <cstdint>

#include "cuda/device.cuh"
#include "cuda/float16.cuh"
#include "cuda/params.h"

namespace lowbit::cuda {

// Adds bias[n .. n + kCount) in fp32, where n + j < N.
template <int kCount>
__device__ void add_bias(const OutParams& y, int64_t n, int64_t N, float (&values)[kCount]) {
  if (y.bias == nullptr) return;
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    if (!inside(n + j, N)) continue;
    if (y.bias_type == Element::kFloat32) {
      values[j] += static_cast<const float*>(y.bias)[n + j];
    } else {
      const uint32_t bits = static_cast<const uint16_t*>(y.bias)[n + j];
      values[j] += y.bias_type == Element::kFloat16 ? Float16::low(bits) : BFloat16::low(bits);
    }
  }
}

namespace detail {

// Whether kBytes can be stored at once.
template <int kBytes>
__device__ bool is_aligned(const void* to) {
  return reinterpret_cast<uintptr_t>(to) % kBytes == 0;
}

template <int kCount>
__device__ void store_words(void* to, const uint32_t (&words)[kCount]) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4 || kCount == 8, "whole vectors");
  if constexpr (kCount == 1) {
    *static_cast<uint32_t*>(to) = words[0];
  } else if constexpr (kCount == 2) {
    *static_cast<uint2*>(to) = make_uint2(words[0], words[1]);
  } else {
#pragma unroll
    for (int j = 0; j < kCount; j += 4)
      static_cast<uint4*>(to)[j / 4] = make_uint4(words[j], words[j + 1], words[j + 2], words[j + 3]);
  }
}

// y[m, n .. n + kCount) as fp32.
template <int kCount>
__device__ void store_floats(const OutParams& y, int64_t m, int64_t n, int64_t N,
                             const float (&values)[kCount]) {
  float* to = static_cast<float*>(y.data) + m * y.stride + n;
  constexpr int vector = kCount * 4 < 16 ? kCount * 4 : 16;
  if (inside(n + kCount - 1, N) && is_aligned<vector>(to)) {
    uint32_t words[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) words[j] = ptx::float_as_bits(values[j]);
    store_words(to, words);
    return;
  }
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    if (inside(n + j, N)) to[j] = values[j];
  }
}

template <int kCount>
__device__ void store_halves(const OutParams& y, int64_t m, int64_t n, int64_t N,
                             const float (&values)[kCount]) {
  uint16_t* to = static_cast<uint16_t*>(y.data) + m * y.stride + n;
  uint32_t pairs[kCount / 2];
  const bool is_half = y.type == Element::kFloat16;
#pragma unroll
  for (int j = 0; j < kCount / 2; ++j)
    pairs[j] = is_half ? Float16::pack(values[2 * j], values[2 * j + 1])
                       : BFloat16::pack(values[2 * j], values[2 * j + 1]);
  if (inside(n + kCount - 1, N) && is_aligned<kCount * 2>(to)) {
    store_words(to, pairs);
    return;
  }
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    if (inside(n + j, N)) to[j] = static_cast<uint16_t>(pairs[j / 2] >> (16 * (j % 2)));
  }
}

}  // namespace detail

// y[m, n .. n + kCount) = values + bias, rounded once. Columns past N are left alone; one vector where y's rows are
// aligned for it, which a ragged N or a view need not be.
template <int kCount>
__device__ void store_row(const OutParams& y, int64_t m, int64_t n, int64_t N,
                          float (&values)[kCount]) {
  static_assert(kCount % 2 == 0 && kCount <= 8, "pairs of 16 bits, at most one vector of them");
  add_bias(y, n, N, values);
  if (y.type == Element::kFloat32) {
    detail::store_floats(y, m, n, N, values);
  } else {
    detail::store_halves(y, m, n, N, values);
  }
}

}  // namespace lowbit::cuda
