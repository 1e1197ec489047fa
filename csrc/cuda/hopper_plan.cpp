// Choosing strips and clusters for Hopper's decode kernel: by what a multiprocessor has to read until its last block is
// done.

#include "cuda/hopper_plan.h"

#include <cmath>

#include "common/round_up.h"
#include "cuda/tuning.h"

namespace lowbit::cuda {
namespace {

constexpr int kStripChoices[] = {1, 2, 4};
constexpr int kClusterChoices[] = {1, 2, 4, 8};

// The ring of a plan, as deep as shared memory allows. False where it has no second stage.
//
// A multiple of a strip's warps: then a stage is read by the same warp every time round. Another one could come to a stage
// before its first tile has, and take the phase that ended before the first for the one that it waits for.
bool fit_ring(const Tile& tile, int64_t M, const CudaTile64& w, const DeviceInfo& device,
              HopperPlan& plan) {
  const HopperLayout at = hopper_layout(tile, w, plan.strips);
  const int turns = tile.warps() / plan.strips;
  // Room for one more block than the launch brings, as far as registers go: the next launch's, which reads ahead.
  const int64_t own = div_up(hopper_blocks(tile, M, w, plan), device.sm_count);
  for (int blocks = static_cast<int>(std::min<int64_t>(own + 1, tile.blocks_per_sm)); blocks >= 1;
       --blocks) {
    const int64_t room = std::min(device.shared_per_block, device.shared_per_sm / blocks - 1024);
    const int64_t stages = std::min<int64_t>(tile.stages, (room - at.first_stage) / at.stage_bytes);
    plan.stages = static_cast<int32_t>(stages / turns * turns);
    plan.shared_bytes = hopper_shared_bytes(tile, at, plan.stages);
    plan.blocks_per_sm = blocks;
    // All warps have a tile, and as much is on its way; or, with a block alone, as it comes.
    if (plan.shared_bytes <= room && plan.stages >= std::max(blocks > 1 ? 2 * turns : turns, 2))
      return true;
  }
  return false;
}

// Bytes that the multiprocessor with the most blocks has to read, x and what a block costs beside reading in the same
// coin.
double bytes_to_read(const Tile& tile, int64_t M, const CudaTile64& w, const DeviceInfo& device,
                     const HopperPlan& plan) {
  const int64_t steps = div_up(w.tiles, plan.cluster);
  const double tokens = static_cast<double>(std::min<int64_t>(M, tile.tokens));
  const double step = static_cast<double>(plan.strips * w.tile_bytes) +
                      kHopperTuning.token_bytes * tokens * kTileK * 2;
  const double block = static_cast<double>(steps) * step + kHopperTuning.block_bytes +
                       kHopperTuning.cluster_bytes * std::log2(plan.cluster);
  const int64_t blocks = hopper_blocks(tile, M, w, plan);
  const double most = static_cast<double>(div_up(blocks, device.sm_count));
  return most * block * (blocks <= device.sm_count ? kHopperTuning.lone_block : 1.0);
}

// What comes while every warp has a tile to decode.
int64_t in_flight(const Tile& tile, int64_t M, const CudaTile64& w, const DeviceInfo& device,
                  const HopperPlan& plan) {
  const int64_t ahead =
      std::min<int64_t>(plan.stages, div_up(w.tiles, plan.cluster)) - tile.warps() / plan.strips;
  const int64_t blocks = std::min<int64_t>(
      plan.blocks_per_sm, div_up(hopper_blocks(tile, M, w, plan), device.sm_count));
  return std::max<int64_t>(ahead, 0) * plan.strips * w.tile_bytes * blocks;
}

}  // namespace

int64_t hopper_blocks(const Tile& tile, int64_t M, const CudaTile64& w, const HopperPlan& plan) {
  return div_up(w.strips, plan.strips) * div_up(M, tile.tokens) * plan.cluster;
}

HopperPlan plan_hopper(const Tile& tile, int64_t M, const CudaTile64& w, const DeviceInfo& device,
                       const HopperWish& wish) {
  HopperPlan best{};
  double least = 0.0;
  for (const int strips : kStripChoices) {
    for (const int cluster : kClusterChoices) {
      HopperPlan plan{};
      plan.strips = strips;
      plan.cluster = cluster;
      if (wish.strips != 0 && (wish.strips != strips || wish.cluster != cluster)) continue;
      if (cluster > w.tiles || !fit_ring(tile, M, w, device, plan)) continue;
      const double bytes = bytes_to_read(tile, M, w, device, plan);
      if (best.strips != 0 && bytes >= least) continue;
      best = plan;
      least = bytes;
    }
  }
  if (best.strips != 0) best.in_flight = in_flight(tile, M, w, device, best);
  return best;
}

}  // namespace lowbit::cuda
