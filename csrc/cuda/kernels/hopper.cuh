// Kernels of warpgroups, for sm_90a: what all of them have in common. y[M, N] = x[M, K] W[N, K]^T with the weights, decoded
// in registers, as wgmma's A and the tokens, in shared memory, as its B: y^T = W x^T.
//
//   warpgroups 0, 1   consumers: half of the block's rows each, all of its tokens
//   warpgroup 2       producer: one thread that fills a ring of stages (box_stages.h), with bulk copies for weights and
//                     tensor copies for tokens. It runs ahead of the consumers by the depth of the ring, into the next tile too.
//
// A stage's full barrier ends its phase when the bytes that the producer announced have come; its empty barrier when all
// eight consumer warps have arrived. Both sides go around the ring in step: stage and phase of one are those of the other.
//
// Blocks of a cluster work on neighbouring tiles in step, and share what these have in common: each copies its part of it into
// the stages of all that want it, which the L2 reads once. It may do so when these stages are empty: consumers arrive at the
// empty barriers of all blocks that copy for them. Full barriers are each block's own, and count what others copy, too.
//
//   clusters of 2 x 2      rows ->        0          1        those of a line share x, those of a column weights
//                   tokens    0     rank 0     rank 1
//                             1     rank 2     rank 3
//
// Rows. wgmma gives warp w of a warpgroup rows 16w .. 16w + 15 of its 64. A lane of the weight layout has a word for each of
// the four fragments of a strip side by side, and the fewer of them a warp takes, the more bank conflicts it meets. So it takes
// kFragments neighbours, one for each wgmma: those of warp w are 16 * kFragments rows from kFragments * w on. A wgmma's 64 rows
// are therefore four pieces of the warpgroup's, and nothing but the store needs to know.
//
//   128 tokens, two fragments:      strip 0             strip 1             (of a warpgroup)
//                                   fragments 0 1 2 3   0 1 2 3
//                                   warp      0 0 1 1   2 2 3 3
//                                   wgmma     0 1 0 1   0 1 0 1
#pragma once

#include <cstdint>

#include "cuda/box_stages.h"
#include "cuda/epilogue.cuh"
#include "cuda/kernels/formats.h"
#include "cuda/launch.cuh"
#include "cuda/launchers.h"
#include "cuda/ptx_hopper.cuh"
#include "cuda/scales.cuh"
#include "cuda/schedule.cuh"
#include "cuda/wgmma.cuh"

namespace lowbit::cuda {

inline constexpr int kTileCells = kTileK / kCellK;
inline constexpr int kConsumers = 2;  // warpgroups
inline constexpr int kConsumerThreads = kConsumers * kWarpgroup;
inline constexpr int kBlockThreads = kConsumerThreads + kWarpgroup;
inline constexpr int kConsumerBarrier = 1;
// Of a thread, out of what the block was launched with: 168 for each of 384. Who asks for more than the others gave up waits
// for ever.
inline constexpr int kConsumerRegisters = 232, kProducerRegisters = 40;
static_assert(kConsumers * kConsumerRegisters + kProducerRegisters <= 3 * 168);

// A block's place in its cluster, of one or two lines and columns.
struct Team {
  int32_t rows, tokens;  // blocks with rows and with tokens of their own: clusters of rows x tokens
  int32_t row, token, rank;

  __device__ explicit Team(const GemmParams& p)
      : rows(p.cluster_rows), tokens(p.cluster >> (rows - 1)) {
    rank = p.cluster == 1 ? 0 : static_cast<int32_t>(ptx::cluster_rank());
    row = rank & (rows - 1);
    token = rank >> (rows - 1);
  }

  __device__ int32_t blocks() const { return rows * tokens; }
  __device__ uint32_t number() const {
    return static_cast<uint32_t>(blockIdx.x) >> (rows - 1 + tokens - 1);
  }

  // Blocks that copy for this one, it among them: those of its line and of its column.
  __device__ int32_t copiers() const { return rows + tokens - 1; }
  __device__ bool is_copier(int32_t other) const {
    return other >> (rows - 1) == token || (other & (rows - 1)) == row;
  }
  // Bits of the blocks with the same tokens, and with the same rows.
  __device__ uint16_t line() const {
    return static_cast<uint16_t>(((1 << rows) - 1) << (token * rows));
  }
  __device__ uint16_t column() const {
    return static_cast<uint16_t>((tokens == 1 ? 1 : 1 | 1 << rows) << row);
  }

