// What a step takes of shared memory in the kernels of warpgroups (kernels/hopper.cuh), and how many steps fit: host and
// device. A step is a tile of the weight layout: 128 k.
//
//   stage = boxes of x, [tokens][128 bytes] each, swizzled | strips, each a tile as it is in memory: codes, scales, zeros
//   block = stages, each at a multiple of 1024 | full and empty barriers of the stages | a word | sums on their way to y
//
// Where scales do not fit tiles (packing/cuda_tile64.h), the rows of the groups that the step touches stand behind the codes.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/stages.h"
#include "cuda/tensor_map.h"
#include "cuda/tiles.h"
#include "cuda/wgmma_widths.h"
#include "packing/cuda_tile64.h"

namespace lowbit::cuda {

inline constexpr int kWarpgroup = 128;  // threads

struct BoxStage {
  int32_t tokens;         // of the tile
  int32_t columns;        // the number of its wgmma (wgmma_widths.h)
  int32_t box;            // bytes of its x, 128 wide
  int32_t weights;        // bytes from the stage's start to its first strip
  int32_t strip;          // from one strip to the next
  int32_t scales, zeros;  // from a strip's start
  int32_t bytes;          // of the stage
  int32_t groups;         // the most that a step touches
};

constexpr int boxes(const Tile& tile) { return tile.step * x_bytes(tile) / kBoxBytes; }

constexpr bool is_of_integers(const Tile& tile) { return tile.kernel == Kernel::kHopperA8Int; }

// Blocks of a cluster that have the same tokens, and others' rows; and the other way around. Each of those that share
// something copies its part of it, for all of them: of x its part of the tokens, of weights its strips.
struct BoxCluster {
  int32_t rows = 1, tokens = 1;

  constexpr int32_t blocks() const { return rows * tokens; }
};

// Tokens of a tile: as few tiles as there can be, in whole clusters, each as narrow as it can be. The parts of those who share
// it are swizzling patterns of eight rows, or several.
constexpr int fitted_tokens(const Tile& tile, int64_t M, const BoxCluster& cluster) {
  const int64_t most = int64_t{cluster.tokens} * tile.tokens;
  const int64_t tiles = std::max<int64_t>((M + most - 1) / most, 1) * cluster.tokens;
  const bool integers = is_of_integers(tile);
  int columns = columns_for(integers, tile.tokens, static_cast<int>((M + tiles - 1) / tiles));
  while (columns % (8 * cluster.rows) != 0) columns = next_columns(integers, columns);
  return columns;
}

// `Weight` is CudaTile64 or WeightParams.
template <class Weight>
constexpr BoxStage box_stage(const Tile& tile, int tokens, const Weight& w) {
  BoxStage stage{};
  stage.tokens = tokens;
  stage.columns = columns_number(is_of_integers(tile), tile.tokens, tokens);
  stage.box = tokens * kBoxBytes;
  const int scale_row = static_cast<int>(w.scale_row_bytes);
  const int zero_row = static_cast<int>(w.zero_row_bytes);
  stage.weights = boxes(tile) * stage.box;
  if (w.groups_per_tile != 0) {
    stage.groups = w.groups_per_tile;
    stage.strip = static_cast<int32_t>(w.tile_bytes);
    stage.scales = static_cast<int32_t>(w.scales_offset);
    stage.zeros = static_cast<int32_t>(w.zeros_offset);
  } else {
    stage.groups = w.groups == 1 ? 1 : step_groups(w.group_size, tile.step);
    stage.scales = w.codes_bytes;
    stage.zeros = stage.scales + stage.groups * scale_row;
    stage.strip = stage.zeros + stage.groups * zero_row;
  }
  const int bytes = stage.weights + tile.rows / kStripRows * stage.strip;
  stage.bytes = (bytes + 1023) / 1024 * 1024;
  return stage;
}

// Behind the stages.
inline constexpr int kMostBoxStages = 16;
inline constexpr int kBarrierBytes = 2 * kMostBoxStages * 8;  // full, then empty
inline constexpr int kElectionBytes = 16;

// A warp turns its sums around 16 / fragments tokens at a time: [tokens][16 * fragments rows], with padding.
constexpr int box_fragments(const Tile& tile) { return tile.rows / (16 * tile.warps_n); }
constexpr int turned_floats(int fragments) { return 16 / fragments * (16 * fragments + 4); }

constexpr int64_t box_shared_bytes(const Tile& tile, const BoxStage& stage, int stages) {
  return int64_t{stages} * stage.bytes + kBarrierBytes + kElectionBytes +
         int64_t{tile.warps()} * turned_floats(box_fragments(tile)) * 4;
}

template <class Weight>
constexpr Residency box_residency(const Tile& tile, int tokens, const Weight& weight,
                                  int64_t shared_per_block) {
  const BoxStage stage = box_stage(tile, tokens, weight);
  for (int stages = std::min(tile.stages, kMostBoxStages); stages >= 2; --stages) {
    const int64_t bytes = box_shared_bytes(tile, stage, stages);
    if (bytes <= shared_per_block) return {stages, 1, bytes};
  }
  return {0, 0, 0};
}

}  // namespace lowbit::cuda
