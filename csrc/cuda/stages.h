// What a step takes of shared memory in the kernels that tensor cores run, and how many steps fit: host and device.
//
//   stage = codes of the step, strip by strip, plane by plane | x [tokens][step] | rows of scales | rows of zeros
//           | rows of what scales and zeros are made from, where they are not stored as floats
//
// where a strip has as many rows of scales as groups a step can touch. A kernel's shared memory is a ring of stages; the
// sums that warps exchange after the last step lie over it. (grad: x is dy, and the strips are one strip's columns, 64 by
// 64.)
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/params.h"
#include "cuda/tiles.h"
#include "packing/cuda_tile64.h"

namespace lowbit::cuda {

struct StageLayout {
  int32_t x, scales, zeros;  // bytes from the stage's start; the codes stand at 0
  // Rows as they are stored, strip by strip: scales, offsets [groups] | super scales, their zeros [supers].
  int32_t stored, stored_bytes;  // where, and how many bytes of a strip
  int32_t bytes;                 // of the stage
  int32_t groups;                // the most that a step touches
  int32_t supers;                // the same; 0: there are none, or there is one for all
};

// A group is a multiple of 16: a step can begin in its last 16.
constexpr int step_groups(int64_t group_size, int step) {
  if (step % group_size == 0) return static_cast<int>(step / group_size);
  if (group_size % step == 0) return 1;
  return static_cast<int>(1 + (step - kCellK + group_size - 1) / group_size);
}

// Of one element of x.
constexpr int x_bytes(const Tile& tile) {
  return tile.kernel == Kernel::kA8Int || tile.kernel == Kernel::kA8Fp8 ||
                 tile.kernel == Kernel::kA8Decode || orders_bytes(tile.kernel)
             ? 1
             : 2;
}

// What stage_layout wants to know of a weight: of its geometry, or of what kernels are given.
struct StageRows {
  int64_t group_size, groups;
  int bits, scale_bytes, zero_bytes;  // rows as kernels read them
  bool plain;
  int stored_scale_bytes, stored_zero_bytes;
  int super_bytes, super_shift;  // no bytes: there are none, or there is one for all
};
inline StageRows stage_rows(const CudaTile64& t) {
  const GroupTable& supers = t.shape.tables[kSuperTable];
  const int super_bytes = t.shared_super ? 0 : kStripRows * supers.bytes;
  return {
      t.group_size, t.groups,          t.bits,           t.floats.scale_bytes, t.floats.zero_bytes,
      t.plain,      t.scale_row_bytes, t.zero_row_bytes, super_bytes,          supers.fine_shift};
}
inline StageRows stage_rows(const WeightParams& w) {
  return {w.group_size,
          w.groups,
          w.bits,
          w.scale_row_bytes,
          w.zero_row_bytes,
          w.plain,
          w.stored.scale_row_bytes,
          w.stored.zero_row_bytes,
          w.shared_super ? 0 : w.supers.row_bytes,
          w.supers.shift};
}

// Aligned runs of 2^shift groups that so many neighbouring groups can touch. `aligned`: the first is a multiple of them.
constexpr int runs_touched(int groups, bool aligned, int64_t all_groups, int shift) {
  const int64_t last = (all_groups - 1) >> shift, run = int64_t{1} << shift;
  if (aligned && run % groups == 0) return 1;
  return static_cast<int>(std::min(last, (groups - 2 + run) >> shift) + 1);
}

// `Weight` is CudaTile64 or WeightParams.
template <class Weight>
StageLayout stage_layout(const Tile& tile, const Weight& weight) {
  const StageRows w = stage_rows(weight);
  const int strips = tile.rows / kStripRows;
  StageLayout stage{};
  stage.groups = w.groups == 1 ? 1 : step_groups(w.group_size, tile.step);
  stage.x = strips * kStripRows * tile.step * w.bits / 8;
  stage.scales = stage.x + tile.tokens * tile.step * x_bytes(tile);
  stage.zeros = stage.scales + strips * stage.groups * w.scale_bytes;
  stage.stored = stage.zeros + strips * stage.groups * w.zero_bytes;
  if (!w.plain) {
    const bool aligned = w.group_size <= tile.step && tile.step % w.group_size == 0;
    if (w.super_bytes > 0)
      stage.supers = runs_touched(stage.groups, aligned, w.groups, w.super_shift);
    stage.stored_bytes = stage.groups * (w.stored_scale_bytes + w.stored_zero_bytes) +
                         2 * stage.supers * w.super_bytes;
  }
  stage.bytes = stage.stored + strips * stage.stored_bytes;
  return stage;
}

// Whether every warp has a ring to itself and the warps take turns at steps: what kernels for few tokens do. The others
// have one ring, in which slices of K (two at most) share each stage.
constexpr bool takes_turns(const Tile& tile) { return tile.warps_k > 2; }
constexpr int rings(const Tile& tile) { return takes_turns(tile) ? tile.warps() : 1; }

// Sums that change hands between warps when all steps are done, and a word for the election (schedule.cuh).
//   turns    all sums of every warp, [tokens][64 rows], to be added in the order of warps
//   others   where two slices of K meet, half the sums of every warp; then, 8 tokens at a time, sums on their way to y
inline constexpr int kPaddedRows =
    kStripRows + 4;  // the four spread a warp's fragment over all banks
constexpr int64_t exchange_bytes(const Tile& tile) {
  const int64_t tokens = tile.tokens / tile.warps_m;
  const int64_t stored = 8 * kPaddedRows * 4;
  const int64_t warp = takes_turns(tile)   ? tokens * kPaddedRows * 4
                       : tile.warps_k == 2 ? std::max(tokens / 2 * kStripRows * 4, stored)
                                           : stored;
  return warp * tile.warps() + 16;
}
constexpr int64_t election_offset(const Tile& tile) { return exchange_bytes(tile) - 16; }

constexpr int64_t shared_bytes(const Tile& tile, const StageLayout& stage, int stages) {
  return std::max(int64_t{rings(tile)} * stages * stage.bytes, exchange_bytes(tile));
}

// How deep a kernel's ring is on a device. No stages: its shared memory does not hold the two that the kernel needs.
struct Residency {
  int stages;
  int blocks_per_sm;
  int64_t shared_bytes;  // of a block
};

// Two blocks on a multiprocessor before deeper rings: while one block starts, sums or stores, the other one reads.
template <class Weight>
Residency residency(const Tile& tile, const Weight& weight, int64_t shared_per_block,
                    int64_t shared_per_sm) {
  const StageLayout stage = stage_layout(tile, weight);
  for (int blocks = tile.blocks_per_sm; blocks >= 1; --blocks) {
    // A block costs the multiprocessor 1 KB more than it asks for.
    const int64_t room = std::min(shared_per_block, shared_per_sm / blocks - 1024);
    for (int stages = tile.stages; stages >= 2; --stages) {
      const int64_t bytes = shared_bytes(tile, stage, stages);
      if (bytes <= room) return {stages, blocks, bytes};
    }
  }
  return {0, 0, 0};
}

}  // namespace lowbit::cuda
