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
// Weights are mma's A operand, 16 output rows, and tokens its B operand, 8 columns: one mma per 16 x 16 weights serves up
// to eight tokens, and no decoded weight is wasted. Codes are multiplied as exact 16-bit numbers. A group's fp32 sums are
// multiplied by its scale, which costs 1/8 of an instruction per weight with 8 tokens and rounds nothing.
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
#include "cuda/warp_sums.cuh"

namespace lowbit::cuda {

// One warp's work: kTokens columns of sums for the 64 rows of a strip.
template <Format kFormat, class T, int kTokens, int kWarps>
class StreamWarp {
 public:
  static constexpr int kBlocks8 = kTokens / 8;  // of tokens, as mma takes them
  using Words = typename Codec<kFormat>::Words;
  using Sums = float[kFragments][kBlocks8][4];

  __device__ StreamWarp(const GemmParams& p, const StageLayout& layout)
      : p_(p),
        layout_(layout),
        warp_(static_cast<int>(threadIdx.x) / 32),
        lane_(static_cast<int>(threadIdx.x) % 32),
        ring_(dynamic_shared() + warp_ * p.stages * layout.bytes),
        strip_(p.w, layout, lane_),
        tokens_(p.x, p.w.K, lane_),
        group_of_(p.w),
        cells_((p.w.K + kCellK - 1) / kCellK),
        scale_sums_(!Codec<kFormat>::kInteger || !has_fractions(p.w)),
        one_group_(scale_sums_ && (p.w.groups == 1 || p.w.group_size % kStep == 0)) {}

