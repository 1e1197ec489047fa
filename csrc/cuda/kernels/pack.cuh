// What pack and unpack share: one block per tile of 64 rows x 128 k (packing/cuda_tile64.h), its part of the canonical bit
// stream staged in shared memory, so that both sides of the copy are read and written in the order of their addresses.
//
//   stage   [64 rows][16 * bits bytes, 4 more]     4 more bytes put the eight rows that a warp reads into other banks,
//                                                  and let a pair of codes be read as two bytes at the end of a row
//
// Two codes of neighbouring k (even k first) never span more than two bytes: 2 * bits * i bits into a row, 2 * bits long.
#pragma once

#include <cstdint>

#include "cuda/elements.cuh"
#include "cuda/launch.cuh"
#include "cuda/launchers.h"
#include "packing/cuda_tile64.h"

namespace lowbit::cuda {

inline constexpr int kPackThreads = 128;

// The planes of a format, as CudaTile64 lays them.
template <int kBits>
struct BitPlanes {
  static constexpr int kLow = low_plane_bits(kBits);
  static constexpr int kHigh = kBits - kLow;
  static constexpr int kHighOffset = 1024 * kLow;  // bytes from the start of the tile
};

template <int kBits>
struct Stage {
  static constexpr int kRowBytes = 16 * kBits;
  static constexpr int kStride = kRowBytes + 4;
  static constexpr int kBytes = kStripRows * kStride;
};

// Which strip a block works on, and what: a tile, or (index == w.tiles) the strip's table of scales.
struct PackPlace {
  int64_t strip;
  int32_t index;
};
__device__ inline PackPlace pack_place(const WeightParams& w) {
  const uint32_t per_strip = static_cast<uint32_t>(w.tiles + (w.groups_per_tile == 0 ? 1 : 0));
  return {blockIdx.x / per_strip, static_cast<int32_t>(blockIdx.x % per_strip)};
}
inline Grid pack_grid(const WeightParams& w) {
  const int64_t per_strip = w.tiles + (w.groups_per_tile == 0 ? 1 : 0);
  const int64_t blocks = per_strip * w.strips;
  LOWBIT_CHECK(blocks < (int64_t{1} << 31), "pack: N=", w.N, " K=", w.K,
               " is too large for one launch");
  return {static_cast<uint32_t>(blocks), 1, 1};
}

// Rows of scales (zeros) of a strip: groups [first, first + count) stand in order behind `offset`, in elements of `size`
// bytes. What pack writes there and unpack reads.
struct Table {
  int64_t offset;  // from the start of the strip
  int32_t first, count;
  int32_t row_bytes;  // from one group to the next
};
__device__ inline Table table_of(const WeightParams& w, int32_t index, int64_t offset,
                                 int32_t row_bytes) {
  if (w.groups_per_tile == 0) return {offset, 0, w.groups, row_bytes};
  return {index * static_cast<int64_t>(w.tile_bytes) + offset, index * w.groups_per_tile,
          w.groups_per_tile, row_bytes};
}

__device__ inline void copy_bytes(uint8_t* to, const uint8_t* from, int bytes) {
  if (bytes == 4) {
    *reinterpret_cast<uint32_t*>(to) = *reinterpret_cast<const uint32_t*>(from);
  } else if (bytes == 2) {
    *reinterpret_cast<uint16_t*>(to) = *reinterpret_cast<const uint16_t*>(from);
  } else {
    *to = *from;
  }
}

// perm travels unchanged.
static __global__ void __launch_bounds__(256)
    copy_perm_kernel(const int32_t* from, int32_t* to, int64_t count) {
  const int64_t i = blockIdx.x * int64_t{256} + threadIdx.x;
  if (inside(i, count)) to[i] = from[i];
}
inline void copy_perm(const char* name, const int32_t* from, int32_t* to, int64_t count,
                      Stream stream) {
  launch(name, copy_perm_kernel, Grid{static_cast<uint32_t>(div_up(count, 256)), 1, 1}, 256, 0,
         stream, from, to, count);
}

// Calls action.template run<bits>() for the width of the format.
template <class Action>
void with_bits(int bits, const Action& action) {
  switch (bits) {
    case 4:
      return action.template run<4>();
    case 8:
      return action.template run<8>();
    case 3:
      return action.template run<3>();
#if !defined(LOWBIT_EMULATOR_ONE_FORMAT)
    case 2:
      return action.template run<2>();
    case 5:
      return action.template run<5>();
    case 6:
      return action.template run<6>();
#endif
    default:
      fail("no kernel for codes of ", bits, " bits in this build");
  }
}

}  // namespace lowbit::cuda
