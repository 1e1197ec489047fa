// Choosing clusters for Hopper's kernels of warpgroups: by the cycles that the block with the most steps takes, for each of
// which either the L2 has to deliver, or the tensor cores have to multiply.

#include "cuda/box_plan.h"

#include <cmath>

#include "common/check.h"
#include "common/round_up.h"
#include "cuda/select.h"
#include "cuda/tuning.h"

namespace lowbit::cuda {
namespace {

constexpr BoxCluster kClusters[] = {{1, 1}, {2, 1}, {1, 2}, {2, 2}};

double cycles_of_step(const Tile& tile, const BoxStage& stage, const BoxCluster& cluster) {
  const double bytes = static_cast<double>(stage.weights) / cluster.rows +
                       static_cast<double>(tile.rows / kStripRows * stage.strip) / cluster.tokens;
  const double products = static_cast<double>(tile.rows) * stage.tokens * tile.step;
  const double rate = x_bytes(tile) == 1 ? 4096.0 : 2048.0;
  return std::max(bytes / kBoxTuning.bytes_per_cycle, products / rate) *
         (1.0 + kBoxTuning.cluster_cost * std::log2(cluster.blocks()));
}

}  // namespace

BoxPlan plan_boxes(const Tile& tile, const Problem& p, const CudaTile64& weight,
                   const DeviceInfo& device, const Sharing& sharing, const HopperWish& wish) {
  BoxPlan best{};
  best.cluster.rows = 0;
  double least = 0.0;
  const int64_t own_n = div_up(p.N, tile.rows);
  const int64_t own_m = std::max<int64_t>(div_up(p.M, tile.tokens), 1);
  LOWBIT_CHECK(
      own_n * own_m < (int64_t{1} << 30) && own_n * own_m * weight.tiles < (int64_t{1} << 31),
      "M=", p.M, " N=", p.N, " K=", p.K, " makes more steps than one launch takes");
  for (const BoxCluster& cluster : kClusters) {
    if (wish.strips != 0) {
      if (wish.strips != cluster.rows || wish.cluster != cluster.tokens) continue;
    } else if (cluster.rows > own_n || cluster.tokens > own_m || cluster.blocks() > sharing.slots) {
      continue;
    }
    BoxPlan plan{};
    plan.cluster = cluster;
    plan.tokens = fitted_tokens(tile, p.M, cluster);
    plan.resident = box_residency(tile, plan.tokens, weight, device.shared_per_block);
    if (plan.resident.blocks_per_sm == 0) continue;
    plan.slots = std::max<int64_t>(sharing.slots / cluster.blocks(), 1);
    const int64_t tiles_n = div_up(own_n, cluster.rows), tiles_m = div_up(own_m, cluster.tokens);
    Sharing own = sharing;
    own.slots = static_cast<int>(plan.slots);
    if (tiles_n * tiles_m * cluster.blocks() > kMaxShared) own.most_sharers = 1;
    plan.schedule = make_schedule(static_cast<int>(tiles_n), static_cast<int>(tiles_m),
                                  static_cast<int>(weight.tiles), own);
    const Schedule& s = plan.schedule;
    const double steps =
        static_cast<double>(div_up(s.total, s.blocks) * div_up(int64_t{s.blocks}, plan.slots));
    const double cycles =
        steps * cycles_of_step(tile, box_stage(tile, plan.tokens, weight), cluster);
    if (best.cluster.rows != 0 && cycles >= least) continue;
    best = plan;
    least = cycles;
  }
  return best;
}

}  // namespace lowbit::cuda
