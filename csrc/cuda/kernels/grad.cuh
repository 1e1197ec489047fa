// gemm_grad_input on tensor cores: dx[M, K] = dy[M, N] W[N, K] for 16-bit dy, sums over N in order, in fp32.
//
// A block computes 64 tokens x 128 columns of dx and walks over the strips of W, 64 rows each. dy is mma's A operand,
// 16 tokens x 16 n, weights its B operand, 16 n x 8 k:
//
//                   k of the block's columns
//             0     32    64    96   128
//   tokens 0  +-----+-----+-----+-----+       warp = columns / 32: two cells of 16 k, all tokens, so that each weight is
//             |  0  |  1  |  2  |  3  |       decoded by one warp only
//         64  +-----+-----+-----+-----+
//
// The layout has a pair of neighbouring k in a register and n over the lanes, which suits products that are summed over k.
// Here n is summed over and belongs into the register: movmatrix transposes each 8 x 8 piece after decoding. Registers 0
// and 1 of a decoded fragment (n 0..7 and 8..15 of k 0..7) so become B of the columns 0..7, registers 2 and 3 B of 8..15.
//
// Scales vary along n, within a product: they are multiplied into the weights, rounded once to 16 bits.
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

namespace lowbit::cuda {

inline constexpr int kGradTile = tile_index("grad_m64");

template <Format kFormat, class T>
class GradWarp {
 public:
  static constexpr Tile kShape = kTiles[kGradTile];
  // Of the block's columns: as far as a step of the layout goes.
  static constexpr int kHalves = kShape.rows / kStep;
  static constexpr int kHalfThreads = kShape.threads() / kHalves;
  static constexpr int kCells = kShape.rows / kCellK / kShape.warps();  // of a warp
  static constexpr int kTokens16 = kShape.tokens / 16;
  static_assert(kShape.step == kStripRows && kStripRows == kStep,
                "a step is a strip, and 64 columns of dy");
  static_assert(kHalves * kStep == kShape.rows && kStepCells % kCells == 0,
                "a warp stays in one half");
  using Words = typename Codec<kFormat>::Words;
  using Weights = StripFetcher<kFormat, kHalfThreads, Reuse::kTokens>;
  // [16 tokens][16 columns][8 columns of them][register of D]
  using Sums = float[kTokens16][kCells][2][4];

  __device__ GradWarp(const GemmParams& p, const StageLayout& layout)
      : p_(p),
        layout_(layout),
        lane_(static_cast<int>(threadIdx.x) % 32),
        half_(static_cast<int>(threadIdx.x) / kHalfThreads),
        first_cell_(static_cast<int>(threadIdx.x) / 32 * kCells % kStepCells),
        group_of_(p.w),
        cells_((p.w.K + kCellK - 1) / kCellK),
        scaling_(scaling_before<T>(p.w)),
        weights_(p.w, layout, static_cast<int>(threadIdx.x) % kHalfThreads),
        tokens_(p.x, p.w.N, static_cast<int>(threadIdx.x)) {}

  __device__ void multiply(const Segment& segment, Sums& sums) {
    for_each_value(sums, 0, [](float& v, int) { v = 0.0f; });
    locate(segment);
    tokens_.start(segment.tile_m * kShape.tokens, dynamic_shared() + layout_.x, p_.stages,
                  layout_.bytes);
    int fetched = segment.first, filled = 0, read = 0;
    for (int j = 0; j < p_.stages - 1; ++j) fetch(segment, fetched, filled);
    for (int strip = segment.first; strip < segment.last; ++strip) {
      wait_for_oldest(p_.stages);
      // Every thread's copies are here, and every warp is done with the stage refilled next.
      ptx::sync_block();
      fetch(segment, fetched, filled);
      if (!p_.w.plain) {
        weights_.expand(step_of(segment, half_), dynamic_shared() + read * layout_.bytes, half_);
        ptx::sync_block();
      }
      multiply_strip(dynamic_shared() + read * layout_.bytes, sums);
      advance(read);
    }
    ptx::cp_async_wait<0>();
    ptx::sync_block();  // what follows lies over the ring
  }

