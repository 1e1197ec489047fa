// GEMM of 8-bit activations on Hopper: int8 times integers, exact in int32, and e4m3 times what e4m3 or e5m2 hold, with wgmma
// (kernels/hopper.cuh says how a block is organised and which rows are whose).
//
// Weights come out of the layout as bytes in an order of their own (codec/bytes.cuh), and so x has to have it, too:
// launch_prepare_rows() puts it so before. Nobody could on the way: the copy engine knows no order below 16 bytes, and the
// consumers would spend half of shared memory's time on it.
//
// Two cells of 16 k make one wgmma of 32 k. What the tensor cores have added, parts, meets the scales of a group in fp32 sums
// when the group ends; that of fp8 every 128 of k at the latest, for tensor cores keep fewer bits of a sum than fp32 does, that
// of integers before int32 could overflow. Parts and sums are two sets of registers: hence tiles half as large as those of
// hopper_matrix.
//
// What is multiplied is a Math:
//
//   Math::kKind                        of wgmma
//   Math::kMostSteps                   of 128 k, after which parts are added to the sums
//   Math(w)                            registers of its own
//   math.load_group(rows, lane)        a group begins, whose rows begin at this warp's first fragment
//   math.decode(words of two cells, i, a)   registers of A
//   math.unit()                        what the sums are to be multiplied by at the end
#pragma once

#include <cstdint>

#include "cuda/codec/bytes.cuh"
#include "cuda/kernels/hopper.cuh"

namespace lowbit::cuda {

template <class Math, Format kFormat, int kTile>
class HopperA8 : public Consumer<kTile> {
  using Base = Consumer<kTile>;
  using Base::lane, Base::release;

 public:
  using Base::kFragments;
  static constexpr int kCount = Base::kShape.tokens / 2;  // sums of a thread in a fragment
  using Words = CellWords<Planes<kFormat>::kWords>;
  using Part = WgmmaSum<Math::kKind>;
  using Parts = Part[kFragments][kCount];
  using Sums = float[kFragments][kCount];

  __device__ HopperA8(const GemmParams& p, const BoxStage& stage, const Team& team)
      : Base(p, team),
        p_(p),
        stage_(stage),
        group_of_(p.w),
        cells_((p.w.K + kCellK - 1) / kCellK),
        math_(p.w) {}

  // A run is what parts hold in the end: products of one group, of kMostSteps at most. Between the issue of a product and
  // the wait for it the next one's A is decoded; the other warpgroup's products fill the gap until that is issued. (Two in
  // flight, as in hopper_matrix, would have to be waited for in different ways inside a run and at its end, which the
  // assembler answers by waiting for each.)
  __device__ void multiply(const Segment& segment, const BlockMemory& memory, RingPlace& place,
                           Sums& sums) {
    for_each_value(sums, 0, [](float& v, int) { v = 0.0f; });
    m0_ = segment.tile_m * stage_.tokens;
    const int end = segment.last * kStepProducts;
    int product = segment.first * kStepProducts, group = group_at(product);
    const uint8_t* stage = wait_for(memory, place);
    begin_group(stage, product, group);
    decode(stage, product, a_);
    while (product < end) {
      Parts parts;
      GroupRows rows;
      uint64_t* empty;
      bool is_first = true, run_ends, stage_ends;
      int left = Math::kMostSteps;
      do {
        issue(stage, product, parts, !is_first);
        is_first = false;
        rows = rows_at(stage, product, group);
        empty = memory.empty + place.slot;
        ++product;
        stage_ends = product % kStepProducts == 0;
        if (stage_ends) {
          place.advance(p_.stages);
          --left;
        }
        const int next = group_at(product);
        run_ends =
            product == end || next != group || (stage_ends && (left == 0 || p_.x.scale_groups > 1));
        if (product < end) {
          if (stage_ends) stage = wait_for(memory, place);
          if (next != group) begin_group(stage, product, next);
          decode(stage, product, next_a_);
        }
        group = next;
        ptx::wgmma_wait<0>();
#pragma unroll
        for (int i = 0; i < 4 * kFragments; ++i) a_[i / 4][i % 4] = next_a_[i / 4][i % 4];
        if (stage_ends && !run_ends) release(empty);
      } while (!run_ends);
      settle(rows, (product - 1) / kStepProducts, parts, sums);
      if (stage_ends) {
        ptx::sync_warp();  // every lane has read its scales
        release(empty);
      }
    }
    scale_tokens(sums);
  }

