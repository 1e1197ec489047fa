// GEMM of 8-bit activations, what all of its kernels have in common: y[M, N] = x[M, K] W[N, K]^T, with scales of x.
//
// Weights are mma's A operand (16 output rows), tokens its B operand (8 columns), in steps of 64 k: four cells of 16.
// Two ways to share the work, by the tile (tiles.h):
//
//   few tokens     a strip of 64 rows; warps take turns at the steps, each with a ring of stages of its own, and their
//                  sums are added in the order of warps at the end
//   many tokens    strips side by side and tokens side by side, 64 x 32 a warp; one ring for the block
//
// x arrives as it is in memory. Whoever copied 16 bytes (a cell of one token) puts them into the order that codes have as
// bytes (codec/bytes.cuh) when they are there, before anyone else looks at them.
//
// What a kernel multiplies, and in what its sums are kept while a group lasts, is its Math:
//
//   Math::Part                      int32_t or float: what mma adds up
//   Math::kCells                    of 16 k in one multiplication: 1 or 2
//   Math::kMostK                    after so many k (a multiple of 64) parts are added to the fp32 sums, group or not
//   Math::kCompiled                whether this architecture has the instructions
//   Math::kUnit                     what the sums are to be multiplied by at the end
//   Math(p, lane, m)                registers of its own; m is the token of the warp's first column
//   math.multiply(codes, rows, cell, two, b, parts)
//                                   parts += cell (and the next, if two) times b
//   math.settle(rows, part, parts)  the cells of a step that lie in one group are done, while they are still at hand
//   math.add(rows, k, sums, parts)  sums += parts, in units of x's scale per token, and parts = 0; k is the last one
//   math.pad(token)                 the byte that stands for zero in a row of x
#pragma once

#include <cstdint>

#include "cuda/codec/bytes.cuh"
#include "cuda/kernels/formats.h"
#include "cuda/kernels/launch_tile.cuh"
#include "cuda/launchers.h"
#include "cuda/pipeline.cuh"
#include "cuda/scales.cuh"
#include "cuda/schedule.cuh"
#include "cuda/stages.h"
#include "cuda/warp_sums.cuh"

namespace lowbit::cuda {

inline constexpr int kBytePieces = kStep / 16;  // of 16 bytes, in a row of a step of x: its cells

// Bytes of x[token][cell] in a stage. Two rows are as long as all banks together: exclusive-or by the pair of rows spreads
// eight rows over all of them.
__device__ constexpr int swizzled_cell(int token, int cell) {
  return token * kStep + ((cell ^ (token / 2 & 3)) << 4);
}

// 8-bit tokens of a step into a stage, and there into order. Thread i has the same pieces in both.
template <int kTokens, int kThreads>
struct TokenBytes {
  static constexpr int kPieces = kTokens * kBytePieces;
  static constexpr int kEach = kPieces / kThreads;
  static constexpr int kApart = kThreads / kBytePieces;  // tokens between a thread's pieces
  static_assert(kPieces % kThreads == 0 && kThreads % kBytePieces == 0,
                "each thread one column of pieces");

  static __device__ int cell(int thread) { return thread % kBytePieces; }
  static __device__ int token(int thread, int j) { return thread / kBytePieces + j * kApart; }
  // Bytes of this thread's pieces that lie before K.
  static __device__ int wanted(int K, int step, int thread) {
    const int left = K - step * kStep - 16 * cell(thread);
    return left < 0 ? 0 : left < 16 ? left : 16;
  }

  // Rows past M and columns past K become zeros, and are not read.
  static __device__ void fetch(const RowsParams& x, int K, int m0, int step, int thread,
                               uint8_t* to) {
    const int columns = wanted(K, step, thread), first = m0 + token(thread, 0);
    const uint8_t* data = static_cast<const uint8_t*>(x.data);
    const uint8_t* from = data + first * x.stride + step * kStep + 16 * cell(thread);
#pragma unroll
    for (int j = 0; j < kEach; ++j, from += kApart * x.stride) {
      const int bytes = inside(first + j * kApart, x.M) ? columns : 0;
      ptx::cp_async_16(to + swizzled_cell(token(thread, j), cell(thread)), bytes > 0 ? from : data,
                       bytes);
    }
  }

  // After the wait for this thread's own copies. Where x has zeros, the bytes past K become `pad(token)`.
  template <class Math>
  static __device__ void arrange(const Math& math, int K, int m0, int step, int thread,
                                 uint8_t* in) {
    const int columns = wanted(K, step, thread);
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      uint4* piece = reinterpret_cast<uint4*>(in + swizzled_cell(token(thread, j), cell(thread)));
      uint4 bytes = *piece;
      if (columns < 16) bytes = padded(bytes, columns, math.pad(m0 + token(thread, j)));
      *piece = order_bytes(bytes);
    }
  }

