// The end of a GEMM: bias in fp32, one rounding, and the store.
#pragma once

#include <cstdint>

#include "cuda/device.cuh"
#include "cuda/elements.cuh"
#include "cuda/params.h"

namespace lowbit::cuda {

// bias[n] in fp32; 0 where there is none, and past N.
__device__ inline float load_bias(const OutParams& y, int64_t n, int64_t N) {
  if (y.bias == nullptr || !inside(n, N)) return 0.0f;
  return load_element(y.bias, n, y.bias_type);
}
template <int kCount>
__device__ void load_bias(const OutParams& y, int64_t n, int64_t N, float (&bias)[kCount]) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) bias[j] = load_bias(y, n + j, N);
}

namespace detail {

// kCount words at once, where `to` is aligned for as many, up to 16 bytes.
template <int kCount>
__device__ void store_words(uint8_t* to, const uint32_t (&words)[kCount]) {
  if constexpr (kCount == 1) {
    *reinterpret_cast<uint32_t*>(to) = words[0];
  } else if constexpr (kCount == 2) {
    *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
  } else {
#pragma unroll
    for (int j = 0; j < kCount; j += 4)
      reinterpret_cast<uint4*>(to)[j / 4] =
          make_uint4(words[j], words[j + 1], words[j + 2], words[j + 3]);
  }
}

}  // namespace detail

// y[m, n .. n + kCount) = values + bias, rounded once; columns past N are left alone. Vectors where y's rows are aligned
// for them, which a view, or a ragged N, need not be.
template <int kCount>
__device__ void store_row(const OutParams& y, int64_t m, int64_t n, int64_t N, const float* values,
                          const float (&bias)[kCount]) {
  static_assert(kCount == 2 || kCount == 8, "a pair or a 16-byte vector of 16-bit elements");
  const bool wide = y.type == Element::kFloat32;
  const int64_t at = m * y.stride + n;
  uint8_t* const to = static_cast<uint8_t*>(y.data) + at * (wide ? 4 : 2);
  const uintptr_t vector = kCount == 8 ? 16 : wide ? 8 : 4;
  if (!inside(n + kCount - 1, N) || reinterpret_cast<uintptr_t>(to) % vector != 0) {
#pragma unroll(kCount == 2 ? 2 : 1)
    for (int j = 0; j < kCount; ++j) {
      if (inside(n + j, N))
        store_element(values[j] + load_bias(y, n + j, N), y.data, at + j, y.type);
    }
    return;
  }
  uint32_t words[kCount];
#pragma unroll
  for (int j = 0; j < kCount; ++j) words[j] = ptx::float_as_bits(values[j] + bias[j]);
  if (wide) {
    detail::store_words(to, words);
    return;
  }
  uint32_t pairs[kCount / 2];
#pragma unroll
  for (int j = 0; j < kCount / 2; ++j)
    pairs[j] =
        pack_pair(ptx::bits_as_float(words[2 * j]), ptx::bits_as_float(words[2 * j + 1]), y.type);
  detail::store_words(to, pairs);
}

}  // namespace lowbit::cuda
