// Kernel layout `metal_tile4`: strips of 4 output rows, chunks of 4 rows x 8 k, one chunk per lane of a SIMD-group.
//
//   tensor = strip 0 | strip 1 | ... | strip ceil(N/4)-1 | perm int32[K] (if any)
//   strip  = planes of its codes, one behind the other | scales | zeros or offsets | padding to 64 bytes
//   plane  = chunk 0 | chunk 1 | ... | chunk ceil(K/8)-1, and padding to 16 bytes
//   planes = 2 -> {2}, 3 -> {2,1}, 4 -> {4}, 5 -> {4,1}, 6 -> {4,2}, 8 -> {8} bits
//
// Codes. A chunk holds 4 rows of 8 consecutive k: 4 * bits bytes of a plane of that many bits. Lane l of a SIMD-group reads
// chunk l, so that 32 lanes read one contiguous piece, 16 bytes each for a plane of four bits. A group of any size is whole
// chunks, so that a chunk needs one scale per row.
//
// A chunk is `bits` words of 32 bits. The lower half of a word belongs to even k, the upper half to odd k: a mask leaves a
// pair of neighbouring k as two 16-bit integers, and an OR with an exponent makes them two half floats. Within the halves
// stand fields of `bits` bits, lowest first, row by row: field 4 * row + i holds k = 2i (2i + 1 in the upper half).
//
//   8 bits   word 2r: row r, pairs 0 1     word 2r + 1: row r, pairs 2 3
//   4 bits   word r: row r, pairs 0 1 2 3
//   2 bits   word j: row 2j, pairs 0 1 2 3, then row 2j + 1
//   1 bit    word 0: rows 0, 1, 2, 3
//
//   four bits, word r:     bits 31..28  27..24  23..20  19..16 | 15..12  11..8   7..4    3..0
//                          k       7      5       3       1        6      4      2       0
//
// Scales. [G][4]: the four rows' scales of a group are one vector. Zeros and offsets likewise, behind them. With 128x128 block
// scaling [G]: one scale per group, which all strips of a block row hold.
//
// Scales of one byte, super scales, and blocks that run across rows: as in packing/cpu_tile16.h, with 4 rows in place of 16.
//
// Rows past N and k past K hold code 0; scales and zeros past N are 0. A last group that K cuts short has a full place.
#pragma once

#include <cstdint>

#include "packing/canonical.h"
#include "packing/pairs.h"

namespace lowbit {

inline constexpr int kMetalRows = 4;
inline constexpr int kChunkK = 8;

struct MetalTile4 {
  CanonicalShape shape;
  int64_t N, K;
  int bits;
  PairPlanes planes;  // from the start of a strip
  int64_t chunks;     // per strip: ceil(K / 8)
  int64_t strips;
  int64_t strip_bytes;
  int64_t perm_offset;  // from the start of the tensor
  int64_t total_bytes;

  int64_t group_size;  // never -1
  int64_t groups;
  int scale_rows;         // 4, or 1 with block scaling
  int scale_bytes;        // of one scale
  int zero_bytes;         // of one zero or offset, 0 when there are none
  int64_t scales_offset;  // from the start of a strip
  int64_t zeros_offset;
  int64_t table_offset[kTableCount];  // the same for every table of the shape

  int64_t scale_place(int64_t group, int row) const {
    return scales_offset + (group * scale_rows + (scale_rows == 1 ? 0 : row)) * scale_bytes;
  }
  int64_t zero_place(int64_t group, int row) const {
    return zeros_offset + (group * kMetalRows + row) * zero_bytes;
  }
};

// Throws Error when N, K and the group size do not fit together.
LOWBIT_API MetalTile4 metal_tile4(int64_t N, int64_t K, const Desc& desc);

// Where the code of row 0..3 and k 0..7 of a chunk stands in a plane of `bits` bits.
constexpr PairPlace chunk_place(int row, int k, int bits) {
  const int bit = (4 * row + k / 2) * bits;
  return {bit / 16, bit % 16 + 16 * (k % 2)};
}

// One strip of the kernel layout from canonical tensors, and back. `strip` is its index, `to`/`from` its first byte.
void pack_strip4(const MetalTile4& tile, const CanonicalConst& canonical, int64_t strip,
                 uint8_t* to);
void unpack_strip4(const MetalTile4& tile, const uint8_t* from, int64_t strip,
                   const CanonicalMutable& canonical);

}  // namespace lowbit
