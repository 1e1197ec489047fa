// GEMM for many tokens (M > 16): y[M, N] = x[M, K] W[N, K]^T + bias, bound first by L2, then by tensor cores.
//
// A block of eight warps computes 256 output rows (four strips) x kTokens. Rows are many because x is the expensive side:
// 16 bits against a weight's 2..8, read again for every 256 rows.
//
//                    tokens                                 warps
//             0      64     128
//   rows   0  +------+------+           matrix_m128: strip = warp % 4, 64 tokens each
//         64  |  0   |  4   |           matrix_m32, matrix_m64: strip = warp % 4, all tokens, and two slices of K: warps 4..7
//        128  |  1   |  5   |           take the second half of every step. A weight is decoded once for as many as 64
//        192  |  2   |  6   |           tokens; the slices' sums meet in shared memory at the end.
//             |  3   |  7   |
//        256  +------+------+
//
// Steps of 64 k arrive in a ring of stages that the block shares: codes, scales and x, all by cp.async. A warp decodes a
// cell of 64 rows x 16 k in registers, scales it there (one multiplication per pair where the scales are of x's type) and
// multiplies it with its tokens, which ldmatrix brings out of swizzled rows without bank conflicts.
//
// The order in which a row's products are added does not depend on M, on its neighbours, nor on which of the tiles with
// slices it is computed in: batch-invariant mode is those tiles, whole.
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

template <Format kFormat, class T, int kTile>
class MatrixWarp {
 public:
  static constexpr Tile kShape = kTiles[kTile];
  static constexpr int kStrips = kShape.rows / kStripRows;
  static constexpr int kTokens = kShape.tokens / kShape.warps_m;  // of a warp
  static constexpr int kBlocks8 = kTokens / 8;                    // of tokens, as mma takes them
  static constexpr int kOwn8 =
      kBlocks8 / kShape.warps_k;  // of those, the ones that a warp sums and stores
  static constexpr int kCells = kStepCells / kShape.warps_k;  // of a step, that a warp multiplies
  static constexpr int kStripThreads = kShape.threads() / kStrips;
  static_assert(kShape.warps_n == kStrips && kShape.warps_k <= 2,
                "a strip per warp, at most two slices");
  static_assert(kTokens % 16 == 0 && kOwn8 > 0, "ldmatrix brings tokens by 16");
  using Words = typename Codec<kFormat>::Words;
  using Sums = float[kFragments][kBlocks8][4];
  using OwnSums = float[kFragments][kOwn8][4];

  __device__ MatrixWarp(const GemmParams& p, const StageLayout& layout)
      : p_(p),
        layout_(layout),
        lane_(static_cast<int>(threadIdx.x) % 32),
        strip_(static_cast<int>(threadIdx.x) / 32 % kStrips),
        part_(static_cast<int>(threadIdx.x) / 32 / kStrips),
        fetched_strip_(p.w, layout, static_cast<int>(threadIdx.x) % kStripThreads),
        fetched_tokens_(p.x, p.w.K, static_cast<int>(threadIdx.x)),
        group_of_(p.w),
        cells_((p.w.K + kCellK - 1) / kCellK),
        scaling_(scaling_before<T>(p.w)) {}

  // sums[fragment][8 tokens][register of D] of the segment's steps.
  __device__ void multiply(const Segment& segment, Sums& sums) {
#pragma unroll
    for (int i = 0; i < kFragments; ++i) {
#pragma unroll
      for (int b = 0; b < kBlocks8; ++b) {
#pragma unroll
        for (int r = 0; r < 4; ++r) sums[i][b][r] = 0.0f;
      }
    }
    group_ = -1;
    if (p_.w.zero_kind != ZeroKind::kInt) load_zeros<kFormat, T>(p_.w, nullptr, 0, zeros_);
    const bool has_rows = inside(segment.tile_n * kStrips + strip_, p_.w.strips);
    start_fetching(segment);
    int fetched = segment.first, filled = 0, read = 0;
    int ahead = p_.stages - 1;  // copies to start before the first wait
    for (int step = segment.first; ahead > 0 || step < segment.last;) {
      if (ahead == 0) {
        wait_for_oldest(p_.stages);
        // Every thread's copies are here, and every warp is done with the stage refilled next.
        ptx::sync_block();
        if (!p_.w.plain) {
          fetched_strip_.expand(step, dynamic_shared() + read * layout_.bytes,
                                static_cast<int>(threadIdx.x) / kStripThreads);
          ptx::sync_block();
        }
      }
      if (inside(fetched, segment.last)) fetch(fetched, dynamic_shared() + filled * layout_.bytes);
      ptx::cp_async_commit();  // an empty group too: waiting counts groups
      ++fetched;
      advance(filled);
      if (ahead > 0) {
        --ahead;
        continue;
      }
      if (has_rows) multiply_step(dynamic_shared() + read * layout_.bytes, step, sums);
      advance(read);
      ++step;
    }
    ptx::sync_block();  // what follows lies over the ring
  }

