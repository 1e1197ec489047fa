// Kernel layout `cuda_tile64`: strips of 64 output rows, tiles of 128 k, codes in the order of mma's A fragments.
//
//   tensor = strip 0 | strip 1 | ... | strip ceil(N/64)-1 | perm int32[K] (if any)
//   strip  = tile 0 | tile 1 | ... | tile ceil(K/128)-1 | table of scales (if they do not fit tiles) | padding to 128 bytes
//   tile   = planes of its 64 x 128 codes, one behind the other | scales | zeros or offsets | padding to 32 bytes
//   planes = 2 -> {2}, 3 -> {2,1}, 4 -> {4}, 5 -> {4,1}, 6 -> {4,2}, 8 -> {8} bits
//
// Codes. A tile is 8 cells of 64 rows x 16 k, a cell is 4 fragments of 16 x 16. In a fragment, lane l = 4g + t of a warp
// holds four pairs (registers) of neighbouring k, as mma.m16n8k16 and wgmma want its A operand:
//
//   register   0            1                2                3
//   row        g            g + 8            g                g + 8              g = 0..7, t = 0..3
//   k          2t, 2t+1     2t, 2t+1         2t+8, 2t+9       2t+8, 2t+9
//
// A plane is 16-byte vectors, 32 (one per lane) behind each other, so that a warp reads 512 bytes in one load. Word i of
// a vector belongs to fragment i (rows 16i .. 16i+15). Its halves hold elements 0 and 1 of a pair; each half has 16 / bits
// fields, lowest first:
//
//   8 bits   vector v = 2 * cell + j: fields = registers 2j, 2j+1 of one cell
//   4 bits   vector v = cell:         fields = registers 0..3 of one cell
//   2 bits   vector v = cell / 2:     fields = registers 0..3 of cell 2v, then of cell 2v+1
//   1 bit    vector v = cell / 4:     fields = registers 0..3 of cells 4v .. 4v+3
//
//   four bits, word i of lane l:     bits 31..28  27..24  23..20  19..16 | 15..12  11..8   7..4    3..0
//                                    register  3       2       1       0        3      2      1       0
//                                    element   1       1       1       1        0      0      0       0
//
// so (word >> 4r) & 0x000f000f is register r as two 16-bit integers: one lop3 with a magic exponent makes it fp16 or bf16.
//
// Scales. A row of 64, that of row n at position (n % 8) * 8 + n / 8: the eight that lane l = 4g + t needs (rows g, g + 8,
// ..., g + 56) are one vector. Zeros and offsets are rows of the same order.
//
//   group_size divides 128      in the tile: [128 / group_size][64] scales, then as many zeros: a tile is one copy
//   any other group_size, -1    in the strip's table: [G][64] scales, then [G][64] zeros
//   128x128 block scaling       in the tile: one scale, in 16 bytes; both strips of a block row hold it
//
// Scales are kept as they are stored, of one byte where the canonical ones have 8, 6 or 4 bits; offsets of 4 bits stand in
// the high halves of the bytes of their scales. Super scales and their zeros stand behind all that, in tables of the strip:
// [ceil(G / S)][64], or [1][64] where one serves all. Where blocks run across rows (flat), tables repeat entries, as in
// packing/cpu_tile16.h.
//
// Rows past N and k past K hold code 0; scales and zeros past N are 0. A last group that K cuts short keeps its full place.
#pragma once

#include <cstdint>

#include "packing/canonical.h"
#include "packing/pairs.h"

