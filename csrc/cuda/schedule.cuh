// A block's side of a Schedule (params.h): which pieces of which tiles are its own, and how a tile that several blocks
// work on becomes one sum.
//
// Every block of a kernel maps the elements of a tile to its threads in the same way, so a partial sum is stored and
// loaded by thread: value j of thread i at [j][i], one coalesced access per warp. Nobody waits for anybody: whichever
// block brings the last piece adds all of them up, its own from memory as well, in the order of K. The bits therefore do
// not depend on who that is.
#pragma once

#include <cstdint>

#include "cuda/device.cuh"
#include "cuda/ptx.cuh"
#include "cuda/schedule.h"

namespace lowbit::cuda {

// Steps [first, last) of a tile.
struct Segment {
  int32_t tile_n, tile_m;
  int32_t first, last;
  uint32_t tile;
  bool whole;  // all of the tile's steps
};

// Walks over the segments of one block.
class Share {
 public:
  __device__ Share(const Schedule& s, uint32_t block)
      : s_(s), step_(range_begin(s, block)), end_(range_begin(s, block + 1)) {}

  // False when the block's range is done.
  __device__ bool next(Segment& segment) {
    if (step_ >= end_) return false;
    const uint32_t steps = static_cast<uint32_t>(s_.steps_per_tile);
    const uint32_t tile = step_ / steps, begin = tile * steps;
    const uint32_t last = end_ - begin < steps ? end_ - begin : steps;
    segment.tile = tile;
    segment.tile_m = static_cast<int32_t>(tile / static_cast<uint32_t>(s_.tiles_n));
    segment.tile_n = static_cast<int32_t>(tile % static_cast<uint32_t>(s_.tiles_n));
    segment.first = static_cast<int32_t>(step_ - begin);
    segment.last = static_cast<int32_t>(last);
    segment.whole = segment.first == 0 && last == steps;
    step_ = begin + last;
    return true;
  }

 private:
  const Schedule& s_;
  uint32_t step_, end_;
};

// Where block b keeps its part of the tile that begins at step `begin`. A range cuts at most two tiles: the one in whose
// middle it begins, and the one in whose middle it ends.
__device__ inline float* partial_slot(const Schedule& s, uint32_t block, uint32_t begin,
                                      int values) {
  const uint32_t slot = 2 * block + (range_begin(s, block) <= begin ? 1 : 0);
  return s.partials + int64_t{slot} * values;
}

// Calls f(value, j) for all values of an array of any shape, j = 0, 1, ...
template <class F>
__device__ void for_each_value(float& value, int j, F f) {
  f(value, j);
}
template <class Element, int kCount, class F>
__device__ void for_each_value(Element (&values)[kCount], int j, F f) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) for_each_value(values[i], j * kCount + i, f);
}

template <class Values>
__device__ constexpr int value_count(const Values&) {
  return static_cast<int>(sizeof(Values) / sizeof(float));
}

// The first `used` values of each row of an array, where a tile is narrower than its registers: four of each row at a time.
template <int kRows, int kCount>
struct FirstValues {
  float (&values)[kRows][kCount];
  int used;
};
template <int kRows, int kCount, class F>
__device__ void for_each_value(const FirstValues<kRows, kCount>& first, int, F f) {
  static_assert(kCount % 4 == 0);
#pragma unroll
  for (int j = 0; j < kCount; j += 4) {
    if (j < first.used) {
#pragma unroll
      for (int k = 0; k < 4 * kRows; ++k) f(first.values[k / 4][j + k % 4], j * kRows + k);
    }
  }
}
template <int kRows, int kCount>
__device__ int value_count(const FirstValues<kRows, kCount>& first) {
  return kRows * first.used;
}

// Turns a block's part of a shared tile, an array of fp32 in each of kThreads threads, into the tile's sum. True in all
// threads of the one block that then holds it; the other blocks are done with the tile. The block's first kThreads threads
// call it, with one word of shared memory that nothing else uses meanwhile, and meet at barrier kBarrier: 0 where they are
// all of the block.
template <int kThreads, int kBarrier = 0, class Values>
__device__ bool sum_segments(const Schedule& s, const Segment& segment, uint32_t block,
                             Values& values, uint32_t* elected) {
  const int tile_values = kThreads * value_count(values);
  const int thread = static_cast<int>(threadIdx.x);
  const uint32_t begin = segment.tile * static_cast<uint32_t>(s.steps_per_tile);
  const uint32_t end = begin + static_cast<uint32_t>(s.steps_per_tile);
  // The neighbours that share the tile are few.
  uint32_t first = block, last = block;
#pragma unroll 1
  while (range_begin(s, first) > begin) --first;
#pragma unroll 1
  while (range_begin(s, last + 1) < end) ++last;

  float* const own = partial_slot(s, block, begin, tile_values) + thread;
  for_each_value(values, 0, [&](float& v, int j) { own[j * kThreads] = v; });

  ptx::fence_device();  // the stores above come before the count below, for whoever sees the count
  ptx::sync_some<kBarrier, kThreads>();
  if (thread == 0) {
    const uint32_t before = ptx::atomic_increment(s.counters + segment.tile);
    *elected = before == last - first ? 1u : 0u;
    if (*elected) s.counters[segment.tile] = 0;  // as it was found
  }
  ptx::sync_some<kBarrier, kThreads>();
  const bool mine = *elected != 0;
  ptx::sync_some<kBarrier, kThreads>();  // the word may be used again
  if (!mine) return false;
  ptx::fence_device();

  for_each_value(values, 0, [](float& v, int) { v = 0.0f; });
  for (uint32_t b = first; b <= last; ++b) {
    const float* const part = partial_slot(s, b, begin, tile_values) + thread;
    for_each_value(values, 0, [&](float& v, int j) { v += part[j * kThreads]; });
  }
  return true;
}

}  // namespace lowbit::cuda
