// GEMM of 16-bit activations on Hopper: weights decoded into wgmma's register operand (kernels/hopper.cuh says how a block is
// organised and which rows are whose).
//
// Scales meet the weights, as in kernels/matrix.cuh, by the same functions: a weight is decoded exactly, scaled and rounded
// once to x's type. Scaling the sums of a group instead would round nothing, but takes a second set of them, which 64 x 256
// of a warpgroup do not leave registers for, and a wait for the tensor cores at the end of every group.
//
// A cell of 16 k at a time: while its wgmmas run, the next one is decoded, into the other half of `a_`. At most one cell is in
// flight when a decoder writes there, so that nobody still reads it.
//
// Nothing splits K among the warps: the order in which an element's products are added is that of K, for every tile.
#pragma once

#include <cstdint>

#include "cuda/kernels/hopper.cuh"

namespace lowbit::cuda {

template <Format kFormat, class T, int kTile>
class HopperMatrix : public Consumer<kTile> {
  using Base = Consumer<kTile>;
  using Base::lane, Base::release;

 public:
  using Base::kFragments;
  static constexpr int kCount = Base::kShape.tokens / 2;  // sums of a thread in a fragment
  static constexpr Wgmma kKind = T::kMantissaBits == 7 ? Wgmma::kBf16 : Wgmma::kF16;
  using Words = typename Codec<kFormat>::Words;
  using Sums = float[kFragments][kCount];
  static constexpr int kBoxCells = kTileCells / boxes(Base::kShape);
  static constexpr int kPieces = 2 * kCellK / 16;  // of 16 bytes, in a token's cell

  __device__ HopperMatrix(const GemmParams& p, const BoxStage& stage, const Team& team)
      : Base(p, team),
        p_(p),
        stage_(stage),
        group_of_(p.w),
        cells_((p.w.K + kCellK - 1) / kCellK),
        group_ends_(p.w.groups > 1 && p.w.group_size % kTileK != 0),
        scaling_(scaling_before<T>(p.w)) {}