 private:
  static constexpr int kStepProducts = kTileCells / 2;  // wgmmas of 32 k

  __device__ const uint8_t* wait_for(const BlockMemory& memory, const RingPlace& place) const {
    ptx::mbarrier_wait(memory.full + place.slot, place.parity);
    return dynamic_shared() + place.slot * stage_.bytes;
  }

  // Products past K are like others: x is zero there.
  __device__ int group_at(int product) const {
    return group_of_(inside(2 * product, cells_) ? 2 * product : cells_ - 1);
  }

  __device__ const uint8_t* strip_of(const uint8_t* stage) const {
    return stage + stage_.weights + Base::strip() * stage_.strip;
  }
  __device__ GroupRows rows_at(const uint8_t* stage, int product, int group) const {
    const int first = group_of_(product / kStepProducts * kTileCells);  // of the stage
    return this->template rows_of<kFormat>(p_.w, stage_, strip_of(stage), group - first);
  }
  __device__ void begin_group(const uint8_t* stage, int product, int group) {
    math_.load_group(rows_at(stage, product, group), lane);
  }

  __device__ void decode(const uint8_t* stage, int product, uint32_t (&a)[kFragments][4]) const {
    const uint8_t* const codes = strip_of(stage) + 4 * Base::fragment();
    const int cell = product % kStepProducts * 2;
    Words words[2];
    load_cell<kFormat, kTileCells, kFragments>(codes, cell, lane, words[0]);
    load_cell<kFormat, kTileCells, kFragments>(codes, cell + 1, lane, words[1]);
#pragma unroll
    for (int i = 0; i < kFragments; ++i) math_.decode(words, i, a[i]);
  }

  __device__ void issue(const uint8_t* stage, int product, Parts& parts, bool accumulate) {
    const uint8_t* const x = stage + product % kStepProducts * 32;
    ptx::wgmma<Math::kKind>(parts, a_, wgmma_swizzled(x), stage_.columns, accumulate);
  }

  // sums += parts * scale of the row's group (* scale of the token's). `step` is the last that parts hold.
  __device__ void settle(const GroupRows& rows, int step, Parts& parts, Sums& sums) const {
    pin(parts);
    const bool by_group = p_.x.scale_groups > 1;  // else tokens are scaled once, at the end
#pragma unroll
    for (int i = 0; i < kFragments; ++i) {
      const float2 scale =
          load_two(rows.scales, 8 * (lane / 4) + 2 * i, p_.w.scale_dtype, is_block<kFormat>(p_.w));
#pragma unroll
      for (int first = 0; first < kCount; first += 4) {
        if (2 * first >= stage_.tokens) continue;  // a narrower tile
#pragma unroll
        for (int j = first; j < first + 4; ++j) {
          float value = static_cast<float>(parts[i][j]);
          if (by_group) value = ptx::mul_rn(value, x_scale(j, step));
          sums[i][j] = ptx::fma_rn(value, j % 4 < 2 ? scale.x : scale.y, sums[i][j]);
        }
      }
    }
  }

  static __device__ void pin(Parts& parts) {
#pragma unroll
    for (int i = 0; i < kFragments; ++i) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) ptx::wgmma_pin(parts[i][j]);
    }
  }

  // Of the token of register j of D; `group` of 128 k.
  __device__ float x_scale(int j, int group) const {
    const int token = m0_ + j / 4 * 8 + 2 * (lane % 4) + j % 2;
    return inside(token, p_.x.M) ? p_.x.scales[int64_t{token} * p_.x.scale_groups + group] : 0.0f;
  }

  __device__ void scale_tokens(Sums& sums) const {
    const float unit = math_.unit();
#pragma unroll
    for (int j = 0; j < kCount; j += 4) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float scale = (p_.x.scale_groups == 1 ? x_scale(j + e, 0) : 1.0f) * unit;
#pragma unroll
        for (int i = 0; i < kFragments; ++i) {
          sums[i][j + e] *= scale;
          sums[i][j + e + 2] *= scale;
        }
      }
    }
  }

  const GemmParams& p_;
  const BoxStage& stage_;
  const GroupOfCell group_of_;
  const int cells_;
  Math math_;
  int m0_ = 0;  // the tile's first token
  uint32_t a_[kFragments][4], next_a_[kFragments][4];
};