  // The block's own tile, where the schedule has one for all of the cluster.
  __device__ void take(Segment& segment) const {
    segment.tile_n = segment.tile_n * rows + row;
    segment.tile_m = segment.tile_m * tokens + token;
  }
  // The schedule, with counters and partial sums of the block's own. A tile has `values` of these.
  __device__ Schedule share(const Schedule& all, int values) const {
    Schedule own = all;
    if (all.counters != nullptr) {
      own.counters += int64_t{rank} * all.tiles_n * all.tiles_m;
      own.partials += int64_t{rank} * 2 * all.blocks * values;
    }
    return own;
  }
};

// The block's shared memory behind the stages.
struct BlockMemory {
  uint64_t *full, *empty;
  uint32_t* elected;
  float* turned;

  __device__ BlockMemory(const BoxStage& stage, int stages)
      : full(reinterpret_cast<uint64_t*>(dynamic_shared() + stages * stage.bytes)),
        empty(full + kMostBoxStages),
        elected(reinterpret_cast<uint32_t*>(empty + kMostBoxStages)),
        turned(reinterpret_cast<float*>(elected) + kElectionBytes / 4) {}

  // By all threads of the block, before they part.
  __device__ void start(int stages, const Team& team) const {
    if (threadIdx.x == 0) {
      const auto arrivals = static_cast<uint32_t>(kConsumerThreads / 32 * team.copiers());
#pragma unroll 1
      for (int i = 0; i < stages; ++i) {
        ptx::mbarrier_init(full + i, 1);
        ptx::mbarrier_init(empty + i, arrivals);
      }
      ptx::fence_mbarrier_init();
    }
    if (team.blocks() == 1) {
      ptx::sync_block();
    } else {
      ptx::sync_cluster();
    }
  }
};

// A place in the ring, and the parity of its phase: 0 the first time around.
struct RingPlace {
  int slot = 0;
  uint32_t parity = 0;

