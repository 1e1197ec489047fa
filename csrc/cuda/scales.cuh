// Scales, zeros and offsets of a group: out of shared memory into the registers of the lane that needs them. Lane
// l = 4g + t holds the rows g, g + 8, ..., g + 56 of a strip, two per fragment; they are neighbours in a row of scales
// (packing/cuda_tile64.h), at 8g .. 8g + 7.
#pragma once

#include <cstdint>

#include "cuda/codec/codec.cuh"
#include "cuda/params.h"

namespace lowbit::cuda {

inline constexpr int kLaneRows = 2 * kFragments;

// Which code meets which group: cells of 16 k lie in one group each. A division by way of a product, exact while
// (K / 16)^2 < 2^31; canonical shapes end far below.
class GroupOfCell {
 public:
  __device__ explicit GroupOfCell(const WeightParams& w)
      : only_(w.groups == 1),
        inverse_(only_ ? 0 : 0x7fffffffu / (static_cast<uint32_t>(w.group_size) / kCellK) + 1) {}
  __device__ int operator()(int cell) const {
    return only_ ? 0 : static_cast<int>(static_cast<uint64_t>(cell) * inverse_ >> 31);
  }

 private:
  bool only_;
  uint32_t inverse_;
};

// Rows of one group in shared memory.
struct GroupRows {
  const uint8_t* scales;
  const uint8_t* zeros;
};

// kCount neighbouring numbers of a row, the first at `position`, in fp32. `one` broadcasts the only one that there is.
template <int kCount>
__device__ void load_numbers(const uint8_t* row, int position, ScaleDtype dtype, bool one,
                             float (&to)[kCount]) {
  static_assert(kCount % 2 == 0, "16-bit numbers are loaded in pairs");
  if (dtype == ScaleDtype::kFloat32) {
    const float* from = reinterpret_cast<const float*>(row) + (one ? 0 : position);
#pragma unroll
    for (int j = 0; j < kCount; ++j) to[j] = from[one ? 0 : j];
    return;
  }
#pragma unroll
  for (int j = 0; j < kCount; j += 2) {
    uint32_t pair = *reinterpret_cast<const uint32_t*>(row + (one ? 0 : 2 * (position + j)));
    if (one) pair = ptx::prmt(pair, 0u, 0x1010u);
    const bool half = dtype == ScaleDtype::kFloat16;
    to[j] = half ? Float16::low(pair) : BFloat16::low(pair);
    to[j + 1] = half ? Float16::high(pair) : BFloat16::high(pair);
  }
}

// The eight 16-bit scales of a lane, each as a pair of itself.
__device__ inline void load_pairs(const uint8_t* row, int g, bool one,
                                  uint32_t (&to)[kLaneRows]) {
  const uint32_t* from = reinterpret_cast<const uint32_t*>(row) + (one ? 0 : 4 * g);
#pragma unroll
  for (int j = 0; j < kLaneRows; j += 2) {
    const uint32_t pair = from[one ? 0 : j / 2];
    to[j] = ptx::prmt(pair, 0u, 0x1010u);
    to[j + 1] = ptx::prmt(pair, 0u, one ? 0x1010u : 0x3232u);
  }
}

// What decode() subtracts: integer zeros of a lane's rows, or the format's own where there are none. Fractional zeros and
// offsets come later, in fp32: decode() then gives q itself.
template <Format kFormat, class T>
__device__ void load_zeros(const WeightParams& w, const uint8_t* row, int g,
                           uint32_t (&to)[kLaneRows]) {
  if constexpr (Codec<kFormat>::kInteger) {
    if (w.zero_kind == ZeroKind::kInt) {
      const uint2 bytes = *reinterpret_cast<const uint2*>(row + 8 * g);
#pragma unroll
      for (int j = 0; j < kLaneRows; ++j) {
        const uint32_t word = j < 4 ? bytes.x : bytes.y;
        to[j] = Codec<kFormat>::template zero<T>(word >> (8 * (j % 4)) & 0xffu);
      }
      return;
    }
    const uint32_t own = 1u << (Planes<kFormat>::kBits - 1);
    const uint32_t zero =
        Codec<kFormat>::template zero<T>(w.zero_kind == ZeroKind::kNone ? own : 0u);
#pragma unroll
    for (int j = 0; j < kLaneRows; ++j) to[j] = zero;
  }
}

// How a scale reaches the product.
enum class Scaling16 {
  kSums,    // codes are multiplied as they are, a group's fp32 sums by its scale: nothing is rounded
  kPairs,   // one multiplication in 16 bits: the exact product of code and scale, rounded once
  kFloats,  // the formula in fp32, rounded once: fractional zeros, offsets, scales of another type
};

__device__ inline bool has_fractions(const WeightParams& w) {
  return w.zero_kind == ZeroKind::kFloat || w.zero_kind == ZeroKind::kOffset;
}

// a *= scale in 16 bits. A code that 16 bits do not hold has a remainder, whose product is small enough for its own
// rounding not to matter.
template <Format kFormat, class T>
__device__ void scale_pairs(const typename Codec<kFormat>::Words& words, int fragment,
                            const uint32_t (&scales)[kLaneRows], uint32_t (&a)[4]) {
  if constexpr (Codec<kFormat>::kExact) {
#pragma unroll
    for (int r = 0; r < 4; ++r) a[r] = multiply<T>(a[r], scales[2 * fragment + r % 2]);
  } else {
    uint32_t rest[4];
    Codec<kFormat>::template decode_rest<T>(words, fragment, rest);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const uint32_t scale = scales[2 * fragment + r % 2];
      a[r] = T::fma(a[r], scale, multiply<T>(rest[r], scale));
    }
  }
}

// a = (a - zero) * scale, a * scale + offset or a * scale in fp32, every operation rounded as the CPU's. Constants are
// loaded where they are used: this is the road for rare combinations, and registers are dear.
template <Format kFormat, class T>
__device__ void scale_floats(const WeightParams& w, const typename Codec<kFormat>::Words& words,
                             int fragment, const GroupRows& rows, int g, uint32_t (&a)[4]) {
  const int position = 8 * g + 2 * fragment;
  float scale[2], third[2] = {0.0f, 0.0f};
  load_numbers(rows.scales, position, w.scale_dtype, w.one_scale, scale);
  if (has_fractions(w)) load_numbers(rows.zeros, position, w.scale_dtype, false, third);
  uint32_t rest[4] = {};
  if constexpr (!Codec<kFormat>::kExact)
    Codec<kFormat>::template decode_rest<T>(words, fragment, rest);

  const bool subtract = w.zero_kind == ZeroKind::kFloat;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const float minus = subtract ? third[r % 2] : 0.0f, plus = subtract ? 0.0f : third[r % 2];
    const auto weight = [&](float q, float remainder) {
      if constexpr (!Codec<kFormat>::kExact) q += remainder;
      if constexpr (Codec<kFormat>::kInteger) q = ptx::sub_rn(q, minus);
      q = ptx::mul_rn(q, scale[r % 2]);
      return Codec<kFormat>::kInteger ? ptx::add_rn(q, plus) : q;
    };
    a[r] = T::pack(weight(T::low(a[r]), T::low(rest[r])), weight(T::high(a[r]), T::high(rest[r])));
  }
}

}  // namespace lowbit::cuda
