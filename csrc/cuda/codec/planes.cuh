// Where a lane finds the words of its codes (the pictures are in packing/cuda_tile64.h), and the shifts that all codecs
// share. The only place, beside the codecs, that knows how many bits a code has.
#pragma once

#include <cstdint>

#include "cuda/code_values.cuh"
#include "cuda/device.cuh"
#include "cuda/float16.cuh"
#include "cuda/ptx.cuh"
#include "packing/cuda_tile64.h"

namespace lowbit::cuda {

inline constexpr int kFragments = kStripRows / 16;  // of a cell: a strip's four times 16 rows

template <Format kFormat>
struct Planes {
  static constexpr int kBits = bits_of(kFormat);
  static constexpr int kLow = low_plane_bits(kBits);
  static constexpr int kHigh = kBits - kLow;                     // 0: there is no second plane
  static constexpr int kWords = kLow == 8 || kHigh > 0 ? 2 : 1;  // of a lane in a fragment
  static constexpr int kCellBytes = kStripRows * kCellK * kBits / 8;
};

// The words of one lane in the four fragments of one cell. Bytes: word j holds registers 2j and 2j + 1 of A. Else word 0
// is of the first plane and word 1 of the second, both shifted so that register 0's field is lowest in each half; above
// the cell's own fields stand those of its neighbours.
template <int kWords>
struct CellWords {
  uint32_t word[kWords][kFragments];
};

namespace detail {

// kCount words of a lane's vector, from `vector` on.
template <int kCount>
__device__ void load_vector(const uint8_t* vector, int shift, uint32_t (&to)[kFragments]) {
  if constexpr (kCount == 4) {
    const uint4 v = *reinterpret_cast<const uint4*>(vector);
    to[0] = v.x >> shift;
    to[1] = v.y >> shift;
    to[2] = v.z >> shift;
    to[3] = v.w >> shift;
  } else if constexpr (kCount == 2) {
    const uint2 v = *reinterpret_cast<const uint2*>(vector);
    to[0] = v.x >> shift;
    to[1] = v.y >> shift;
  } else {
    to[0] = *reinterpret_cast<const uint32_t*>(vector) >> shift;
  }
}

// A plane narrower than 8 bits: a vector serves 4 / bits cells.
template <int kPlaneBits, int kCount>
__device__ void load_plane(const uint8_t* plane, int cell, int lane, uint32_t (&to)[kFragments]) {
  constexpr int cells = 4 / kPlaneBits;
  load_vector<kCount>(plane + cell / cells * kWarpVector + 16 * lane, cell % cells * 4 * kPlaneBits,
                      to);
}

}  // namespace detail

// `codes` holds kCells cells of a strip in shared memory: all of the first plane, then all of the second. 16-byte loads,
// lane by lane, which is free of bank conflicts. A warp that has kCount of the strip's fragments gives codes + 4 * the
// first of them; it gets them as 0, 1, ..., at the price of bank conflicts, 4 / kCount lanes on each.
template <Format kFormat, int kCells, int kCount = kFragments>
__device__ void load_cell(const uint8_t* codes, int cell, int lane,
                          CellWords<Planes<kFormat>::kWords>& to) {
  using P = Planes<kFormat>;
  if constexpr (P::kLow == 8) {
    const uint8_t* vector = codes + 2 * cell * kWarpVector + 16 * lane;
    detail::load_vector<kCount>(vector, 0, to.word[0]);
    detail::load_vector<kCount>(vector + kWarpVector, 0, to.word[1]);
  } else {
    detail::load_plane<P::kLow, kCount>(codes, cell, lane, to.word[0]);
    if constexpr (P::kHigh > 0) {
      constexpr int low_bytes = kStripRows * kCellK * P::kLow / 8 * kCells;
      detail::load_plane<P::kHigh, kCount>(codes + low_bytes, cell, lane, to.word[1]);
    }
  }
}

// Bits of both halves moved up (or down, where kBy < 0). What crosses from one half into the other is masked by callers.
template <int kBy>
__device__ uint32_t shift_up(uint32_t word) {
  if constexpr (kBy >= 0) {
    return word << kBy;
  } else {
    return word >> -kBy;
  }
}

// (a & mask) | b in one instruction.
__device__ inline uint32_t and_or(uint32_t a, uint32_t mask, uint32_t b) {
  return ptx::lop3<0xea>(a, mask, b);
}

}  // namespace lowbit::cuda