 private:
  // The bytes from `columns` on replaced by `pad`, twice a pair; they are zero.
  static __device__ uint4 padded(const uint4& bytes, int columns, uint32_t pad) {
    const auto word = [&](uint32_t value, int first) {
      const int left = columns - first;  // of this word, to keep
      return left >= 4 ? value : value | pad * 0x01010101u << (left > 0 ? 8 * left : 0);
    };
    return make_uint4(word(bytes.x, 0), word(bytes.y, 4), word(bytes.z, 8), word(bytes.w, 12));
  }
};

// Scales of x for the tokens that a lane has in D: 8b + 2t and the next. One per token, or that of k's group of 128.
template <int kBlocks8>
__device__ void load_x_scales(const RowsParams& x, int m, int lane, int k,
                              float (&to)[kBlocks8][2]) {
#pragma unroll
  for (int j = 0; j < 2 * kBlocks8; ++j) {
    const int token = m + 8 * (j / 2) + 2 * (lane % 4) + j % 2;
    const int64_t at = int64_t{token} * x.scale_groups + (x.scale_groups == 1 ? 0 : k / 128);
    to[j / 2][j % 2] = inside(token, x.M) ? x.scales[at] : 0.0f;
  }
}

// sums += parts * scale of the row's group (* scale of the token's), parts = 0. `k` is the last that parts hold.
template <Format kFormat, class Part, int kBlocks8>
__device__ void add_scaled(const GemmParams& p, const GroupRows& rows, int m, int lane, int k,
                           float (&sums)[kFragments][kBlocks8][4],
                           Part (&parts)[kFragments][kBlocks8][4]) {
  const bool by_group = p.x.scale_groups > 1;  // else tokens are scaled once, at the end
  float x_scale[kBlocks8][2];
  if (by_group) load_x_scales(p.x, m, lane, k, x_scale);
#pragma unroll
  for (int i = 0; i < kFragments; ++i) {
    const float2 scale =
        load_two(rows.scales, 8 * (lane / 4) + 2 * i, p.w.scale_dtype, is_block<kFormat>(p.w));
#pragma unroll
    for (int j = 0; j < 4 * kBlocks8; ++j) {
      float value = static_cast<float>(parts[i][j / 4][j % 4]);
      parts[i][j / 4][j % 4] = 0;
      if (by_group) value = ptx::mul_rn(value, x_scale[j / 4][j % 2]);
      sums[i][j / 4][j % 4] =
          ptx::fma_rn(value, j % 4 < 2 ? scale.x : scale.y, sums[i][j / 4][j % 4]);
    }
  }
}

// B fragments of 8 * kBlocks8 tokens from `token` on. A matrix of ldmatrix is a cell of 8 tokens. `two`: the second register
// is of the next cell; else it is the first again.
template <int kBlocks8, int kCells>
__device__ void load_token_bytes(const uint8_t* x, int token, int lane, int cell, bool two,
                                 uint32_t (&b)[kBlocks8][kCells]) {
  static_assert(kBlocks8 * kCells % 4 == 0, "four matrices at a time");
#pragma unroll
  for (int j = 0; j < kBlocks8 * kCells; j += 4) {
    const int matrix = j + lane / 8;
    uint32_t four[4];
    ptx::ldmatrix_x4(four, x + swizzled_cell(token + matrix / kCells * 8 + lane % 8,
                                             cell + (two ? matrix % kCells : 0)));
#pragma unroll
    for (int i = 0; i < 4; ++i) b[(j + i) / kCells][(j + i) % kCells] = four[i];
  }
}

// A part of a step, for one warp.
struct StepPart {
  const uint8_t* codes;  // of the warp's strip
  const uint8_t* x;      // of the block
  int token;             // the warp's first in x
  int first, last;       // cells of the step
  int k;                 // of cell 0
};

