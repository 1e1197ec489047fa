// GEMM for few tokens (M <= 16) on Hopper: y[M, N] = x[M, K] W[N, K]^T + bias, bound by the bytes of W.
//
// A block computes up to four strips of 64 output rows. One warp copies and eight warps multiply:
//
//   copying warp     waits for an empty stage, copies a tile (128 k) of every strip into it in bulk, which the memory
//                    system does without further instructions, and x beside them; all of it arrives at the stage's barrier
//   strips = 2:      stage     0    1    2    3    4    5  ...
//     warp 0, 1      strip 0,1                0,1
//     warp 2, 3           0,1                      0,1
//     warp 4, 5                0,1
//     warp 6, 7                     0,1
//
// The tiles of a strip are contiguous, and so are a tile's codes and scales where groups divide it: one copy per tile. Other
// scales stand in the strip's table, and a tile's rows of it are a second and, with zeros, a third copy.
//
// Blocks of a cluster take equal parts of K. What they have summed up is added through distributed shared memory, each
// block adding for a part of the tokens and strips, always in the order of warps and then of ranks: the same call gives the
// same bits, without atomics and without a workspace.
//
// A launch may start while the one before it still runs. It then copies weights, which that one does not write, as far as
// its stages reach, and waits before it reads x.
#pragma once

#include <cstdint>

#include "cuda/epilogue.cuh"
#include "cuda/hopper_plan.h"
#include "cuda/kernels/formats.h"
#include "cuda/launch.cuh"
#include "cuda/launchers.h"
#include "cuda/pipeline.cuh"
#include "cuda/ptx_hopper.cuh"
#include "cuda/step_sums.cuh"
#include "cuda/warp_sums.cuh"

namespace lowbit::cuda {

// What a block works on.
struct HopperShare {
  int32_t strip, strips;  // the first, and how many of them there are
  int32_t token;          // the first
  int32_t first, steps;   // tiles of K

  __device__ HopperShare(const GemmParams& p, int tokens) {
    const int32_t rank = static_cast<int32_t>(ptx::cluster_rank());
    const int32_t tile = static_cast<int32_t>(blockIdx.x) / p.cluster;
    strip = tile % p.schedule.tiles_n * p.strips;
    strips = p.w.strips - strip < p.strips ? p.w.strips - strip : p.strips;
    token = tile / p.schedule.tiles_n * tokens;
    first = hopper_range(p.w.tiles, p.cluster, rank);
    steps = hopper_range(p.w.tiles, p.cluster, rank + 1) - first;
  }
};

// A place in the ring, and the parity of its barriers' phases that this time round ends.
struct HopperStage {
  int32_t index;
  uint32_t parity;

  __device__ void advance(int by, int stages) {
    for (index += by; index >= stages; index -= stages) parity ^= 1u;
  }
};

// ---- the copying warp --------------------------------------------------------------------------------------------------

template <Format kFormat, int kTokens>
class HopperCopier {
 public:
  __device__ HopperCopier(const GemmParams& p, const HopperLayout& layout, const HopperShare& share,
                          uint8_t* ring, int lane)
      : p_(p),
        layout_(layout),
        share_(share),
        ring_(ring),
        lane_(lane),
        group_of_(p.w),
        tokens_(p.x, p.w.K, lane),
        policy_(ptx::policy_evict_first()) {}

  // Tokens that are not there, once and for all: before the block's first barrier.
  __device__ void clear() {
    for (int half = 0; half < 2; ++half)
      tokens_.start(share_.token, ring_ + layout_.x + half * kHalf, p_.stages, layout_.stage_bytes);
  }

