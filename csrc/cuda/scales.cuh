// Scales, zeros and offsets of a group: out of shared memory into the registers of the lane that needs them. Lane
// l = 4g + t holds the rows g, g + 8, ..., g + 56 of a strip, two per fragment; they are neighbours in a row of scales
// (packing/cuda_tile64.h), at 8g .. 8g + 7.
#pragma once

#include <cstdint>

#include "cuda/codec/codec.cuh"
#include "cuda/params.h"

namespace lowbit::cuda {

inline constexpr int kLaneRows = 2 * kFragments;

// Which group a cell of 16 k lies in: a division by way of a product, exact while (K / 16)^2 < 2^31. Wider matrices have
// strips beyond what 32 bits of offset can reach anyway.
class GroupOfCell {
 public:
  __device__ explicit GroupOfCell(const WeightParams& w)
      : cells_(w.groups == 1 ? 0x7fffffff : w.group_size / kCellK),
        inverse_(0x7fffffffu / static_cast<uint32_t>(cells_) + 1) {}
  __device__ int operator()(int cell) const {
    return static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(cell)) * inverse_ >> 31);
  }
  // Cells from this one to the end of its group.
  __device__ int left(int cell, int group) const { return (group + 1) * cells_ - cell; }

 private:
  int cells_;  // of a group
  uint32_t inverse_;
};

// Rows of one group in shared memory.
struct GroupRows {
  const uint8_t* scales;
  const uint8_t* zeros;
};

// Only fp8 weights have 128x128 blocks, whose rows are one number for all. Asking the format first keeps the question out
// of all other kernels.
template <Format kFormat>
__device__ bool is_block(const WeightParams& w) {
  return (kFormat == Format::kFp8E4m3 || kFormat == Format::kFp8E5m2) && w.one_scale;
}

// Two neighbouring numbers of a row, the first at `position`, in fp32; of a block's row, its number twice.
__device__ inline float2 load_two(const uint8_t* row, int position, ScaleDtype dtype, bool block) {
  if (dtype == ScaleDtype::kFloat32) {
    const float* from = reinterpret_cast<const float*>(row) + (block ? 0 : position);
    return make_float2(from[0], from[block ? 0 : 1]);
  }
  const uint32_t stored = *reinterpret_cast<const uint32_t*>(row + (block ? 0 : 2 * position));
  const uint32_t pair = block ? ptx::prmt(stored, 0u, 0x1010u) : stored;
  const bool half = dtype == ScaleDtype::kFloat16;
  return make_float2(half ? Float16::low(pair) : BFloat16::low(pair),
                     half ? Float16::high(pair) : BFloat16::high(pair));
}

// The eight numbers of a lane in fp32.
template <Format kFormat>
__device__ void load_eight(const WeightParams& w, const uint8_t* row, int g,
                           float (&to)[kLaneRows]) {
  if (is_block<kFormat>(w)) {
    const float2 all = load_two(row, 0, w.scale_dtype, true);
#pragma unroll
    for (int j = 0; j < kLaneRows; ++j) to[j] = all.x;
  } else if (w.scale_dtype == ScaleDtype::kFloat32) {
    const float4* from = reinterpret_cast<const float4*>(row + 32 * g);
    const float4 low = from[0], high = from[1];
    const float all[kLaneRows] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int j = 0; j < kLaneRows; ++j) to[j] = all[j];
  } else {
    const uint4 v = *reinterpret_cast<const uint4*>(row + 16 * g);
    const uint32_t pairs[kLaneRows / 2] = {v.x, v.y, v.z, v.w};
    const bool half = w.scale_dtype == ScaleDtype::kFloat16;
#pragma unroll
    for (int j = 0; j < kLaneRows; j += 2) {
      to[j] = half ? Float16::low(pairs[j / 2]) : BFloat16::low(pairs[j / 2]);
      to[j + 1] = half ? Float16::high(pairs[j / 2]) : BFloat16::high(pairs[j / 2]);
    }
  }
}