  // Sixteen tokens at a time through shared memory, for 16-byte stores, and for code that is there once.
  __device__ void store(const Segment& segment, const Sums& sums) const {
    constexpr int columns = kCells * kCellK, stride = columns + 2;
    static_assert(16 * stride <= 8 * kPaddedRows, "a warp's part of the exchange (stages.h)");
    const int g = lane_ / 4, t = lane_ % 4;
    float* turned =
        reinterpret_cast<float*>(dynamic_shared()) + threadIdx.x / 32 * (8 * kPaddedRows);
    const int64_t k = int64_t{step_of(segment, half_)} * kStep + first_cell_ * kCellK;
    const int64_t m = int64_t{segment.tile_m} * kShape.tokens;
    constexpr float no_bias[8] = {};
#pragma unroll
    for (int i = 0; i < kTokens16; ++i) {
#pragma unroll
      for (int j = 0; j < 2 * kCells; ++j) {  // 8 columns: k 2t, 2t + 1 of the tokens g and g + 8
        const float (&d)[4] = sums[i][j / 2][j % 2];
        float* to = turned + g * stride + 8 * j + 2 * t;
        *reinterpret_cast<float2*>(to) = make_float2(d[0], d[1]);
        *reinterpret_cast<float2*>(to + 8 * stride) = make_float2(d[2], d[3]);
      }
      ptx::sync_warp();
#pragma unroll 1
      for (int j = lane_; j < 16 * columns / 8; j += 32) {
        const int token = j / (columns / 8), first = j % (columns / 8) * 8;
        if (inside(m + 16 * i + token, p_.x.M))
          store_row(p_.y, m + 16 * i + token, k + first, p_.w.K, turned + token * stride + first,
                    no_bias);
      }
      ptx::sync_warp();
    }
  }

 private:
  __device__ void advance(int& slot) const { slot = slot + 1 == p_.stages ? 0 : slot + 1; }

  // Steps of 64 k, as the layout counts them.
  static __device__ int step_of(const Segment& segment, int half) {
    return segment.tile_n * kHalves + half;
  }

  // Which groups this warp's cells are in; the same for every strip.
  __device__ void locate(const Segment& segment) {
    const int step = step_of(segment, half_);
    const int first_group = group_of_(step * kStepCells);
#pragma unroll
    for (int c = 0; c < kCells; ++c) {
      const int cell = step * kStepCells + first_cell_ + c;
      real_[c] = inside(cell, cells_);
      const int at = real_[c] ? group_of_(cell) - first_group : 0;
      scales_at_[c] = scales_at(p_.w, layout_, half_, at);
      zeros_at_[c] = zeros_at(p_.w, layout_, half_, at);
    }
  }

  // Starts the block's copies of a strip, if there is one: half the threads to each half of its columns, all of them to dy.
  __device__ void fetch(const Segment& segment, int& strip, int& slot) const {
    if (strip < segment.last) {
      uint8_t* stage = dynamic_shared() + slot * layout_.bytes;
      const int step = step_of(segment, half_);
      if (inside(step * kStepCells, cells_)) {
        weights_.fetch(weights_.tile(strip, step),
                       static_cast<uint32_t>(step % Weights::kTileSteps), step, stage, half_);
      }
      tokens_.fetch(tokens_.row(segment.tile_m * kShape.tokens, strip), strip, stage + layout_.x);
      ++strip;
      advance(slot);
    }
    ptx::cp_async_commit();
  }

  // A fragments: 16 n of all tokens. A matrix of ldmatrix is 8 tokens x 8 n, in the order of A's registers.
  __device__ void load_tokens(const uint8_t* x, int fragment, uint32_t (&a)[kTokens16][4]) const {
    const int matrix = lane_ / 8;
#pragma unroll
    for (int i = 0; i < kTokens16; ++i)
      ptx::ldmatrix_x4(
          a[i], x + swizzled(16 * i + lane_ % 8 + matrix % 2 * 8, 2 * fragment + matrix / 2));
  }

  __device__ void multiply_strip(const uint8_t* stage, Sums& sums) const {
    Words words[kCells];
#pragma unroll
    for (int c = 0; c < kCells; ++c)
      load_cell<kFormat, kStepCells>(stage + codes_at<kFormat>(half_), first_cell_ + c, lane_,
                                     words[c]);
    // Not unrolled, for short code: the words of the fragments to come move up instead.
#pragma unroll 1
    for (int i = 0; i < kFragments; ++i) {
      uint32_t dy[kTokens16][4];
      load_tokens(stage + layout_.x, i, dy);
#pragma unroll
      for (int c = 0; c < kCells; ++c) {
        if (!real_[c]) continue;
        uint32_t b[4];
        decode(stage, words[c], c, i, b);
#pragma unroll
        for (int r = 0; r < 4; ++r) b[r] = ptx::movmatrix_transposed(b[r]);
#pragma unroll
        for (int j = 0; j < kTokens16; ++j) {
          T::mma(sums[j][c][0], dy[j], b[0], b[1]);
          T::mma(sums[j][c][1], dy[j], b[2], b[3]);
        }
        next_fragment(words[c]);
      }
    }
  }

