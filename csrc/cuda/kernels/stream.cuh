// GEMM for few tokens (M <= 16): y[M, N] = x[M, K] W[N, K]^T + bias, bound by the bytes of W.
//
// A block computes a strip of 64 output rows. Its eight warps take turns at the steps of 64 k:
//
//   steps of the block's range   0    1    2    3    4    5    6    7    8    9   ...
//   warp                         0    1    2    3    4    5    6    7    0    1   ...
//
// so that neighbouring warps read neighbouring memory, and each warp has a ring of stages of its own: it issues copies,
// waits for them and refills what it has read, without ever waiting for another warp. What is in flight is then up to
// 16 warps x 3 steps x 2 KB of codes on a multiprocessor: twice what latency x bandwidth asks for on an H200.
//
// What a warp makes of a step is in step_sums.cuh.
//
// After the last step the warps' sums are added in the order of warps, then, where blocks share the strip, the blocks'
// sums in the order of K. Both orders are fixed: the same call gives the same bits.
#pragma once

#include <cstdint>

#include "cuda/epilogue.cuh"
#include "cuda/kernels/formats.h"
#include "cuda/kernels/launch_tile.cuh"
#include "cuda/launchers.h"
#include "cuda/pipeline.cuh"
#include "cuda/scales.cuh"
#include "cuda/schedule.cuh"
#include "cuda/stages.h"
#include "cuda/step_sums.cuh"
#include "cuda/warp_sums.cuh"

namespace lowbit::cuda {

// One warp's work: kTokens columns of sums for the 64 rows of a strip.
template <Format kFormat, class T, int kTokens, int kWarps>
class StreamWarp {
 public:
  using Step = StepSums<kFormat, T, kTokens, kStepCells>;
  using Sums = typename Step::Sums;

  __device__ StreamWarp(const GemmParams& p, const StageLayout& layout)
      : p_(p),
        layout_(layout),
        warp_(static_cast<int>(threadIdx.x) / 32),
        lane_(static_cast<int>(threadIdx.x) % 32),
        ring_(dynamic_shared() + warp_ * p.stages * layout.bytes),
        strip_(p.w, layout, lane_),
        tokens_(p.x, p.w.K, lane_),
        step_(p.w, lane_) {}

  // sums[fragment][8 tokens][register of D] = this warp's steps of the segment.
  __device__ void multiply(const Segment& segment, Sums& sums) {
    Step::clear(sums);
    step_.start();
    tokens_.start(segment.tile_m * kTokens, ring_ + layout_.x, p_.stages, layout_.bytes);
    int fetched = segment.first + warp_;
    Source from{strip_.tile(segment.tile_n, fetched),
                tokens_.row(segment.tile_m * kTokens, fetched),
                static_cast<uint32_t>(fetched) % Strip::kTileSteps};
    uint8_t *filled = ring_, *read = ring_;
    int ahead = p_.stages - 1;  // copies to start before the first wait
    for (int step = fetched; ahead > 0 || step < segment.last;) {
      if (ahead == 0) {
        wait_for_oldest(p_.stages);
        // Every lane's copies are here, and every lane is done with the stage refilled next.
        ptx::sync_warp();
        if (!p_.w.plain) {
          strip_.expand(step, read, 0);
          ptx::sync_warp();
        }
      }
      if (inside(fetched, segment.last)) fetch(from, fetched, filled);
      ptx::cp_async_commit();  // an empty group too: waiting counts groups
      fetched += kWarps;
      advance(filled);
      if (ahead > 0) {
        --ahead;
        continue;
      }
      step_.add_step({read, read + layout_.x, group_rows(p_.w, layout_, read, 0, 0)},
                     step * kStepCells, sums);
      advance(read);
      step += kWarps;
    }
  }

  __device__ int warp() const { return warp_; }
  __device__ int lane() const { return lane_; }

 private:
  __device__ void advance(uint8_t*& stage) const {
    stage += layout_.bytes;
    if (stage == ring_ + p_.stages * layout_.bytes) stage = ring_;
  }

  using Strip = StripFetcher<kFormat, 32, Reuse::kNone>;
  using Tokens = TokenFetcher<kTokens, 32>;
  static_assert(kWarps % Strip::kTileSteps == 0,
                "a warp's steps are all the same part of their tiles");

  // Where the next step's bytes come from.
  struct Source {
    const uint8_t* tile;
    const uint8_t* row;
    uint32_t part;
  };
  __device__ void fetch(Source& from, int step, uint8_t* stage) const {
    strip_.fetch(from.tile, from.part, step, stage, 0);
    tokens_.fetch(from.row, step, stage + layout_.x);
    from.tile += kWarps / Strip::kTileSteps * p_.w.tile_bytes;
    from.row += kWarps * kStep * 2;
  }

  const GemmParams& p_;
  const StageLayout& layout_;
  const int warp_, lane_;
  uint8_t* const ring_;
  Strip strip_;
  Tokens tokens_;
  Step step_;
};

// kTile is the shape's row in kTiles.
template <Format kFormat, class T, int kTile>
__global__ void __launch_bounds__(kTiles[kTile].threads(), kTiles[kTile].blocks_per_sm)
    stream_kernel(const GemmParams p, const StageLayout layout) {
  constexpr Tile tile = kTiles[kTile];
  static_assert(tile.rows == kStripRows && tile.step == kStep, "a strip, in steps of half a tile");
  static_assert(tile.tokens == 8 || tile.tokens == 16, "one or two column blocks of mma");
  static_assert(tile.tokens % tile.warps() == 0, "warps store whole tokens");
  constexpr int warps = tile.warps();

  StreamWarp<kFormat, T, tile.tokens, warps> warp(p, layout);
  uint32_t* const elected = reinterpret_cast<uint32_t*>(dynamic_shared() + election_offset(tile));
  Share share(p.schedule, blockIdx.x);
  for (Segment segment; share.next(segment); ptx::sync_block()) {
    float sums[kFragments][tile.tokens / 8][4];
    warp.multiply(segment, sums);
    float values[tile.tokens / 4];
    add_warps<warps>(sums, warp.warp(), warp.lane(), values);
    if (!segment.whole &&
        !sum_segments<32 * warps>(p.schedule, segment, blockIdx.x, values, elected)) {
      continue;
    }
    store_added<warps>(p.y, int64_t{segment.tile_m} * tile.tokens, p.x.M,
                       int64_t{segment.tile_n} * kStripRows, p.w.N, warp.warp(), warp.lane(),
                       values);
  }
}

// Starts the kernel of a format and a tile for x's type.
template <Format kFormat, int kTile>
void start_stream(const GemmParams& p, Stream stream) {
  with_type(kTiles[kTile].name, p.x.type, [&](auto type) {
    launch_tile<kTile>(stream_kernel<kFormat, decltype(type), kTile>, p, stream);
  });
}

inline constexpr int kStreamM8 = tile_index("stream_m8"), kStreamM16 = tile_index("stream_m16");

// Instantiated by stream_*.cu, a few formats each.
template <Format kFormat>
void run_stream(const GemmParams& p, int tile, Stream stream);

#define LOWBIT_INSTANTIATE_STREAM(format)                                 \
  template <>                                                             \
  void run_stream<format>(const GemmParams& p, int tile, Stream stream) { \
    if (tile == kStreamM8) {                                              \
      start_stream<format, kStreamM8>(p, stream);                         \
    } else {                                                              \
      start_stream<format, kStreamM16>(p, stream);                        \
    }                                                                     \
  }

}  // namespace lowbit::cuda
