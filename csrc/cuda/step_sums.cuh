// What a warp makes of a step in shared memory, for few tokens: sums of kTokens columns for the 64 rows of a strip.
//
// Weights are mma's A operand, 16 output rows, and tokens its B operand, 8 columns: one mma per 16 x 16 weights serves up
// to eight tokens, and no decoded weight is wasted. Codes are multiplied as exact 16-bit numbers. A group's fp32 sums are
// multiplied by its scale, which costs 1/8 of an instruction per weight with 8 tokens (where the group is a step of 64 or
// longer) and rounds nothing.
#pragma once

#include <cstdint>

#include "cuda/pipeline.cuh"
#include "cuda/scales.cuh"

namespace lowbit::cuda {

// A strip's part of a step: codes of kCells cells, rows of the first group that the step touches, and of its other groups
// behind them; x as [64 columns][tokens], swizzled (pipeline.cuh).
struct StepInput {
  const uint8_t* codes;
  const uint8_t* x;
  GroupRows rows;
};

template <Format kFormat, class T, int kTokens, int kCells>
class StepSums {
 public:
  static constexpr int kBlocks8 = kTokens / 8;  // of tokens, as mma takes them
  using Words = typename Codec<kFormat>::Words;
  using Sums = float[kFragments][kBlocks8][4];

  __device__ StepSums(const WeightParams& w, int lane)
      : w_(w),
        lane_(lane),
        group_of_(w),
        cells_((w.K + kCellK - 1) / kCellK),
        scale_sums_(!Codec<kFormat>::kInteger || !has_fractions(w)),
        one_group_(scale_sums_ && (w.groups == 1 || w.group_size % (kCells * kCellK) == 0)) {}

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

  // Zeros that come from no row: before the first step.
  __device__ void start() {
    if (w_.zero_kind != ZeroKind::kInt) load_zeros<kFormat, T>(w_, nullptr, 0, zeros_);
  }

  // Adds the step whose first cell, of the strip, is `begin`.
  __device__ void add_step(const StepInput& step, int begin, Sums& sums) {
    if (one_group_ && begin + kCells <= cells_) {
      if (w_.zero_kind == ZeroKind::kInt)
        load_zeros<kFormat, T>(w_, step.rows.zeros, lane_ / 4, zeros_);
      Sums part;
      clear(part);
      constexpr int at_once =
          kBlocks8 == 1 ? kStepCells : kCells / kStepCells;  // as registers allow
#pragma unroll 1
      for (int c = 0; c < kCells; c += at_once)
        multiply_cells<at_once, true>(step, c, step.rows, part);
      add_group(step.rows, part, sums);
    } else {
      add_groups(step, begin, sums);
    }
  }

 private:
  // Bytes of half a cell's columns of a token.
  static __device__ int place(int token, int cell, int half) {
    const int at = swizzled(token, 2 * (cell % kStepCells) + half);
    return kCells == kStepCells ? at : cell / kStepCells * (kTokens * kStep * 2) + at;
  }

  // B fragments of some cells. A matrix of ldmatrix is 8 tokens x 8 k, two of them are a fragment, four come at
  // once: of two cells with 8 tokens, of one with 16. With 8 tokens and one cell the other two are thrown away.
  template <int kAtOnce>
  __device__ void load_tokens(const uint8_t* x, int c, uint32_t (&b)[kAtOnce][kBlocks8][2]) const {
    const int matrix = lane_ / 8, half = matrix % 2, other = matrix / 2;
#pragma unroll
    for (int j = 0; j < kAtOnce * kBlocks8; j += 2) {
      uint32_t four[4];
      if constexpr (kBlocks8 == 2) {
        ptx::ldmatrix_x4(four, x + place(lane_ % 8 + 8 * other, c + j / 2, half));
      } else {
        const int cell = c + j + (kAtOnce == 1 ? 0 : other);
        ptx::ldmatrix_x4(four, x + place(lane_ % 8, cell, half));
      }
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int at = j + r / 2;
        if (at < kAtOnce * kBlocks8) b[at / kBlocks8][at % kBlocks8][r % 2] = four[r];
      }
    }
  }

  // A step of several groups, or one in which K ends, or weights that are scaled before.
  __device__ void add_groups(const StepInput& step, int begin, Sums& sums) {
    const int cells = cells_ - begin < kCells ? cells_ - begin : kCells;
    GroupRows rows = step.rows;
    int group = group_of_(begin);
#pragma unroll 1
    for (int c = 0; c < cells; ++group) {
      if (w_.zero_kind == ZeroKind::kInt) load_zeros<kFormat, T>(w_, rows.zeros, lane_ / 4, zeros_);
      Sums part;
      clear(part);
      const int left = group_of_.left(begin + c, group);
      const int end = left < cells - c ? c + left : cells;
      if constexpr (kBlocks8 == 1) {
#pragma unroll 1
        for (; scale_sums_ && c + 2 <= end; c += 2) multiply_cells<2, true>(step, c, rows, part);
      }
#pragma unroll 1
      for (; scale_sums_ && c < end; ++c) multiply_cells<1, true>(step, c, rows, part);
      if constexpr (Codec<kFormat>::kInteger) {
#pragma unroll 1
        for (; c < end; ++c) multiply_cells<1, false>(step, c, rows, part);
      }
      add_group(rows, part, sums);
      rows.scales += w_.scale_row_bytes;
      rows.zeros += w_.zero_row_bytes;
    }
  }

  // Codes as they are, or scaled before.
  template <int kAtOnce, bool kAsTheyAre>
  __device__ void multiply_cells(const StepInput& step, int c, const GroupRows& rows,
                                 Sums& part) const {
    uint32_t b[kAtOnce][kBlocks8][2];
    load_tokens(step.x, c, b);
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      Words words;
      load_cell<kFormat, kCells>(step.codes, c + j, lane_, words);
#pragma unroll
      for (int i = 0; i < kFragments; ++i) {
        uint32_t a[4];
        Codec<kFormat>::template decode<T>(w_, words, i, zeros_[2 * i], zeros_[2 * i + 1], a);
        if constexpr (!kAsTheyAre) scale_floats<kFormat, T>(w_, words, i, rows, lane_ / 4, a);
#pragma unroll
        for (int n = 0; n < kBlocks8; ++n) T::mma(part[i][n], a, b[j][n][0], b[j][n][1]);
      }
    }
  }

  // sums += scale * part, or += part where weights were scaled before.
  __device__ void add_group(const GroupRows& rows, const Sums& part, Sums& sums) const {
    float scales[kLaneRows] = {1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f};
    if (scale_sums_) load_eight<kFormat>(w_, rows.scales, lane_ / 4, scales);
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

  const WeightParams& w_;
  const int lane_;
  const GroupOfCell group_of_;
  const int cells_;
  const bool scale_sums_;  // codes are multiplied as they are
  const bool one_group_;   // and a step lies in one group
  uint32_t zeros_[kLaneRows] = {};
};

}  // namespace lowbit::cuda