// ---- integers ----------------------------------------------------------------------------------------------------------

// q - z of 2..6 bits fits a byte. Without zeros, and for 8 bits, (q - 2^(bits-1)) << (8 - bits) is cheaper to have
// (codec/bytes.cuh); the factor is taken out of the sums.
template <Format kFormat, int kFragments>
class HopperIntMath {
  using Bytes = SignedBytes<kFormat>;

 public:
  static constexpr Wgmma kKind = Wgmma::kS8;
  static constexpr int kMostSteps = 256;  // 128 * 128 * 32768 < 2^31
  using Words = typename Bytes::Words;

  __device__ explicit HopperIntMath(const WeightParams& w)
      : has_zeros_(Bytes::kShift > 0 && w.zero_kind == ZeroKind::kInt) {}

  __device__ void load_group(const GroupRows& rows, int lane) {
    if (!has_zeros_) return;
#pragma unroll
    for (int i = 0; i < kFragments; ++i) {
      const uint32_t pair = *reinterpret_cast<const uint16_t*>(rows.zeros + lane / 4 * 8 + 2 * i);
      zeros_[2 * i] = (pair & 0xffu) * 0x01010101u;
      zeros_[2 * i + 1] = (pair >> 8) * 0x01010101u;
    }
  }

  __device__ void decode(const Words (&words)[2], int i, uint32_t (&a)[4]) const {
    if constexpr (Bytes::kShift > 0) {
      if (has_zeros_) {
#pragma unroll
        for (int r = 0; r < 4; r += 2) {
          a[r] = Bytes::template minus<0>(words[r / 2], i, zeros_[2 * i]);
          a[r + 1] = Bytes::template minus<1>(words[r / 2], i, zeros_[2 * i + 1]);
        }
        return;
      }
    }
#pragma unroll
    for (int r = 0; r < 4; r += 2) {
      a[r] = Bytes::template row<0>(words[r / 2], i);
      a[r + 1] = Bytes::template row<1>(words[r / 2], i);
    }
  }

  __device__ float unit() const { return has_zeros_ ? 1.0f : 1.0f / (1 << Bytes::kShift); }

 private:
  const bool has_zeros_;
  uint32_t zeros_[2 * kFragments] = {};
};

// ---- fp8 ---------------------------------------------------------------------------------------------------------------

template <Format kFormat, int kFragments>
class HopperFp8Math {
  using Bytes = Fp8Bytes<kFormat>;

 public:
  static constexpr Wgmma kKind = kFormat == Format::kFp8E5m2 ? Wgmma::kE5m2 : Wgmma::kE4m3;
  static constexpr int kMostSteps = 1;
  using Words = typename Bytes::Words;

  __device__ explicit HopperFp8Math(const WeightParams&) {}
  __device__ void load_group(const GroupRows&, int) {}
  __device__ void decode(const Words (&words)[2], int i, uint32_t (&a)[4]) const {
    Bytes::rows(words[0], i, a[0], a[1]);
    Bytes::rows(words[1], i, a[2], a[3]);
  }
  __device__ float unit() const { return Bytes::kUnit; }
};

// ---- kernels -----------------------------------------------------------------------------------------------------------

// kTile is the shape's row in kTiles.
template <template <Format, int> class MathOf, Format kFormat, int kTile>
__global__ void __launch_bounds__(kBlockThreads, 1)
    hopper_a8_kernel(const GemmParams p, const BoxStage stage,
                     const __grid_constant__ TensorMap x) {
  using Math = MathOf<kFormat, box_fragments(kTiles[kTile])>;
  run_warpgroups<kTile, HopperA8<Math, kFormat, kTile>>(p, stage, x);
}

template <template <Format, int> class MathOf, Format kFormat, int kTile>
void start_hopper_a8(const GemmParams& p, Stream stream) {
  launch_warpgroups<kTile>(hopper_a8_kernel<MathOf, kFormat, kTile>, p, stream);
}

}  // namespace lowbit::cuda