template <template <Format, int> class MathOf, Format kFormat, int kTile>
class A8Warp {
 public:
  static constexpr Tile kShape = kTiles[kTile];
  static constexpr bool kTurns = takes_turns(kShape);
  static constexpr int kStrips = kShape.rows / kStripRows;
  static constexpr int kTeam = kTurns ? 32 : kShape.threads();  // threads that share a ring
  static constexpr int kStripThreads = kTeam / kStrips;
  static constexpr int kTokens = kShape.tokens / kShape.warps_m;  // of a warp
  static constexpr int kBlocks8 = kTokens / 8;
  static_assert(kShape.step == kStep, "steps of half a tile");
  static_assert(kTurns ? kStrips == 1 && kShape.warps_m == 1
                       : kShape.warps_n == kStrips && kShape.warps_k == 1,
                "warps divide either the steps, or rows and tokens");
  using Math = MathOf<kFormat, kBlocks8>;
  using Sums = float[kFragments][kBlocks8][4];
  using Bytes = TokenBytes<kShape.tokens, kTeam>;
  using Weights = StripFetcher<kFormat, kStripThreads, kTurns ? Reuse::kNone : Reuse::kTokens>;

  __device__ A8Warp(const GemmParams& p, const StageLayout& layout)
      : p_(p),
        layout_(layout),
        warp_(static_cast<int>(threadIdx.x) / 32),
        lane_(static_cast<int>(threadIdx.x) % 32),
        member_(kTurns ? lane_ : static_cast<int>(threadIdx.x)),
        strip_(kTurns ? 0 : warp_ % kStrips),
        ring_(dynamic_shared() + (kTurns ? warp_ * p.stages * layout.bytes : 0)),
        group_of_(p.w),
        cells_((p.w.K + kCellK - 1) / kCellK),
        weights_(p.w, layout, member_ % kStripThreads) {}

  // This warp's share of the segment, scaled.
  __device__ void multiply(const Segment& segment, Sums& sums) {
    constexpr int turns = kTurns ? kShape.warps() : 1;
    for_each_value(sums, 0, [](float& v, int) { v = 0.0f; });
    m0_ = segment.tile_m * kShape.tokens;
    const int m = m0_ + first_token();
    Math math(p_, lane_, m);
    Parts parts = {};  // of a group
    int count = 0;     // k in parts
    const bool has_rows = inside(segment.tile_n * kStrips + strip_, p_.w.strips);
    int step = segment.first + (kTurns ? warp_ : 0), read = 0;
    for (int j = 0; j < p_.stages - 1; ++j) fetch(segment, step + j * turns, j);
    for (; step < segment.last; step += turns) {
      uint8_t* stage = ring_ + read * layout_.bytes;
      wait_for_oldest(p_.stages);
      Bytes::arrange(math, p_.w.K, m0_, step, member_, stage + layout_.x);
      sync_team();  // x is in order, all copies are here, and every warp is done with the stage refilled next
      fetch(segment, step + (p_.stages - 1) * turns, read == 0 ? p_.stages - 1 : read - 1);
      if (!p_.w.plain) {
        weights_.expand(step, stage, member_ / kStripThreads);
        sync_team();
      }
      if (has_rows)
        multiply_step(stage, step, kTurns || step + 1 == segment.last, math, parts, count, sums);
      read = read + 1 == p_.stages ? 0 : read + 1;
    }
    ptx::cp_async_wait<0>();
    sync_team();  // what follows lies over the ring
    scale_tokens(m, sums);
  }

  __device__ int warp() const { return warp_; }
  __device__ int lane() const { return lane_; }
  __device__ int strip() const { return strip_; }
  __device__ int first_token() const { return kTurns ? 0 : warp_ / kStrips * kTokens; }

 private:
  using Parts = typename Math::Part[kFragments][kBlocks8][4];

  static __device__ void sync_team() {
    if constexpr (kTurns) {
      ptx::sync_warp();
    } else {
      ptx::sync_block();
    }
  }

  // Starts the team's copies of a step, if there is one; always a group of copies, so that waiting can count.
  __device__ void fetch(const Segment& segment, int step, int slot) const {
    if (step < segment.last) {
      uint8_t* stage = ring_ + slot * layout_.bytes;
      // A thread copies for the strip of its share of the team, which need not be the one that its warp multiplies.
      const int place = member_ / kStripThreads, strip = segment.tile_n * kStrips + place;
      if (inside(strip, p_.w.strips))
        weights_.fetch(weights_.tile(strip, step),
                       static_cast<uint32_t>(step % Weights::kTileSteps), step, stage, place);
      Bytes::fetch(p_.x, p_.w.K, m0_, step, member_, stage + layout_.x);
    }
    ptx::cp_async_commit();
  }

