// Kernel layout `cpu_tile16`: strips of 16 output rows, codes interleaved in quads of K.
//
//   tensor = strip 0 | strip 1 | ... | strip ceil(N/16)-1 | perm int32[K] (if any)
//   strip  = codes of all of K | scales [G][16] | zeros or offsets [G][16] | super scales, their zeros | padding to 64 bytes
//   codes  = blocks of kb consecutive k: 32, or 8 where the group size is no multiple of 16
//   block  = vectors of 64 bytes, of 32 k as many as a code has bits. Byte 4*n + k%4 of a vector belongs to row n of the strip;
//            its bits hold the same byte of 8 / bits successive quads (k/4), the first quad in the lowest bits. Where bits are
//            left over (3, 5 and 6), the last quads' codes lie there in pieces (code_pieces-inl.h).
//
//   four bits, one vector, two quads (k = 0..3 in the low nibbles, 4..7 in the high ones):
//
//      byte   0     1     2     3     4     5  ...  63
//      low    n0k0  n0k1  n0k2  n0k3  n1k0  n1k1    n15k3
//      high   n0k4  n0k5  n0k6  n0k7  n1k4  n1k5    n15k7
//
// Why: a 32-bit lane holds four consecutive k of one row, which is what VNNI's and NEON's dot products and AMX's B
// tiles want; the same lane, shifted, gives one k of 16 rows for fp32 lanes. One load of 64 bytes serves any vector
// width, and codes are read in address order exactly once. A half of a block of 32 lies within one group. Rows past N
// and k past K hold code 0; scales and zeros past N are 0, so that padding adds nothing.
//
// Scales are kept as they are stored, of one byte where the canonical ones have 8, 6 or 4 bits; offsets of 4 bits stand in
// the high halves of the bytes of their scales. With 128x128 block scaling a strip keeps one scale per group, [G][1]: its 16
// rows share a block row. Super scales are tables like the others, [ceil(G / S)][16], or [1][16] where one serves all.
// Where blocks run across rows (flat), rows begin in the midst of blocks: tables then repeat what lies in two rows, and have
// an entry for as many groups as begin with every row (GroupTable::fine_shift).
#pragma once

#include <cstdint>

#include "packing/canonical.h"

namespace lowbit {

inline constexpr int kTileRows = 16;
inline constexpr int kVectorBytes = 64;

#include "packing/code_pieces-inl.h"

struct CpuTile16 {
  CanonicalShape shape;
  int kb;  // K per block
  int64_t block_bytes;
  int64_t blocks;                       // per strip
  int64_t K_padded;                     // blocks * kb
  int64_t strips;                       // ceil(N / 16)
  int scales_per_group;                 // 16, or 1 with block scaling
  int64_t scales_offset, zeros_offset;  // from the start of a strip
  int64_t table_offset[kTableCount];    // the same for every table of the shape
  int64_t strip_bytes;
  int64_t perm_offset;  // from the start of the tensor
  int64_t total_bytes;
};

LOWBIT_API CpuTile16 cpu_tile16(int64_t N, int64_t K, const Desc& desc);

// One strip of the kernel layout from canonical tensors, and back. `scratch` is pack_scratch_bytes() bytes.
int64_t pack_scratch_bytes(const CpuTile16& tile);
void pack_strip(const CpuTile16& tile, const CanonicalConst& from, int64_t strip, uint8_t* to,
                uint8_t* scratch);
void unpack_strip(const CpuTile16& tile, const uint8_t* from, int64_t strip,
                  const CanonicalMutable& to, uint8_t* scratch);

// The code of row n (0..15) and element k of a strip.
inline unsigned tile16_code(const CpuTile16& tile, const uint8_t* strip, int n, int64_t k) {
  const uint8_t* block = strip + k / tile.kb * tile.block_bytes;
  const int within = static_cast<int>(k % tile.kb);
  const CodePieces pieces = code_pieces(tile.shape.bits, within / 4);
  unsigned code = 0;
  for (const CodePiece& piece : pieces.piece) {
    if (piece.bits == 0) break;
    const unsigned byte = block[piece.vector * kVectorBytes + 4 * n + within % 4];
    code |= ((byte >> piece.shift) & ((1u << piece.bits) - 1u)) << piece.position;
  }
  return code;
}

}  // namespace lowbit