  // Where two slices of K meet: a warp gives the sums of half its tokens to the one with the same rows and tokens in the
  // other slice, and adds that one's to the half it keeps.
  __device__ void add_slices(const Sums& sums, OwnSums& own) const {
    if constexpr (kShape.warps_k == 1) {
      copy_sums(sums, own);
    } else {
      constexpr int vectors = kFragments * kOwn8 * 32;
      float4* exchange = reinterpret_cast<float4*>(dynamic_shared());
      float4* given = exchange + (part_ * kStrips + strip_) * vectors + lane_;
      const float4* taken = exchange + ((1 - part_) * kStrips + strip_) * vectors + lane_;
#pragma unroll
      for (int j = 0; j < kFragments * kOwn8; ++j) {
        const float (&low)[4] = sums[j / kOwn8][j % kOwn8];
        const float (&high)[4] = sums[j / kOwn8][j % kOwn8 + kOwn8];
        float (&kept)[4] = own[j / kOwn8][j % kOwn8];
        float give[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          give[r] = part_ == 0 ? high[r] : low[r];
          kept[r] = part_ == 0 ? low[r] : high[r];
        }
        given[32 * j] = make_float4(give[0], give[1], give[2], give[3]);
      }
      ptx::sync_block();
#pragma unroll
      for (int j = 0; j < kFragments * kOwn8; ++j) {
        const float4 v = taken[32 * j];
        float (&kept)[4] = own[j / kOwn8][j % kOwn8];
        kept[0] += v.x;
        kept[1] += v.y;
        kept[2] += v.z;
        kept[3] += v.w;
      }
      ptx::sync_block();
    }
  }

  __device__ void store(const Segment& segment, const OwnSums& own) const {
    float* sums = reinterpret_cast<float*>(dynamic_shared());
    const int64_t m = int64_t{segment.tile_m} * kShape.tokens + part_ * 8 * kOwn8;
    const int64_t n = (int64_t{segment.tile_n} * kStrips + strip_) * kStripRows;
    store_sums(p_.y, m, p_.x.M, n, p_.w.N, lane_,
               sums + (part_ * kStrips + strip_) * 8 * kPaddedRows, own);
  }

 private:
  static __device__ void copy_sums(const Sums& from, OwnSums& to) {
#pragma unroll
    for (int i = 0; i < kFragments; ++i) {
#pragma unroll
      for (int b = 0; b < kOwn8; ++b) {
#pragma unroll
        for (int r = 0; r < 4; ++r) to[i][b][r] = from[i][b][r];
      }
    }
  }

  __device__ void advance(int& slot) const { slot = slot + 1 == p_.stages ? 0 : slot + 1; }

  // 64 threads fetch a strip, if there is one; all of them fetch x.
  __device__ void start_fetching(const Segment& segment) {
    m0_ = segment.tile_m * kShape.tokens;
    fetched_ = segment.tile_n * kStrips + static_cast<int>(threadIdx.x) / kStripThreads;
    fetched_tokens_.start(m0_, dynamic_shared() + layout_.x, p_.stages, layout_.bytes);
  }
  __device__ void fetch(int step, uint8_t* stage) const {
    const int place = static_cast<int>(threadIdx.x) / kStripThreads;
    if (inside(fetched_, p_.w.strips))
      fetched_strip_.fetch(fetched_strip_.tile(fetched_, step), static_cast<uint32_t>(step) % 2,
                           step, stage, place);
    fetched_tokens_.fetch(fetched_tokens_.row(m0_, step), step, stage + layout_.x);
  }

  __device__ void multiply_step(const uint8_t* stage, int step, Sums& sums) {
    const int first_group = group_of_(step * kStepCells);
    const int slice = kShape.warps_k == 2 ? part_ : 0;
    const uint8_t* const strip_codes = stage + codes_at<kFormat>(strip_);
#pragma unroll 1
    for (int c = 0; c < kCells; ++c) {
      const int in_step = slice * kCells + c;
      const int cell = step * kStepCells + in_step;
      if (!inside(cell, cells_)) break;
      const int group = group_of_(cell);
      const GroupRows rows = group_rows(p_.w, layout_, stage, strip_, group - first_group);
      if (group != group_) load_group(rows, group);
      uint32_t b[kBlocks8][2];
      load_tokens(stage + layout_.x, in_step, b);
      Words words;
      load_cell<kFormat, kStepCells>(strip_codes, in_step, lane_, words);
      // One branch for all of the cell: the instructions that decode a fragment then hide among the last one's mma.
      if (scaling_ == Scaling16::kPairs) {
        multiply_cell<Scaling16::kPairs>(words, rows, b, sums);
      } else {
        multiply_cell<Scaling16::kFloats>(words, rows, b, sums);
      }
    }
  }

  // Constants of a group stay in registers for as long as the group lasts, however many steps that is.
  __device__ void load_group(const GroupRows& rows, int group) {
    const int g = lane_ / 4;
    group_ = group;
    if (p_.w.zero_kind == ZeroKind::kInt) load_zeros<kFormat, T>(p_.w, rows.zeros, g, zeros_);
    if (scaling_ == Scaling16::kPairs) load_pairs(rows.scales, g, is_block<kFormat>(p_.w), scales_);
  }

