// What the general kernels share: whole rows of a strip decoded by a warp, and the sum over its lanes.
//
// A warp has eight rows of W (g, g + 8, ..., g + 56 of a strip: one 16-byte vector of codes per lane) and kTokens rows of x.
#pragma once

#include <cstdint>

#include "cuda/launch.cuh"
#include "cuda/launchers.h"
#include "cuda/tile_reader.cuh"

namespace lowbit::cuda {

inline constexpr int kGeneralWarps = 4;
inline constexpr int kGeneralTokens = 4;  // 8 rows x 4 tokens: as many sums as lanes
// Of a grid; beyond, warps take several pieces of work.
inline constexpr int64_t kMostBlocks = int64_t{1} << 20;

inline Grid general_grid(int64_t warps) {
  const int64_t blocks = div_up(warps, kGeneralWarps);
  return {static_cast<uint32_t>(blocks < kMostBlocks ? blocks : kMostBlocks), 1, 1};
}
__device__ inline int64_t first_warp() {
  return static_cast<int64_t>(blockIdx.x) * kGeneralWarps + static_cast<int>(threadIdx.x) / 32;
}
__device__ inline int64_t all_warps() { return static_cast<int64_t>(gridDim.x) * kGeneralWarps; }

__device__ inline float exchange(float value, int mask) { return ptx::shuffle_xor(value, mask); }
__device__ inline int32_t exchange(int32_t value, int mask) {
  return static_cast<int32_t>(ptx::shuffle_xor(static_cast<uint32_t>(value), mask));
}

// One step of sum_over_lanes: half of the values stay here, half go to the lane across, which gives its other half.
template <int kHalf, class Value>
__device__ void fold(Value (&values)[32], int lane) {
  const bool upper = (lane & kHalf) != 0;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const Value given = upper ? values[i] : values[i + kHalf];
    const Value kept = upper ? values[i + kHalf] : values[i];
    values[i] = kept + exchange(given, kHalf);
  }
}

// 32 sums over 32 lanes with 31 exchanges: lane l gets the total of values[l], always added up in the same order.
template <class Value>
__device__ Value sum_over_lanes(Value (&values)[32], int lane) {
  fold<16>(values, lane);
  fold<8>(values, lane);
  fold<4>(values, lane);
  fold<2>(values, lane);
  fold<1>(values, lane);
  return values[0];
}

// The levels of a weight's code book, in the block's shared memory.
__device__ inline const float* shared_levels(const WeightParams& w) {
  float* levels = reinterpret_cast<float*>(dynamic_shared());
  if (threadIdx.x < 16) levels[threadIdx.x] = w.levels[threadIdx.x];
  ptx::sync_block();
  return levels;
}
inline constexpr int kLevelBytes = 16 * 4;

}  // namespace lowbit::cuda
