// Codes as bytes, for tensor cores that multiply 8 bits: two cells of 16 k make one mma of 32 k.
//
// mma wants four bytes of neighbouring k in a register, but its sums do not know which k is which: any order does, if x has
// the same. The one that costs least is the order in which a word of the layout holds them once its fields are bytes:
//
//   byte    0         1          2          3
//   k       2t        2t + 8     2t + 1     2t + 9        of a cell of 16; element and half of the cell swapped
//
// For four bits that is one mask. x is brought into this order once, in shared memory (order_bytes).
#pragma once

#include <cstdint>

#include "cuda/codec/planes.cuh"

namespace lowbit::cuda {

// 16 bytes of x in the order above: word t for the lanes of that t.
__device__ inline uint4 order_bytes(const uint4& x) {
  return make_uint4(ptx::prmt(x.x, x.z, 0x5140u), ptx::prmt(x.x, x.z, 0x7362u),
                    ptx::prmt(x.y, x.w, 0x5140u), ptx::prmt(x.y, x.w, 0x7362u));
}

// Formats of eight bits: row g + 8 * kRow of a fragment, from its words of registers 0, 1 and of 2, 3.
template <int kRow>
__device__ uint32_t whole_bytes(uint32_t word01, uint32_t word23) {
  return ptx::prmt(word01, word23, kRow == 0 ? 0x6240u : 0x7351u);
}

// Integers as signed bytes: (q - 2^(bits-1)) << (8 - bits). The code stands in a byte's upper bits, where turning the top
// bit around subtracts the middle; the factor 2^(8-bits) is exact, and taken out of the sums.
template <Format kFormat>
struct SignedBytes {
  using P = Planes<kFormat>;
  using Words = CellWords<P::kWords>;
  static constexpr int kShift = 8 - P::kBits;

  template <int kRow>
  static __device__ uint32_t row(const Words& words, int fragment) {
    if constexpr (P::kBits == 8) {
      return whole_bytes<kRow>(words.word[0][fragment], words.word[1][fragment]) ^ 0x80808080u;
    } else {
      uint32_t bytes = plane<P::kLow, kShift, kRow>(words.word[0][fragment], 0x80808080u);
      if constexpr (P::kHigh > 0)
        bytes = plane<P::kHigh, 8 - P::kHigh, kRow>(words.word[1][fragment], bytes);
      return bytes;
    }
  }

 private:
  // Fields of kBits at bit kAt of each byte, exclusive-or `onto`. The two halves of a cell are two registers apart, 2 * kBits;
  // where that is a byte, one shift moves both.
  template <int kBits, int kAt, int kRow>
  static __device__ uint32_t plane(uint32_t word, uint32_t onto) {
    constexpr uint32_t field = ((1u << kBits) - 1u) << kAt;
    if constexpr (kBits == 4) {
      return mask_xor(shift_up<kAt - 4 * kRow>(word), field * 0x01010101u, onto);
    } else {
      const uint32_t first =
          mask_xor(shift_up<kAt - kBits * kRow>(word), field * 0x00010001u, onto);
      return mask_xor(shift_up<kAt + 8 - kBits*(kRow + 2)>(word), field * 0x01000100u, first);
    }
  }
  // (a & mask) ^ b in one instruction.
  static __device__ uint32_t mask_xor(uint32_t a, uint32_t mask, uint32_t b) {
    return ptx::lop3<0x6a>(a, mask, b);
  }
};

}  // namespace lowbit::cuda
