// How kernels of warpgroups (kernels/hopper.cuh) cut a problem: the width of their tiles, and which blocks share what they copy.
#pragma once

#include <cstdint>

#include "common/problem.h"
#include "cuda/box_stages.h"
#include "cuda/hopper_plan.h"
#include "cuda/schedule.h"

namespace lowbit::cuda {

struct BoxPlan {
  BoxCluster
      cluster;     // no rows: shared memory has no room for two stages, or the wish cannot be met
  int32_t tokens;  // of a tile
  Residency resident;  // of a block
  Schedule schedule;   // of clusters, whose tiles are those of all their blocks
  int64_t slots;       // clusters that run at once
};

// The plan that is predicted to take least. `sharing.slots` is how many blocks run at once. A wish's numbers are those of
// BoxCluster.
BoxPlan plan_boxes(const Tile& tile, const Problem& p, const CudaTile64& weight,
                   const DeviceInfo& device, const Sharing& sharing, const HopperWish& wish);

}  // namespace lowbit::cuda