  // Cells by ones or twos, never across the end of a group. A loop that is not unrolled, because its body is long.
  __device__ void multiply_step(const uint8_t* stage, int step, bool last, Math& math, Parts& parts,
                                int& count, Sums& sums) const {
    const int first_group = group_of_(step * kStepCells);
    const int left = cells_ - step * kStepCells, cells = left < kStepCells ? left : kStepCells;
    StepPart part{
        stage + codes_at<kFormat>(strip_), stage + layout_.x, first_token(), 0, 0, step * kStep};
#pragma unroll 1
    while (part.last < cells) {
      const int c = part.last, cell = step * kStepCells + c, group = group_of_(cell);
      const bool two = Math::kCells == 2 && inside(c + 1, cells) && group_of_(cell + 1) == group;
      const GroupRows rows = group_rows(p_.w, layout_, stage, strip_, group - first_group);
      uint32_t b[kBlocks8][Math::kCells];
      load_token_bytes(part.x, part.token, lane_, c, two, b);
      math.multiply(part.codes, rows, c, two, b, parts);
      part.last += two ? 2 : 1;
      count += two ? 2 * kCellK : kCellK;
      const int next = step * kStepCells + part.last;
      const bool step_ends = !inside(part.last, cells), group_ends = group_of_(next) != group;
      if (!step_ends && !group_ends) continue;
      math.settle(rows, part, parts);
      part.first = part.last;
      if (group_ends || last || count >= Math::kMostK || (p_.x.scale_groups > 1 && next % 8 == 0)) {
        math.add(rows, next * kCellK - 1, sums, parts);
        count = 0;
      }
    }
  }

  __device__ void scale_tokens(int m, Sums& sums) const {
    float scale[kBlocks8][2];
    if (p_.x.scale_groups == 1) load_x_scales(p_.x, m, lane_, 0, scale);
#pragma unroll
    for (int i = 0; i < kFragments; ++i) {
#pragma unroll
      for (int b = 0; b < kBlocks8; ++b) {
#pragma unroll
        for (int r = 0; r < 4; ++r)
          sums[i][b][r] *= (p_.x.scale_groups == 1 ? scale[b][r % 2] : 1.0f) * Math::kUnit;
      }
    }
  }

  const GemmParams& p_;
  const StageLayout& layout_;
  const int warp_, lane_;
  const int member_;  // of the team
  const int strip_;   // of the block's
  uint8_t* const ring_;
  const GroupOfCell group_of_;
  const int cells_;
  int m0_ = 0;  // the tile's first token
  const Weights weights_;
};

// All of a block's work.
template <template <Format, int> class MathOf, Format kFormat, int kTile>
__device__ void run_block(const GemmParams& p, const StageLayout& layout) {
  using Warp = A8Warp<MathOf, kFormat, kTile>;
  constexpr Tile tile = kTiles[kTile];
  Warp warp(p, layout);
  uint32_t* const elected = reinterpret_cast<uint32_t*>(dynamic_shared() + election_offset(tile));
  Share share(p.schedule, blockIdx.x);
  for (Segment segment; share.next(segment); ptx::sync_block()) {
    const int64_t n = (int64_t{segment.tile_n} * Warp::kStrips + warp.strip()) * kStripRows;
    const int64_t m = int64_t{segment.tile_m} * tile.tokens + warp.first_token();
    typename Warp::Sums sums;
    warp.multiply(segment, sums);
    if constexpr (Warp::kTurns) {
      float values[2 * tile.tokens / tile.warps()];
      add_warps<tile.warps()>(sums, warp.warp(), warp.lane(), values);
      if (!segment.whole &&
          !sum_segments<tile.threads()>(p.schedule, segment, blockIdx.x, values, elected)) {
        continue;
      }
      store_added<tile.warps()>(p.y, m, p.x.M, n, p.w.N, warp.warp(), warp.lane(), values);
    } else {
      if (!segment.whole &&
          !sum_segments<tile.threads()>(p.schedule, segment, blockIdx.x, sums, elected)) {
        continue;
      }
      float* turned = reinterpret_cast<float*>(dynamic_shared()) + warp.warp() * 8 * kPaddedRows;
      store_sums(p.y, m, p.x.M, n, p.w.N, warp.lane(), turned, sums);
    }
  }
}

// kTile is the shape's row in kTiles.
template <template <Format, int> class MathOf, Format kFormat, int kTile>
__global__ void __launch_bounds__(kTiles[kTile].threads(), kTiles[kTile].blocks_per_sm)
    a8_kernel(const GemmParams p, const StageLayout layout) {
  if constexpr (MathOf<kFormat, 4>::kCompiled) {
    run_block<MathOf, kFormat, kTile>(p, layout);
  } else {
    __trap();
  }
}

template <template <Format, int> class MathOf, Format kFormat, int kTile>
void start_a8(const GemmParams& p, Stream stream) {
  launch_tile<kTile>(a8_kernel<MathOf, kFormat, kTile>, p, stream);
}

}  // namespace lowbit::cuda