  __device__ void advance(int stages) {
    if (++slot == stages) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// ---- the producer ------------------------------------------------------------------------------------------------------

template <int kTile>
class Producer {
 public:
  static constexpr Tile kShape = kTiles[kTile];
  static constexpr int kStrips = kShape.rows / kStripRows;

  __device__ Producer(const GemmParams& p, const BoxStage& stage, const TensorMap& x,
                      const BlockMemory& memory, const Team& team)
      : p_(p),
        stage_(stage),
        x_(x),
        memory_(memory),
        team_(team),
        group_of_(p.w),
        policy_(ptx::policy_evict_first()) {}

  // All stages of all of the block's tiles; one thread. The first ones get their weights, which do not depend on the launch
  // before, while that still runs, and their tokens later. (One loop for all: what stands twice takes more registers than a
  // producer has.)
  __device__ void run() {
    Share share(p_.schedule, team_.number());
    RingPlace place;
    int ahead = p_.stages;
    for (Segment segment; share.next(segment); ahead = 0) {
      team_.take(segment);
      const int steps = segment.last - segment.first;
      if (steps < ahead) ahead = steps;
#pragma unroll 1
      for (int i = 0; i < ahead + steps; ++i) {
        const bool has_weights = i >= ahead && i < 2 * ahead;
        if (i == ahead && ahead > 0) {
          ptx::grid_launch_dependents();
          ptx::grid_wait();
          place = RingPlace();
        }
        const int step = segment.first + (i < ahead ? i : i - ahead);
        if (!has_weights) {
          // Before its first use a stage is empty: the phase before the first has parity 1 and is over.
          ptx::mbarrier_wait(memory_.empty + place.slot, place.parity ^ 1);
          fill_weights(place.slot, segment, step);
        }
        if (i >= ahead) fill_tokens(place.slot, segment, step);
        place.advance(p_.stages);
      }
    }
  }

 private:
  // And announces all bytes of the stage.
  __device__ void fill_weights(int slot, const Segment& segment, int step) const {
    uint8_t* const to = dynamic_shared() + slot * stage_.bytes;
    uint64_t* const full = memory_.full + slot;
    const int first = segment.tile_n * kStrips, left = p_.w.strips - first;
    const int strips = left < 0 ? 0 : left < kStrips ? left : kStrips;
    const int group = group_of_(step * kTileCells);
    const int rows = p_.w.groups - group < stage_.groups ? p_.w.groups - group : stage_.groups;
    ptx::mbarrier_arrive_expect_tx(full,
                                   static_cast<uint32_t>(stage_.weights + strips * bytes(rows)));
#pragma unroll 1
    for (int i = team_.token; i < strips; i += team_.tokens)
      fetch(to + stage_.weights + i * stage_.strip, p_.w.data + (first + i) * p_.w.strip_bytes,
            step, group, rows, full);
  }

  __device__ void fill_tokens(int slot, const Segment& segment, int step) const {
    const int tokens = stage_.tokens / team_.rows, first = team_.row * tokens;
    uint8_t* const to = dynamic_shared() + slot * stage_.bytes + first * kBoxBytes;
#pragma unroll
    for (int box = 0; box < boxes(kShape); ++box) {
      const int m = segment.tile_m * stage_.tokens + first;
      const int k = step * kTileK + box * (kBoxBytes / x_bytes(kShape));
      if (team_.rows == 1) {
        ptx::copy_box(to + box * stage_.box, x_, m, k, memory_.full + slot);
      } else {
        ptx::copy_box_shared(to + box * stage_.box, x_, m, k, memory_.full + slot, team_.line());
      }
    }
  }

  // Of a strip's part of a stage, with `rows` groups of a table.
  __device__ int bytes(int rows) const {
    if (p_.w.groups_per_tile != 0) return p_.w.tile_bytes;
    return p_.w.codes_bytes + rows * (p_.w.scale_row_bytes + p_.w.zero_row_bytes);
  }

  // Codes, with the scales behind them or, where these stand in the strip's table, with rows of scales and of zeros.
  __device__ void fetch(uint8_t* to, const uint8_t* strip, int step, int group, int rows,
                        uint64_t* full) const {
    const WeightParams& w = p_.w;
    const bool in_tile = w.groups_per_tile != 0;
    const uint8_t* from = strip + int64_t{step} * w.tile_bytes;
    int bytes = in_tile ? w.tile_bytes : w.codes_bytes, at = 0;
#pragma unroll 1
    for (int part = 0; part < 3 && bytes > 0; ++part) {
      copy(to + at, from, bytes, full);
      if (in_tile) break;
      const int row = part == 0 ? w.scale_row_bytes : w.zero_row_bytes;
      from = strip + (part == 0 ? w.scales_offset : w.zeros_offset) + int64_t{group} * row;
      at = part == 0 ? stage_.scales : stage_.zeros;
      bytes = rows * row;
    }
  }

  // What one tile of tokens reads once leaves the L2 first.
  __device__ void copy(uint8_t* to, const uint8_t* from, int bytes, uint64_t* full) const {
    if (team_.tokens > 1) {
      ptx::copy_bulk_shared(to, from, static_cast<uint32_t>(bytes), full, team_.column());
    } else if (p_.schedule.tiles_m == 1) {
      ptx::copy_bulk_once(to, from, static_cast<uint32_t>(bytes), full, policy_);
    } else {
      ptx::copy_bulk(to, from, static_cast<uint32_t>(bytes), full);
    }
  }

  const GemmParams& p_;
  const BoxStage& stage_;
  const TensorMap& x_;
  const BlockMemory& memory_;
  const Team& team_;
  const GroupOfCell group_of_;
  const uint64_t policy_;
};

// ---- consumers ---------------------------------------------------------------------------------------------------------

// Who a consumer thread is.
template <int kTile>
class Consumer {
 public:
  static constexpr Tile kShape = kTiles[kTile];
  static constexpr int kFragments = box_fragments(kShape);  // of a warp
  static constexpr int kWarpRows = 16 * kFragments;
  static_assert(kShape.threads() == kConsumerThreads && kShape.step == kTileK,
                "two warpgroups of consumers, a step per tile of the layout");
  static_assert(kFragments == 1 || kFragments == 2, "of a strip");

  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;

  __device__ Consumer(const GemmParams& p, const Team& team)
      : cluster_(p.cluster), arrives_(lane < team.blocks() && team.is_copier(lane)) {}

  __device__ int strip() const { return warp * kFragments / 4; }     // of the block's
  __device__ int fragment() const { return warp * kFragments % 4; }  // first of the strip's
  __device__ int position() const { return 8 * (lane / 4) + 2 * fragment(); }  // in a row of scales

  // Rows of a group, from this warp's first fragment on. `strip` is in a stage, groups count from the stage's first.
  template <Format kFormat>
  __device__ GroupRows rows_of(const WeightParams& w, const BoxStage& stage, const uint8_t* strip,
                               int group) const {
    const int first = 2 * fragment();
    const int scale = is_block<kFormat>(w) ? 0 : first * (w.scale_row_bytes / kStripRows);
    return {
        strip + stage.scales + group * w.scale_row_bytes + scale,
        strip + stage.zeros + group * w.zero_row_bytes + first * (w.zero_row_bytes / kStripRows)};
  }

  // All lanes are done with a stage: they have met at a wait since. A lane for each block that may then copy into it.
  __device__ void release(uint64_t* empty) const {
    if (!arrives_) return;
    if (cluster_ > 1) {
      ptx::mbarrier_arrive_remote(empty, static_cast<uint32_t>(lane));
    } else {
      ptx::mbarrier_arrive(empty);
    }
  }

  // y = sums + bias: [fragment][8 tokens of D], through the warp's part of shared memory, because D has neighbouring tokens
  // in a lane, and y has neighbouring rows in memory.
  template <int kCount>
  __device__ void store(const GemmParams& p, const Segment& segment, float* turned,
                        const float (&sums)[kFragments][kCount]) const {
    constexpr int lanes = kWarpRows / 8;
    turned += warp * turned_floats(kFragments);
    const int64_t m = int64_t{segment.tile_m} * p.tokens + lane / lanes;
    const int first = 8 * (lane % lanes);
    const int64_t n = int64_t{segment.tile_n} * kShape.rows + warp * kWarpRows + first;
    if (!inside(n - first, p.w.N)) return;
    float bias[8];
    load_bias(p.y, n, p.w.N, bias);
#pragma unroll 1
    for (int token = 0; token < p.tokens; token += kTurned) {
      at_index<kShape.tokens / kTurned>(token / kTurned, [&](auto block) {
        const int g = lane / 4, t = lane % 4;
#pragma unroll
        for (int j = 0; j < kTurned / 2 * kFragments; ++j) {
          const int r = j % 4, i = j / 4 % kFragments, b = j / 4 / kFragments;
          turned[(8 * b + 2 * t + r % 2) * kPitch + 16 * i + g + 8 * (r / 2)] =
              sums[i][kTurned / 2 * block() + 4 * b + r];
        }
      });
      ptx::sync_warp();
      // A tile's last turn may be half of one.
      if (inside(m + token, p.x.M) && inside(token + lane / lanes, p.tokens))
        store_row(p.y, m + token, n, p.w.N, turned + lane / lanes * kPitch + first, bias);
      ptx::sync_warp();
    }
  }

 private:
  static constexpr int kTurned = 16 / kFragments, kPitch = kWarpRows + 4;  // tokens at a time

  const int32_t& cluster_;
  const bool arrives_;
};

// ---- all of it ---------------------------------------------------------------------------------------------------------

// A block's work. `Work` is a consumer's: multiply(segment, memory, place, sums) leaves fp32 sums and the place behind the
// segment's last stage.
template <int kTile, class Work>
__device__ void run_warpgroups(const GemmParams& p, const BoxStage& stage, const TensorMap& x) {
  const BlockMemory memory(stage, p.stages);
  if (threadIdx.x == kConsumerThreads) ptx::prefetch_map(x);
  memory.start(p.stages, Team(p));
  const Team team(p);
  if (threadIdx.x >= kConsumerThreads) {
    ptx::lower_registers<kProducerRegisters>();
    if (threadIdx.x == kConsumerThreads) Producer<kTile>(p, stage, x, memory, team).run();
    ptx::sync_warp();
  } else {
    ptx::raise_registers<kConsumerRegisters>();
    // For scales of x, bias, partial sums and y, which these threads read and write themselves.
    ptx::grid_wait();
    const Schedule schedule =
        team.share(p.schedule, kConsumerThreads * Work::kFragments * p.tokens / 2);
    Work work(p, stage, team);
    RingPlace place;
    Share share(schedule, team.number());
    for (Segment segment; share.next(segment);) {
      team.take(segment);
      typename Work::Sums sums;
      work.multiply(segment, memory, place, sums);
      FirstValues<Work::kFragments, Work::kCount> used{sums, p.tokens / 2};
      if (!segment.whole && !sum_segments<kConsumerThreads, kConsumerBarrier>(
                                schedule, segment, team.number(), used, memory.elected))
        continue;
      work.store(p, segment, memory.turned, sums);
    }
  }
  // Others arrive at this block's barriers until they are done.
  if (p.cluster > 1) ptx::sync_cluster();
}

template <int kTile>
void launch_warpgroups(void (*kernel)(GemmParams, BoxStage, TensorMap), const GemmParams& p,
                       Stream stream) {
  constexpr Tile tile = kTiles[kTile];
  const BoxStage stage = box_stage(tile, p.tokens, p.w);
  const int64_t row_bytes = p.x.stride * x_bytes(tile);
  // Bytes were put in order, up to the end of rows that are whole. One row has no next one, and may have any stride.
  const int64_t columns = x_bytes(tile) == 1 ? p.x.stride : p.w.K;
  const Matrix matrix{p.x.data,      p.x.M,
                      columns,       p.x.M == 1 ? round_up(row_bytes, 16) : row_bytes,
                      x_bytes(tile), p.tokens / p.cluster_rows};
  LaunchOptions options;
  options.cluster = static_cast<uint32_t>(p.cluster);
  options.dependent = true;
  options.depends = p.x.data;
  options.depends_bytes = x_bytes(tile) * ((p.x.M - 1) * p.x.stride + p.w.K);
  launch_with(options, tile.name, kernel,
              Grid{static_cast<uint32_t>(p.schedule.blocks * p.cluster)}, kBlockThreads,
              box_shared_bytes(tile, stage, p.stages), stream, p, stage,
              make_tensor_map(tile.name, matrix));
}

}  // namespace lowbit::cuda
