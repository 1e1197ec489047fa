// The arithmetic of a Schedule (params.h), for the host that makes one and the blocks that follow it. No CUDA, no torch.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/params.h"

namespace lowbit::cuda {

// Block b works on the steps [range_begin(b), range_begin(b + 1)): shares that differ by one step at most, and that end
// where tiles end wherever the number of blocks is a multiple of the number of tiles. It is b * total / blocks, in 32 bits:
// with as many blocks as run at once, b * extra fits; with more there is one for each tile, and extra is 0.
constexpr uint32_t range_begin(const Schedule& s, uint32_t block) {
  return block * s.share + block * s.extra / static_cast<uint32_t>(s.blocks);
}
constexpr void set_blocks(Schedule& s, int64_t blocks) {
  s.blocks = static_cast<int32_t>(blocks);
  s.share = static_cast<uint32_t>(s.total / blocks);
  s.extra = static_cast<uint32_t>(s.total % blocks);
}

// Whether some tile is worked on by several blocks: then counters and partials are needed.
constexpr bool shares_tiles(const Schedule& s) {
  const int64_t tiles = int64_t{s.tiles_n} * s.tiles_m;
  return s.total > 0 && s.blocks != tiles && tiles % s.blocks != 0;
}

// What sharing a tile may cost.
struct Sharing {
  int slots;      // blocks that run at once: multiprocessors times the blocks that each holds
  int min_steps;  // a block's share below which starting and summing take longer than the work
  int most_sharers;  // of one tile: the last of them to finish reads all partial sums alone; 1 = share nothing
};

// Cuts `tiles_n * tiles_m` tiles of `steps` each:
//   whole tiles, where their last wave leaves less than a tenth of the device idle;
//   every tile in the same number of pieces, where that leaves less than a tenth idle: a block then has one piece to sum;
//   as many ranges as slots, each the same number of steps, wherever tiles end in them.
constexpr Schedule make_schedule(int tiles_n, int tiles_m, int steps, const Sharing& sharing) {
  Schedule s{};
  s.tiles_n = tiles_n;
  s.tiles_m = tiles_m;
  s.steps_per_tile = steps;
  const int64_t tiles = int64_t{tiles_n} * tiles_m;
  s.total = tiles * steps;
  if (tiles == 0) return s;
  set_blocks(s, tiles);
  if (sharing.most_sharers <= 1) return s;

  const int64_t slots = std::max(sharing.slots, 1);
  const int64_t waves = (tiles + slots - 1) / slots;
  if (10 * tiles >= 9 * waves * slots) return s;
  if (tiles > slots) {  // at most two waves and a part: ranges of more than a tile
    set_blocks(s, slots);
    return s;
  }
  const int64_t allowed =
      std::min<int64_t>(sharing.most_sharers, steps / std::max(sharing.min_steps, 1));
  const int64_t pieces = std::max<int64_t>(std::min(slots / tiles, allowed), 1);
  const bool room_for_more = pieces < allowed && 10 * pieces * tiles < 9 * slots;
  set_blocks(s, room_for_more ? slots : pieces * tiles);
  return s;
}

}  // namespace lowbit::cuda