  __device__ void run(uint64_t* full, uint64_t* empty) {
    // Weights first: they do not depend on the launch before.
    const int ahead = share_.steps < p_.stages ? share_.steps : p_.stages;
#pragma unroll 1
    for (int i = 0; i < ahead; ++i) copy_weights(i, i, full);
    ptx::grid_launch_dependents();
    ptx::grid_wait();
#pragma unroll 1
    for (int i = 0; i < ahead; ++i) copy_tokens(i, i, full);
    HopperStage stage{0, 0};
#pragma unroll 1
    for (int i = ahead; i < share_.steps; ++i) {
      ptx::mbarrier_wait(empty + stage.index, stage.parity);
      copy_weights(i, stage.index, full);
      copy_tokens(i, stage.index, full);
      stage.advance(1, p_.stages);
    }
  }

 private:
  static constexpr int kHalf = kTokens * kStep * 2;  // bytes of x in 64 columns

  __device__ void copy_weights(int i, int stage, uint64_t* full) const {
    if (lane_ != 0) return;
    const WeightParams& w = p_.w;
    const int tile = share_.first + i;
    const int group = group_of_(tile * (kTileK / kCellK));
    const int left = w.groups - group;
    const int rows = w.groups_per_tile > 0 ? 0 : left < layout_.groups ? left : layout_.groups;
    const uint32_t scale_bytes = static_cast<uint32_t>(rows * w.scale_row_bytes);
    const uint32_t zero_bytes = static_cast<uint32_t>(rows * w.zero_row_bytes);
    const uint32_t copied = static_cast<uint32_t>(layout_.copied);
    uint64_t* const barrier = full + stage;
    ptx::mbarrier_arrive_expect_tx(
        barrier, static_cast<uint32_t>(share_.strips) * (copied + scale_bytes + zero_bytes));
    uint8_t* to = ring_ + stage * layout_.stage_bytes;
    const uint8_t* strip = w.data + share_.strip * w.strip_bytes;
#pragma unroll 1
    for (int s = 0; s < share_.strips; ++s, to += layout_.strip_bytes, strip += w.strip_bytes) {
      ptx::copy_bulk_once(to, strip + int64_t{tile} * w.tile_bytes, copied, barrier, policy_);
      if (rows == 0) continue;
      // Neighbouring tiles may share a group, so these rows had better stay in the L2.
      ptx::copy_bulk(to + layout_.scales,
                     strip + w.scales_offset + int64_t{group} * w.scale_row_bytes, scale_bytes,
                     barrier);
      if (zero_bytes > 0)
        ptx::copy_bulk(to + layout_.zeros,
                       strip + w.zeros_offset + int64_t{group} * w.zero_row_bytes, zero_bytes,
                       barrier);
    }
  }

  // With cp.async, for its sake who fill up with zeros what K ends within.
  __device__ void copy_tokens(int i, int stage, uint64_t* full) const {
    const int step = (share_.first + i) * (kTileK / kStep);
    uint8_t* const to = ring_ + stage * layout_.stage_bytes + layout_.x;
    const uint8_t* const row = tokens_.row(share_.token, step);
    tokens_.fetch(row, step, to);
    tokens_.fetch(row + kStep * 2, step + 1, to + kHalf);
    ptx::cp_async_mbarrier_arrive(full + stage);
  }

