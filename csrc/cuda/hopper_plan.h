// How the decode kernel for Hopper (kernels/hopper_stream.cuh) cuts a problem, and what a block has in shared memory: host
// and device.
//
// A block works on `strips` strips of 64 output rows and on some of their tiles of 128 k. A stage holds one tile of each of
// its strips, and x for the same k:
//
//   shared memory = memory barriers | stage 0 | stage 1 | ...
//   stage         = strip 0: codes, scales, zeros | strip 1 | ... | x, columns 0..63: [tokens][64] | x, columns 64..127
//
// so that the more strips a block has, the less often x is read; and blocks of a cluster share the K of their strips, so
// that they do not run out of tiles. The sums that warps, and then blocks, exchange lie over the stages.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/runtime.h"
#include "cuda/stages.h"

namespace lowbit::cuda {

struct HopperLayout {
  int32_t scales, zeros;  // bytes from the start of a strip's part of a stage
  int32_t strip_bytes;    // of that part
  int32_t copied;         // of a tile, in one copy: codes, and scales where they stand behind them
  int32_t groups;         // the most that a tile touches
  int32_t x;              // from the start of a stage
  int32_t stage_bytes;
  int32_t first_stage;  // from the start of shared memory
};

inline constexpr int kMostStages = 24;

constexpr int aligned_128(int bytes) { return (bytes + 127) / 128 * 128; }

// `Weight` is CudaTile64 or WeightParams.
template <class Weight>
constexpr HopperLayout hopper_layout(const Tile& tile, const Weight& w, int strips) {
  HopperLayout at{};
  const int codes = static_cast<int>(w.codes_bytes);
  const bool in_tile = w.groups_per_tile > 0;
  at.groups = w.groups == 1 ? 1 : step_groups(w.group_size, kTileK);
  at.copied = in_tile ? static_cast<int>(w.tile_bytes) : codes;
  at.scales = in_tile ? static_cast<int>(w.scales_offset) : codes;
  at.zeros = in_tile ? static_cast<int>(w.zeros_offset)
                     : codes + at.groups * static_cast<int>(w.scale_row_bytes);
  at.strip_bytes =
      aligned_128(in_tile ? at.copied : at.zeros + at.groups * static_cast<int>(w.zero_row_bytes));
  at.x = strips * at.strip_bytes;
  at.stage_bytes = at.x + tile.tokens * kTileK * 2;
  at.first_stage = aligned_128(2 * kMostStages * 8);
  return at;
}

// The sums of all warps lie over the stages, each [tokens][kPaddedRows].
constexpr int64_t hopper_shared_bytes(const Tile& tile, const HopperLayout& at, int stages) {
  return at.first_stage + std::max(int64_t{stages} * at.stage_bytes,
                                   int64_t{tile.warps()} * tile.tokens * kPaddedRows * 4);
}

// What selection decides beside the Schedule.
struct HopperPlan {
  int32_t strips;   // of a block: 1, 2 or 4
  int32_t cluster;  // blocks that share the K of their strips
  int32_t stages;
  int64_t shared_bytes;  // of a block
  int64_t
      in_flight;  // bytes of weights on their way to a multiprocessor while all its warps decode
  int32_t blocks_per_sm;
};

// A plan that is asked for; 0 strips: none is. Of a kernel of warpgroups, the two numbers are those of a BoxCluster.
struct HopperWish {
  int32_t strips = 0, cluster = 0;
};

// The plan that reads least. No strips: shared memory has no room for two stages, or the wish cannot be met.
HopperPlan plan_hopper(const Tile& tile, int64_t M, const CudaTile64& weight,
                       const DeviceInfo& device, const HopperWish& wish);
int64_t hopper_blocks(const Tile& tile, int64_t M, const CudaTile64& weight,
                      const HopperPlan& plan);

// Tiles of K of a block: [range(rank), range(rank + 1)).
constexpr int32_t hopper_range(int32_t tiles, int32_t cluster, int32_t rank) {
  return static_cast<int32_t>(int64_t{tiles} * rank / cluster);
}

}  // namespace lowbit::cuda