// The eight 16-bit scales of a lane, each as a pair of itself.
__device__ inline void load_pairs(const uint8_t* row, int g, bool block,
                                  uint32_t (&to)[kLaneRows]) {
  if (block) {
    const uint32_t all = twice(*reinterpret_cast<const uint16_t*>(row));
#pragma unroll
    for (int j = 0; j < kLaneRows; ++j) to[j] = all;
    return;
  }
  const uint4 v = *reinterpret_cast<const uint4*>(row + 16 * g);
  const uint32_t pairs[kLaneRows / 2] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int j = 0; j < kLaneRows; ++j)
    to[j] = ptx::prmt(pairs[j / 2], 0u, j % 2 == 0 ? 0x1010u : 0x3232u);
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

// The same of a warp that has kCount of a strip's fragments; `row` is that of its first one.
template <int kCount>
__device__ void load_some_pairs(const uint8_t* row, int g, bool block, uint32_t (&to)[kLaneRows]) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    const uint32_t pair = *reinterpret_cast<const uint32_t*>(row + (block ? 0 : 16 * g + 4 * j));
    to[2 * j] = ptx::prmt(pair, 0u, 0x1010u);
    to[2 * j + 1] = ptx::prmt(pair, 0u, block ? 0x1010u : 0x3232u);
  }
}
template <Format kFormat, class T, int kCount>
__device__ void load_some_zeros(const uint8_t* row, int g, uint32_t (&to)[kLaneRows]) {
  if constexpr (Codec<kFormat>::kInteger) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const uint32_t pair = *reinterpret_cast<const uint16_t*>(row + 8 * g + 2 * j);
      to[2 * j] = Codec<kFormat>::template zero<T>(pair & 0xffu);
      to[2 * j + 1] = Codec<kFormat>::template zero<T>(pair >> 8);
    }
  }
}

// How a scale reaches the product.
enum class Scaling16 {
  kSums,   // codes are multiplied as they are, a group's fp32 sums by its scale: nothing is rounded
  kPairs,  // one multiplication in 16 bits: the exact product of code and scale, rounded once
  kFloats,  // the formula in fp32, rounded once: fractional zeros, offsets, scales of another type
};

__device__ inline bool has_fractions(const WeightParams& w) {
  return w.zero_kind == ZeroKind::kFloat || w.zero_kind == ZeroKind::kOffset;
}

// For weights that are scaled before they are multiplied.
template <class T>
__device__ Scaling16 scaling_before(const WeightParams& w) {
  return w.scale_dtype == T::kScaleDtype && !has_fractions(w) ? Scaling16::kPairs
                                                              : Scaling16::kFloats;
}

// a *= scale in 16 bits. A code that 16 bits do not hold has a remainder, whose product is small enough for its own
// rounding not to matter.
template <Format kFormat, class T>
__device__ void scale_pairs(const WeightParams& w, const typename Codec<kFormat>::Words& words,
                            int fragment, const uint32_t (&scales)[kLaneRows], uint32_t (&a)[4]) {
  if constexpr (Codec<kFormat>::kExact) {
#pragma unroll
    for (int r = 0; r < 4; ++r) a[r] = multiply<T>(a[r], scales[2 * fragment + r % 2]);
  } else {
    uint32_t rest[4];
    Codec<kFormat>::template decode_rest<T>(w, words, fragment, rest);
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
  constexpr bool integer = Codec<kFormat>::kInteger, exact = Codec<kFormat>::kExact;
  const int position = 8 * g + 2 * fragment;
  const float2 scale = load_two(rows.scales, position, w.scale_dtype, is_block<kFormat>(w));
  float2 minus = make_float2(0.0f, 0.0f), plus = minus;
  if (integer && has_fractions(w)) {
    const float2 third = load_two(rows.zeros, position, w.scale_dtype, false);
    (w.zero_kind == ZeroKind::kFloat ? minus : plus) = third;
  }
  uint32_t rest[4] = {};
  if constexpr (!exact) Codec<kFormat>::template decode_rest<T>(w, words, fragment, rest);
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const auto weight = [&](float q, float remainder) {
      if constexpr (!exact) q += remainder;
      if constexpr (integer) q = ptx::sub_rn(q, r % 2 == 0 ? minus.x : minus.y);
      q = ptx::mul_rn(q, r % 2 == 0 ? scale.x : scale.y);
      return integer ? ptx::add_rn(q, r % 2 == 0 ? plus.x : plus.y) : q;
    };
    a[r] = T::pack(weight(T::low(a[r]), T::low(rest[r])), weight(T::high(a[r]), T::high(rest[r])));
  }
}

}  // namespace lowbit::cuda