  const GemmParams& p_;
  const HopperLayout& layout_;
  const HopperShare& share_;
  uint8_t* const ring_;
  const int lane_;
  const GroupOfCell group_of_;
  TokenFetcher<kTokens, 32> tokens_;
  const uint64_t policy_;
};

// ---- the multiplying warps ---------------------------------------------------------------------------------------------

// Sums of a warp's strip over its turns.
template <class Step>
__device__ void multiply_turns(const GemmParams& p, const HopperLayout& layout,
                               const HopperShare& share, uint8_t* ring, uint64_t* full,
                               uint64_t* empty, int strip, int turn, int turns, int lane,
                               typename Step::Sums& sums) {
  Step step(p.w, lane);
  step.start();
  HopperStage stage{0, 0};
  stage.advance(turn, p.stages);
#pragma unroll 1
  for (int i = turn; i < share.steps; i += turns) {
    ptx::mbarrier_wait(full + stage.index, stage.parity);
    const uint8_t* const at = ring + stage.index * layout.stage_bytes;
    const uint8_t* const codes = at + strip * layout.strip_bytes;
    step.add_step({codes, at + layout.x, {codes + layout.scales, codes + layout.zeros}},
                  (share.first + i) * (kTileK / kCellK), sums);
    ptx::sync_warp();  // every lane has read the stage
    if (lane == 0) ptx::mbarrier_arrive(empty + stage.index);
    stage.advance(turns, p.stages);
  }
}

// ---- what warps and blocks have summed up ------------------------------------------------------------------------------

// Where the sums of a warp's token stand; each lane has two rows.
template <int kTokens>
__device__ float2* hopper_sums(uint8_t* exchange, int warp, int token, int lane) {
  return reinterpret_cast<float2*>(reinterpret_cast<float*>(exchange) +
                                   (warp * kTokens + token) * kPaddedRows + 2 * lane);
}

// In the order of turns, for all tokens of all strips; the sums of turn 0 make room for them.
template <int kTokens, int kWarps>
__device__ void add_turns(const GemmParams& p, const HopperShare& share, uint8_t* exchange,
                          int warp, int lane) {
  for (int unit = warp; inside(unit, share.strips * kTokens); unit += kWarps) {
    const int strip = unit / kTokens, token = unit % kTokens;
    float2* const first = hopper_sums<kTokens>(exchange, strip, token, lane);
    float2 sum = *first;
    for (int w = strip + p.strips; w < kWarps; w += p.strips) {
      const float2 part = *hopper_sums<kTokens>(exchange, w, token, lane);
      sum.x += part.x;
      sum.y += part.y;
    }
    *first = sum;
  }
}

inline constexpr int kMostCluster = 8;  // what every device takes

// In the order of ranks, and into y. A cluster's warps share its tokens and strips out among them.
template <int kTokens, int kWarps>
__device__ void store_ranks(const GemmParams& p, const HopperShare& share, uint8_t* exchange,
                            int warp, int lane) {
  const int rank = static_cast<int>(ptx::cluster_rank());
  for (int unit = rank * kWarps + warp; inside(unit, share.strips * kTokens);
       unit += p.cluster * kWarps) {
    const int strip = unit / kTokens, token = unit % kTokens;
    if (!inside(share.token + token, p.x.M)) continue;
    const float2* const own = hopper_sums<kTokens>(exchange, strip, token, lane);
    float2 parts[kMostCluster];
#pragma unroll
    for (int r = 0; r < kMostCluster; ++r) {
      if (r < p.cluster) parts[r] = ptx::load_cluster(own, static_cast<uint32_t>(r));
    }
    float values[2] = {parts[0].x, parts[0].y};
#pragma unroll
    for (int r = 1; r < kMostCluster; ++r) {
      if (r >= p.cluster) break;
      values[0] += parts[r].x;
      values[1] += parts[r].y;
    }
    const int64_t n = int64_t{share.strip + strip} * kStripRows + 2 * lane;
    float bias[2];
    load_bias(p.y, n, p.w.N, bias);
    store_row(p.y, share.token + token, n, p.w.N, values, bias);
  }
}

// ---- the kernel --------------------------------------------------------------------------------------------------------

// kTile is the shape's row in kTiles, whose warps multiply; one more copies.
template <Format kFormat, class T, int kTile>
__global__ void __launch_bounds__(kTiles[kTile].threads() + 32, kTiles[kTile].blocks_per_sm)
    hopper_stream_kernel(const GemmParams p, const HopperLayout layout) {
  constexpr Tile tile = kTiles[kTile];
  constexpr int warps = tile.warps(), tokens = tile.tokens;
  using Step = StepSums<kFormat, T, tokens, kTileK / kCellK>;
  static_assert(tile.step == kTileK, "a step is a tile of the layout");

  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  uint64_t* const full = reinterpret_cast<uint64_t*>(dynamic_shared());
  uint64_t* const empty = full + kMostStages;
  uint8_t* const ring = dynamic_shared() + layout.first_stage;
  const HopperShare share(p, tokens);
  HopperCopier<kFormat, tokens> copier(p, layout, share, ring, lane);
  if (warp == warps) {
    if (lane == 0) {
#pragma unroll 1
      for (int s = 0; s < p.stages; ++s) {
        ptx::mbarrier_init(full + s, 32 + 1);  // each lane's part of x; the announcement of weights
        ptx::mbarrier_init(empty + s, static_cast<uint32_t>(share.strips));
      }
      ptx::fence_mbarrier_init();
    }
    copier.clear();
  }
  ptx::sync_block();

  // Warps in the order of their sums: turn 0 of strips 0, 1, ..., turn 1, ...
  const int strip = warp % p.strips, turn = warp / p.strips;
  typename Step::Sums sums;
  Step::clear(sums);
  if (warp == warps) {
    copier.run(full, empty);
  } else if (inside(strip, share.strips)) {
    multiply_turns<Step>(p, layout, share, ring, full, empty, strip, turn, warps / p.strips, lane,
                         sums);
  }
  ptx::sync_block();  // nobody reads the stages any more
  if (warp < warps) {
#pragma unroll
    for (int b = 0; b < tokens / 8; ++b) {
#pragma unroll
      for (int i = 0; i < kFragments; ++i)
        place_fragment(reinterpret_cast<float*>(ring) + (warp * tokens + 8 * b) * kPaddedRows, lane,
                       i, sums[i][b]);
    }
  }
  ptx::sync_block();
  if (warp < warps) add_turns<tokens, warps>(p, share, ring, warp, lane);
  ptx::grid_wait();  // for the bias, which these threads read themselves
  if (p.cluster > 1) ptx::sync_cluster();
  if (warp < warps) store_ranks<tokens, warps>(p, share, ring, warp, lane);
  if (p.cluster > 1) {  // a block's sums are there until all have read them
    ptx::cluster_arrive_relaxed();
    ptx::cluster_wait();
  }
}

// Starts the kernel of a format and a tile for x's type.
template <Format kFormat, int kTile>
void start_hopper_stream(const GemmParams& p, Stream stream) {
  constexpr Tile tile = kTiles[kTile];
  const HopperLayout layout = hopper_layout(tile, p.w, p.strips);
  LaunchOptions options;
  options.cluster = static_cast<uint32_t>(p.cluster);
  options.dependent = true;
  options.depends = p.x.data;
  options.depends_bytes = 2 * ((p.x.M - 1) * p.x.stride + p.w.K);
  with_type(tile.name, p.x.type, [&](auto type) {
    launch_with(options, tile.name, hopper_stream_kernel<kFormat, decltype(type), kTile>,
                Grid{static_cast<uint32_t>(p.schedule.blocks)}, tile.threads() + 32,
                hopper_shared_bytes(tile, layout, p.stages), stream, p, layout);
  });
}

inline constexpr int kHopperM8 = tile_index("hopper_stream_m8"),
                     kHopperM16 = tile_index("hopper_stream_m16");

// Instantiated by hopper_stream*.cu, a few formats each.
template <Format kFormat>
void run_hopper_stream(const GemmParams& p, int tile, Stream stream);

#define LOWBIT_INSTANTIATE_HOPPER_STREAM(format)                                 \
  template <>                                                                    \
  void run_hopper_stream<format>(const GemmParams& p, int tile, Stream stream) { \
    if (tile == kHopperM8) {                                                     \
      start_hopper_stream<format, kHopperM8>(p, stream);                         \
    } else {                                                                     \
      start_hopper_stream<format, kHopperM16>(p, stream);                        \
    }                                                                            \
  }

}  // namespace lowbit::cuda