  // B fragments of one cell. A matrix of ldmatrix is 8 tokens x 8 k: two of them side by side make k 0..15 of 8 tokens.
  __device__ void load_tokens(const uint8_t* x, int cell, uint32_t (&b)[kBlocks8][2]) const {
    const int matrix = lane_ / 8;
    const int first = (kShape.warps_m == 2 ? part_ * kTokens : 0) + lane_ % 8 + 8 * (matrix / 2);
    const int piece = 2 * cell + matrix % 2;
#pragma unroll
    for (int j = 0; j < kBlocks8; j += 2) {
      uint32_t four[4];
      ptx::ldmatrix_x4(four, x + swizzled(first + 8 * j, piece));
      b[j][0] = four[0];
      b[j][1] = four[1];
      b[j + 1][0] = four[2];
      b[j + 1][1] = four[3];
    }
  }

  template <Scaling16 kScaling>
  __device__ void multiply_cell(const Words& words, const GroupRows& rows,
                                const uint32_t (&b)[kBlocks8][2], Sums& sums) const {
#pragma unroll
    for (int i = 0; i < kFragments; ++i) {
      uint32_t a[4];
      Codec<kFormat>::template decode<T>(p_.w, words, i, zeros_[2 * i], zeros_[2 * i + 1], a);
      if constexpr (kScaling == Scaling16::kPairs) {
        scale_pairs<kFormat, T>(p_.w, words, i, scales_, a);
      } else {
        scale_floats<kFormat, T>(p_.w, words, i, rows, lane_ / 4, a);
      }
#pragma unroll
      for (int j = 0; j < kBlocks8; ++j) T::mma(sums[i][j], a, b[j][0], b[j][1]);
    }
  }

  const GemmParams& p_;
  const StageLayout& layout_;
  const int lane_;
  const int strip_;  // of the block's four
  const int part_;   // of its tokens (warps_m == 2) or of each step (warps_k == 2)
  StripFetcher<kFormat, kStripThreads, Reuse::kTokens> fetched_strip_;
  TokenFetcher<kShape.tokens, kShape.threads()> fetched_tokens_;
  int m0_ = 0, fetched_ = 0;  // first token of the segment, strip whose codes this thread fetches
  const GroupOfCell group_of_;
  const int cells_;
  const Scaling16 scaling_;
  int group_ = -1;  // whose constants are these
  uint32_t zeros_[kLaneRows] = {};
  uint32_t scales_[kLaneRows] = {};
};

// kTile is the shape's row in kTiles.
template <Format kFormat, class T, int kTile>
__global__ void __launch_bounds__(kTiles[kTile].threads(), kTiles[kTile].blocks_per_sm)
    matrix_kernel(const GemmParams p, const StageLayout layout) {
  using Warp = MatrixWarp<kFormat, T, kTile>;
  constexpr Tile tile = kTiles[kTile];
  static_assert(tile.step == kStep, "steps of half a tile");

  Warp warp(p, layout);
  uint32_t* const elected = reinterpret_cast<uint32_t*>(dynamic_shared() + election_offset(tile));
  Share share(p.schedule, blockIdx.x);
  for (Segment segment; share.next(segment); ptx::sync_block()) {
    typename Warp::OwnSums own;
    {
      typename Warp::Sums sums;
      warp.multiply(segment, sums);
      warp.add_slices(sums, own);
    }
    if (!segment.whole &&
        !sum_segments<tile.threads()>(p.schedule, segment, blockIdx.x, own, elected)) {
      continue;
    }
    warp.store(segment, own);
  }
}

// Starts the kernel of a format and a tile for x's type.
template <Format kFormat, int kTile>
void start_matrix(const GemmParams& p, Stream stream) {
  with_type(kTiles[kTile].name, p.x.type, [&](auto type) {
    launch_tile<kTile>(matrix_kernel<kFormat, decltype(type), kTile>, p, stream);
  });
}

inline constexpr int kMatrixM32 = tile_index("matrix_m32"), kMatrixM64 = tile_index("matrix_m64"),
                     kMatrixM128 = tile_index("matrix_m128");

// Instantiated by matrix_*.cu, a few formats each.
template <Format kFormat>
void run_matrix(const GemmParams& p, int tile, Stream stream);

#define LOWBIT_INSTANTIATE_MATRIX(format)                                 \
  template <>                                                             \
  void run_matrix<format>(const GemmParams& p, int tile, Stream stream) { \
    if (tile == kMatrixM32) {                                             \
      start_matrix<format, kMatrixM32>(p, stream);                        \
    } else if (tile == kMatrixM64) {                                      \
      start_matrix<format, kMatrixM64>(p, stream);                        \
    } else {                                                              \
      start_matrix<format, kMatrixM128>(p, stream);                       \
    }                                                                     \
  }

}  // namespace lowbit::cuda