  __device__ void multiply(const Segment& segment, const BlockMemory& memory, RingPlace& place,
                           Sums& sums) {
    group_ = -1;
    if (p_.w.zero_kind != ZeroKind::kInt) load_zeros<kFormat, T>(p_.w, nullptr, 0, zeros_);
    for_each_value(sums, 0, [](float& v, int) { v = 0.0f; });
    int before = -1;  // the stage of the step before, which wgmma may still read
    for (int step = segment.first; step < segment.last; ++step) {
      ptx::mbarrier_wait(memory.full + place.slot, place.parity);
      multiply_step(dynamic_shared() + place.slot * stage_.bytes, step, memory, before, sums);
      before = place.slot;
      place.advance(p_.stages);
    }
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < kFragments; ++i) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) ptx::wgmma_pin(sums[i][j]);
    }
    release(memory.empty + before);
  }

 private:
  // Cells past K are multiplied like others: their codes are zero, and so is x.
  __device__ void multiply_step(const uint8_t* stage, int step, const BlockMemory& memory,
                                int before, Sums& sums) {
    const uint8_t* const strip = stage + stage_.weights + Base::strip() * stage_.strip;
    const uint8_t* const codes = strip + 4 * Base::fragment();
    const int first_group = group_of_(step * kTileCells);
    GroupRows rows = this->template rows_of<kFormat>(p_.w, stage_, strip, 0);
    if (first_group != group_) load_group(rows, first_group);
    Words words;
    load_cell<kFormat, kTileCells, kFragments>(codes, 0, lane, words);
    uint64_t x = wgmma_swizzled(stage);
    const int next_box = stage_.box / 16 - (kBoxCells - 2) * kPieces;
    // Two at a time: a_ has two halves, which are to be registers.
#pragma unroll 1
    for (int first = 0; first < kTileCells; first += 2) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (group_ends_) {
          const int cell = step * kTileCells + first + j;
          const int group = group_of_(inside(cell, cells_) ? cell : cells_ - 1);
          rows = this->template rows_of<kFormat>(p_.w, stage_, strip, group - first_group);
          if (group != group_) load_group(rows, group);
        }
        decode(words, rows, a_[j]);
        if (inside(first + j + 1, kTileCells))
          load_cell<kFormat, kTileCells, kFragments>(codes, first + j + 1, lane, words);
        ptx::wgmma<kKind>(sums, a_[j], x + j * kPieces, stage_.columns, true);
        ptx::wgmma_wait<1>();
        if (j == 0 && first == 0 && before >= 0) release(memory.empty + before);
      }
      x += static_cast<uint64_t>(first + 2 == kBoxCells ? next_box : 2 * kPieces);
    }
  }

  // Constants of a group stay in registers for as long as the group lasts.
  __device__ void load_group(const GroupRows& rows, int group) {
    const int g = lane / 4;
    group_ = group;
    if (Codec<kFormat>::kInteger && p_.w.zero_kind == ZeroKind::kInt)
      load_some_zeros<kFormat, T, kFragments>(rows.zeros, g, zeros_);
    if (scaling_ == Scaling16::kPairs)
      load_some_pairs<kFragments>(rows.scales, g, is_block<kFormat>(p_.w), scales_);
  }

  __device__ void decode(const Words& words, const GroupRows& rows,
                         uint32_t (&a)[kFragments][4]) const {
    if (scaling_ == Scaling16::kPairs) {
#pragma unroll
      for (int i = 0; i < kFragments; ++i) {
        Codec<kFormat>::template decode<T>(p_.w, words, i, zeros_[2 * i], zeros_[2 * i + 1], a[i]);
        scale_pairs<kFormat, T>(p_.w, words, i, scales_, a[i]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kFragments; ++i) {
        Codec<kFormat>::template decode<T>(p_.w, words, i, zeros_[2 * i], zeros_[2 * i + 1], a[i]);
        scale_floats<kFormat, T>(p_.w, words, i, rows, lane / 4, a[i]);
      }
    }
  }

  const GemmParams& p_;
  const BoxStage& stage_;
  const GroupOfCell group_of_;
  const int cells_;
  const bool group_ends_;  // inside of steps
  const Scaling16 scaling_;
  int group_ = -1;                  // whose constants are these
  uint32_t zeros_[kLaneRows] = {};  // of this warp's rows: the first 2 * kFragments
  uint32_t scales_[kLaneRows] = {};
  uint32_t a_[2][kFragments][4];
};

// kTile is the shape's row in kTiles.
template <Format kFormat, class T, int kTile>
__global__ void __launch_bounds__(kBlockThreads, 1)
    hopper_matrix_kernel(const GemmParams p, const BoxStage stage,
                         const __grid_constant__ TensorMap x) {
  run_warpgroups<kTile, HopperMatrix<kFormat, T, kTile>>(p, stage, x);
}

// Starts the kernel of a format and a tile for x's type.
template <Format kFormat, int kTile>
void start_hopper_matrix(const GemmParams& p, Stream stream) {
  with_type(kTiles[kTile].name, p.x.type, [&](auto type) {
    launch_warpgroups<kTile>(hopper_matrix_kernel<kFormat, decltype(type), kTile>, p, stream);
  });
}

inline constexpr int kHopperMatrixM64 = tile_index("hopper_matrix_m64"),
                     kHopperMatrixM128 = tile_index("hopper_matrix_m128"),
                     kHopperMatrixM256 = tile_index("hopper_matrix_m256");

// Instantiated by hopper_matrix*.cu, a few formats each.
template <Format kFormat>
void run_hopper_matrix(const GemmParams& p, int tile, Stream stream);

#define LOWBIT_INSTANTIATE_HOPPER_MATRIX(format)                                 \
  template <>                                                                    \
  void run_hopper_matrix<format>(const GemmParams& p, int tile, Stream stream) { \
    if (tile == kHopperMatrixM64) {                                              \
      start_hopper_matrix<format, kHopperMatrixM64>(p, stream);                  \
    } else if (tile == kHopperMatrixM128) {                                      \
      start_hopper_matrix<format, kHopperMatrixM128>(p, stream);                 \
    } else {                                                                     \
      start_hopper_matrix<format, kHopperMatrixM256>(p, stream);                 \
    }                                                                            \
  }

}  // namespace lowbit::cuda