namespace lowbit {

inline constexpr int kStripRows = 64;
inline constexpr int kTileK = 128;
inline constexpr int kCellK = 16;
inline constexpr int kWarpVector = 512;  // bytes of one vector of each lane

// Bytes from the start of a strip to a group's row of `row_bytes`, where group 0's stands at `offset` (from the start of its
// tile, or of the strip for a table). `Layout` is CudaTile64, or what kernels are given of it.
template <class Layout>
constexpr int64_t group_row(const Layout& layout, int64_t group, int64_t offset,
                            int64_t row_bytes) {
  if (layout.groups_per_tile == 0) return offset + group * row_bytes;
  return group / layout.groups_per_tile * layout.tile_bytes + offset +
         group % layout.groups_per_tile * row_bytes;
}

// Rows of scales, and of zeros or offsets, in bytes, as kernels read them that read floats only: bf16, where that holds every
// scale, or fp32.
struct FloatRows {
  ScaleDtype dtype;
  int scale_bytes, zero_bytes;
};
constexpr FloatRows float_rows(ScaleDtype stored, ZeroKind zeros, bool one_scale,
                               int zero_row_bytes) {
  const bool powers = stored == ScaleDtype::kE8m0;
  const int scale_bytes = one_scale ? 16 : kStripRows * (powers ? 2 : 4);
  return {powers ? ScaleDtype::kBFloat16 : ScaleDtype::kFloat32, scale_bytes,
          zeros == ZeroKind::kOffset ? kStripRows * 4 : zero_row_bytes};
}

struct CudaTile64 {
  CanonicalShape shape;
  int64_t N, K;
  int bits;
  PairPlanes planes;   // from the start of a tile
  int codes_bytes;     // of a tile: 1024 * bits
  int64_t tile_bytes;  // codes, scales, zeros, padding
  int64_t tiles;       // per strip
  int64_t strips;
  int64_t strip_bytes;
  int64_t perm_offset;  // from the start of the tensor
  int64_t total_bytes;

  int64_t group_size;  // never -1
  int64_t groups;
  int groups_per_tile;  // 0: the scales stand in the strip's table
  int scale_bytes;      // of one scale
  int zero_bytes;       // of one zero or offset, 0 when there are none
  int scale_row_bytes;  // 64 * scale_bytes, or 16 with block scaling
  int zero_row_bytes;
  bool plain;             // scales, and offsets, are floats
  bool shared_super;      // one super scale for all
  FloatRows floats;       // what kernels make of them
  bool one_scale;         // block scaling
  int64_t scales_offset;  // of group 0, from the start of its tile, or of the strip for a table
  int64_t zeros_offset;
  int64_t table_offset
      [kTableCount];  // of super scales and their zeros, from the start of a strip; 0: none

  // Bytes from the start of a strip to a group's row of scales (of zeros).
  int64_t scale_row(int64_t group) const {
    return group_row(*this, group, scales_offset, scale_row_bytes);
  }
  int64_t zero_row(int64_t group) const {
    return group_row(*this, group, zeros_offset, zero_row_bytes);
  }
};

// Throws Error when N, K and the group size do not fit together.
LOWBIT_API CudaTile64 cuda_tile64(int64_t N, int64_t K, const Desc& desc);

// Where the row n (0..63) of a strip stands in a row of scales.
constexpr int scale_position(int n) { return n % 8 * 8 + n / 8; }

// Where the code of (n, k) of a tile stands in a plane of `bits` bits. n in 0..63, k in 0..127.
constexpr PairPlace code_place(int n, int k, int bits) {
  const int cell = k / 16, fragment = n / 16;
  const int g = n % 8, half_rows = n % 16 / 8;  // rows g and g + 8 of a fragment
  const int within = k % 16, t = within % 8 / 2, half_k = within / 8, element = k % 2;
  const int lane = 4 * g + t, reg = 2 * half_k + half_rows;
  const int fields = 16 / bits;  // per half word
  const int field = (cell * 4 + reg) % fields;
  const int vector = (cell * 4 + reg) / fields;
  return {(vector * 32 + lane) * 4 + fragment, 16 * element + field * bits};
}

// One strip of the kernel layout from canonical tensors, and back. `strip` is its index, `to`/`from` its first byte.
void pack_strip64(const CudaTile64& tile, const CanonicalConst& canonical, int64_t strip,
                  uint8_t* to);
void unpack_strip64(const CudaTile64& tile, const uint8_t* from, int64_t strip,
                    const CanonicalMutable& canonical);

}  // namespace lowbit