  // sums[fragment][8 tokens][register of D] = this warp's steps of the segment.
  __device__ void multiply(const Segment& segment, Sums& sums) {
    clear(sums);
    if (p_.w.zero_kind != ZeroKind::kInt) load_zeros<kFormat, T>(p_.w, nullptr, 0, zeros_);
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
      }
      if (inside(fetched, segment.last)) fetch(from, fetched, filled);
      ptx::cp_async_commit();  // an empty group too: waiting counts groups
      fetched += kWarps;
      advance(filled);
      if (ahead > 0) {
        --ahead;
        continue;
      }
      multiply_step(read, step, sums);
      advance(read);
      step += kWarps;
    }
  }

  __device__ int warp() const { return warp_; }
  __device__ int lane() const { return lane_; }

 private:
  static __device__ void clear(Sums& sums) {
#pragma unroll
    for (int i = 0; i < kFragments; ++i) {
#pragma unroll
      for (int b = 0; b < kBlocks8; ++b) {
#pragma unroll
        for (int r = 0; r < 4; ++r) sums[i][b][r] = 0.0f;
      }
    }
  }

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

  // B fragments of some cells. A matrix of ldmatrix is 8 tokens x 8 k, two of them are a fragment, four come at
  // once: of two cells with 8 tokens, of one with 16. With 8 tokens and one cell the other two are thrown away.
  template <int kCells>
  __device__ void load_tokens(const uint8_t* x, int c, uint32_t (&b)[kCells][kBlocks8][2]) const {
    const int matrix = lane_ / 8, half = matrix % 2, other = matrix / 2;
#pragma unroll
    for (int j = 0; j < kCells * kBlocks8; j += 2) {
      uint32_t four[4];
      if constexpr (kBlocks8 == 2) {
        ptx::ldmatrix_x4(four, x + swizzled(lane_ % 8 + 8 * other, 2 * (c + j / 2) + half));
      } else {
        const int cell = c + j + (kCells == 1 ? 0 : other);
        ptx::ldmatrix_x4(four, x + swizzled(lane_ % 8, 2 * cell + half));
      }
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int at = j + r / 2;
        if (at < kCells * kBlocks8) b[at / kBlocks8][at % kBlocks8][r % 2] = four[r];
      }
    }
  }

  __device__ void multiply_step(const uint8_t* stage, int step, Sums& sums) {
    const int begin = step * kStepCells;
    if (one_group_ && begin + kStepCells <= cells_) {
      const GroupRows rows = group_rows(p_.w, layout_, stage, 0, 0);
      if (p_.w.zero_kind == ZeroKind::kInt)
        load_zeros<kFormat, T>(p_.w, rows.zeros, lane_ / 4, zeros_);
      Sums part;
      clear(part);
      constexpr int at_once = kBlocks8 == 1 ? kStepCells : 1;  // as registers allow
#pragma unroll 1
      for (int c = 0; c < kStepCells; c += at_once)
        multiply_cells<at_once, true>(stage, c, rows, part);
      add_group(rows, part, sums);
    } else {
      multiply_groups(stage, begin, sums);
    }
  }

  // A step of several groups, or one in which K ends, or weights that are scaled before.
  __device__ void multiply_groups(const uint8_t* stage, int begin, Sums& sums) {
    const int cells = cells_ - begin < kStepCells ? cells_ - begin : kStepCells;
    GroupRows rows = group_rows(p_.w, layout_, stage, 0, 0);
    int group = group_of_(begin);
#pragma unroll 1
    for (int c = 0; c < cells; ++group) {
      if (p_.w.zero_kind == ZeroKind::kInt)
        load_zeros<kFormat, T>(p_.w, rows.zeros, lane_ / 4, zeros_);
      Sums part;
      clear(part);
      const int left = group_of_.left(begin + c, group);
      const int end = left < cells - c ? c + left : cells;
      if constexpr (kBlocks8 == 1) {
#pragma unroll 1
        for (; scale_sums_ && c + 2 <= end; c += 2) multiply_cells<2, true>(stage, c, rows, part);
      }
#pragma unroll 1
      for (; scale_sums_ && c < end; ++c) multiply_cells<1, true>(stage, c, rows, part);
      if constexpr (Codec<kFormat>::kInteger) {
#pragma unroll 1
        for (; c < end; ++c) multiply_cells<1, false>(stage, c, rows, part);
      }
      add_group(rows, part, sums);
      rows.scales += p_.w.scale_row_bytes;
      rows.zeros += p_.w.zero_row_bytes;
    }
  }

  // Codes as they are, or scaled before.
  template <int kCells, bool kAsTheyAre>
  __device__ void multiply_cells(const uint8_t* stage, int c, const GroupRows& rows,
                                 Sums& part) const {
    uint32_t b[kCells][kBlocks8][2];
    load_tokens(stage + layout_.x, c, b);
#pragma unroll
    for (int j = 0; j < kCells; ++j) {
      Words words;
      load_cell<kFormat, kStepCells>(stage, c + j, lane_, words);
#pragma unroll
      for (int i = 0; i < kFragments; ++i) {
        uint32_t a[4];
        Codec<kFormat>::template decode<T>(words, i, zeros_[2 * i], zeros_[2 * i + 1], a);
        if constexpr (!kAsTheyAre) scale_floats<kFormat, T>(p_.w, words, i, rows, lane_ / 4, a);
#pragma unroll
        for (int n = 0; n < kBlocks8; ++n) T::mma(part[i][n], a, b[j][n][0], b[j][n][1]);
      }
    }
  }

  // sums += scale * part, or += part where weights were scaled before.
  __device__ void add_group(const GroupRows& rows, const Sums& part, Sums& sums) const {
    float scales[kLaneRows] = {1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f};
    if (scale_sums_) load_eight<kFormat>(p_.w, rows.scales, lane_ / 4, scales);
#pragma unroll
    for (int i = 0; i < kFragments; ++i) {
#pragma unroll
      for (int b = 0; b < kBlocks8; ++b) {
#pragma unroll
        for (int r = 0; r < 4; ++r)
          sums[i][b][r] = ptx::fma_rn(part[i][b][r], scales[2 * i + r / 2], sums[i][b][r]);
      }
    }
  }

  const GemmParams& p_;
  const StageLayout& layout_;
  const int warp_, lane_;
  uint8_t* const ring_;
  Strip strip_;
  Tokens tokens_;
  const GroupOfCell group_of_;
  const int cells_;
  const bool scale_sums_;  // codes are multiplied as they are
  const bool one_group_;   // and a step lies in one group
  uint32_t zeros_[kLaneRows] = {};
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
