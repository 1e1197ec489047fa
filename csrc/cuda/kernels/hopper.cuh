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
// Of a thread, out of 65536: 2 * 128 * 240 + 128 * 24.
inline constexpr int kConsumerRegisters = 240, kProducerRegisters = 24;

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
  __device__ void start(int stages) const {
    if (threadIdx.x == 0) {
      for (int i = 0; i < stages; ++i) {
        ptx::mbarrier_init(full + i, 1);
        ptx::mbarrier_init(empty + i, kConsumerThreads / 32);
      }
      ptx::fence_mbarrier_init();
    }
    ptx::sync_block();
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
                      const BlockMemory& memory)
      : p_(p),
        stage_(stage),
        x_(x),
        memory_(memory),
        group_of_(p.w),
        policy_(ptx::policy_evict_first()) {}

  // All stages of all of the block's tiles; one thread.
  __device__ void run() {
    Share share(p_.schedule, blockIdx.x);
    for (Segment segment; share.next(segment);) {
      for (int step = segment.first; step < segment.last; ++step) {
        // Before its first use a stage is empty: the phase before the first has parity 1 and is over.
        ptx::mbarrier_wait(memory_.empty + place_.slot, place_.parity ^ 1);
        fill(segment, step);
        place_.advance(p_.stages);
      }
    }
  }

 private:
  __device__ void fill(const Segment& segment, int step) const {
    uint8_t* const to = dynamic_shared() + place_.slot * stage_.bytes;
    uint64_t* const full = memory_.full + place_.slot;
    const int first = segment.tile_n * kStrips, left = p_.w.strips - first;
    const int strips = left < kStrips ? left : kStrips;
    const int group = group_of_(step * kTileCells);
    const int rows = p_.w.groups - group < stage_.groups ? p_.w.groups - group : stage_.groups;
    ptx::mbarrier_arrive_expect_tx(full,
                                   static_cast<uint32_t>(stage_.weights + strips * bytes(rows)));
#pragma unroll
    for (int box = 0; box < boxes(kShape); ++box)
      ptx::copy_box(to + box * stage_.box, x_, segment.tile_m * stage_.tokens,
                    step * kTileK + box * (kBoxBytes / x_bytes(kShape)), full);
    for (int i = 0; i < strips; ++i)
      fetch(to + stage_.weights + i * stage_.strip, p_.w.data + (first + i) * p_.w.strip_bytes,
            step, group, rows, full);
  }

  // Of a strip's part of a stage, with `rows` groups of a table.
  __device__ int bytes(int rows) const {
    if (p_.w.groups_per_tile != 0) return p_.w.tile_bytes;
    return p_.w.codes_bytes + rows * (p_.w.scale_row_bytes + p_.w.zero_row_bytes);
  }

  __device__ void fetch(uint8_t* to, const uint8_t* strip, int step, int group, int rows,
                        uint64_t* full) const {
    const uint8_t* const tile = strip + int64_t{step} * p_.w.tile_bytes;
    if (p_.w.groups_per_tile != 0) {
      copy(to, tile, p_.w.tile_bytes, full);
      return;
    }
    copy(to, tile, p_.w.codes_bytes, full);
    copy(to + stage_.scales, strip + p_.w.scales_offset + int64_t{group} * p_.w.scale_row_bytes,
         rows * p_.w.scale_row_bytes, full);
    if (p_.w.zero_row_bytes != 0)
      copy(to + stage_.zeros, strip + p_.w.zeros_offset + int64_t{group} * p_.w.zero_row_bytes,
           rows * p_.w.zero_row_bytes, full);
  }

  // What one tile of tokens reads once leaves the L2 first.
  __device__ void copy(uint8_t* to, const uint8_t* from, int bytes, uint64_t* full) const {
    if (p_.schedule.tiles_m == 1) {
      ptx::copy_bulk_once(to, from, static_cast<uint32_t>(bytes), full, policy_);
    } else {
      ptx::copy_bulk(to, from, static_cast<uint32_t>(bytes), full);
    }
  }

  const GemmParams& p_;
  const BoxStage& stage_;
  const TensorMap& x_;
  const BlockMemory& memory_;
  const GroupOfCell group_of_;
  const uint64_t policy_;
  RingPlace place_;
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

  // All lanes are done with a stage: they have met at a wait since.
  __device__ void release(uint64_t* empty) const {
    if (lane == 0) ptx::mbarrier_arrive(empty);
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
      if (inside(m + token, p.x.M))
        store_row(p.y, m + token, n, p.w.N, turned + lane / lanes * kPitch + first, bias);
      ptx::sync_warp();
    }
  }

 private:
  static constexpr int kTurned = 16 / kFragments, kPitch = kWarpRows + 4;  // tokens at a time
};

// ---- all of it ---------------------------------------------------------------------------------------------------------

// A block's work. `Work` is a consumer's: multiply(segment, memory, place, sums) leaves fp32 sums and the place behind the
// segment's last stage.
template <int kTile, class Work>
__device__ void run_warpgroups(const GemmParams& p, const BoxStage& stage, const TensorMap& x) {
  const BlockMemory memory(stage, p.stages);
  memory.start(p.stages);
  if (threadIdx.x >= kConsumerThreads) {
    ptx::lower_registers<kProducerRegisters>();
    if (threadIdx.x == kConsumerThreads) Producer<kTile>(p, stage, x, memory).run();
  } else {
    ptx::raise_registers<kConsumerRegisters>();
    Work work(p, stage);
    RingPlace place;
    Share share(p.schedule, blockIdx.x);
    for (Segment segment; share.next(segment);) {
      typename Work::Sums sums;
      work.multiply(segment, memory, place, sums);
      FirstValues<Work::kFragments, Work::kCount> used{sums, p.tokens / 2};
      if (!segment.whole && !sum_segments<kConsumerThreads, kConsumerBarrier>(
                                p.schedule, segment, blockIdx.x, used, memory.elected))
        continue;
      work.store(p, segment, memory.turned, sums);
    }
  }
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
                      x_bytes(tile), p.tokens};
  launch(tile.name, kernel, Grid{static_cast<uint32_t>(p.schedule.blocks)}, kBlockThreads,
         box_shared_bytes(tile, stage, p.stages), stream, p, stage,
         make_tensor_map(tile.name, matrix));
}

}  // namespace lowbit::cuda
