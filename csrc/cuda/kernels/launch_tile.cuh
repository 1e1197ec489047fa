// Starting a kernel of a tile, whose arguments and grid are what all kernels with a schedule have.
#pragma once

#include <cstdint>

#include "cuda/launch.cuh"
#include "cuda/params.h"
#include "cuda/stages.h"
#include "cuda/weight_params.h"

namespace lowbit::cuda {

// kTile is the shape's row in kTiles.
template <int kTile>
void launch_tile(void (*kernel)(GemmParams, StageLayout), const GemmParams& given, Stream stream) {
  constexpr Tile tile = kTiles[kTile];
  GemmParams p = given;
  p.w = as_floats(given.w);
  const StageLayout layout = stage_layout(tile, p.w);
  launch(tile.name, kernel, Grid{static_cast<uint32_t>(p.schedule.blocks)}, tile.threads(),
         shared_bytes(tile, layout, p.stages), stream, p, layout);
}

}  // namespace lowbit::cuda