  static __device__ void next_fragment(Words& words) {
#pragma unroll
    for (auto& word : words.word) {
#pragma unroll
      for (int i = 0; i + 1 < kFragments; ++i) word[i] = word[i + 1];
    }
  }

  // The first fragment of `words`, which is `fragment` of cell c, decoded and scaled. Its two rows' constants come from
  // shared memory: they are as many as the strip has rows, and the sums leave no registers to keep them in.
  __device__ void decode(const uint8_t* stage, const Words& words, int c, int fragment,
                         uint32_t (&a)[4]) const {
    const bool block = is_block<kFormat>(p_.w);
    const int g = lane_ / 4, rows_before = 2 * fragment;
    const GroupRows rows{
        stage + scales_at_[c] + (block ? 0 : rows_before * p_.w.scale_row_bytes / kStripRows),
        stage + zeros_at_[c] + rows_before * p_.w.zero_row_bytes / kStripRows};
    uint32_t zeros[2] = {};
    if constexpr (Codec<kFormat>::kInteger) {
      uint32_t z = p_.w.zero_kind == ZeroKind::kNone ? 0x0101u << (Planes<kFormat>::kBits - 1) : 0u;
      if (p_.w.zero_kind == ZeroKind::kInt)
        z = *reinterpret_cast<const uint16_t*>(rows.zeros + 8 * g);
      zeros[0] = Codec<kFormat>::template zero<T>(z & 0xffu);
      zeros[1] = Codec<kFormat>::template zero<T>(z >> 8);
    }
    Codec<kFormat>::template decode<T>(p_.w, words, 0, zeros[0], zeros[1], a);
    if (scaling_ == Scaling16::kFloats) {
      scale_floats<kFormat, T>(p_.w, words, 0, rows, g, a);
      return;
    }
    const uint32_t pair = *reinterpret_cast<const uint32_t*>(rows.scales + (block ? 0 : 16 * g));
    const uint32_t scales[kLaneRows] = {ptx::prmt(pair, 0u, 0x1010u),
                                        ptx::prmt(pair, 0u, block ? 0x1010u : 0x3232u)};
    scale_pairs<kFormat, T>(p_.w, words, 0, scales, a);
  }

  const GemmParams& p_;
  const StageLayout& layout_;
  const int lane_;
  const int half_;        // of the block's columns, to copy and to multiply
  const int first_cell_;  // of that half, the first of this warp's
  const GroupOfCell group_of_;
  const int cells_;
  const Scaling16 scaling_;
  const Weights weights_;
  TokenFetcher<kShape.tokens, kShape.threads()> tokens_;
  bool real_[kCells] = {};                              // whether the cell begins before K
  int scales_at_[kCells] = {}, zeros_at_[kCells] = {};  // bytes from the stage's start
};

template <Format kFormat, class T>
__global__ void __launch_bounds__(kTiles[kGradTile].threads(), kTiles[kGradTile].blocks_per_sm)
    grad_kernel(const GemmParams p, const StageLayout layout) {
  using Warp = GradWarp<kFormat, T>;
  constexpr Tile tile = kTiles[kGradTile];
  Warp warp(p, layout);
  uint32_t* const elected = reinterpret_cast<uint32_t*>(dynamic_shared() + election_offset(tile));
  Share share(p.schedule, blockIdx.x);
  for (Segment segment; share.next(segment); ptx::sync_block()) {
    typename Warp::Sums sums;
    warp.multiply(segment, sums);
    if (!segment.whole &&
        !sum_segments<tile.threads()>(p.schedule, segment, blockIdx.x, sums, elected)) {
      continue;
    }
    warp.store(segment, sums);
  }
}

// Instantiated by grad_*.cu, a few formats each.
template <Format kFormat>
void run_grad(const GemmParams& p, Stream stream);

#define LOWBIT_INSTANTIATE_GRAD(format)                                       \
  template <>                                                                 \
  void run_grad<format>(const GemmParams& p, Stream stream) {                 \
    with_type(kTiles[kGradTile].name, p.x.type, [&](auto type) {              \
      launch_tile<kGradTile>(grad_kernel<format, decltype(type)>, p, stream); \
    });                                                                       \
  }

}  // namespace lowbit::cuda
