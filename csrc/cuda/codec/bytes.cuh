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

  // q - zero, as it is; `zeros` is the row's zero in every byte. Not for eight bits, which have no room for it.
  template <int kRow>
  static __device__ uint32_t minus(const Words& words, int fragment, uint32_t zeros) {
    static_assert(P::kBits < 8, "q - zero in a signed byte");
    uint32_t bytes = plane<P::kLow, 0, kRow>(words.word[0][fragment], 0x80808080u);
    if constexpr (P::kHigh > 0)
      bytes = plane<P::kHigh, P::kLow, kRow>(words.word[1][fragment], bytes);
    return (bytes - zeros) ^ 0x80808080u;  // no byte borrows of the next: each is 128 + q
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

// Codes as e4m3 (e5m2 as itself), in the order above: rows g and g + 8 of a fragment of one cell. What comes out is the
// code's value divided by kUnit.
template <Format kFormat>
struct Fp8Bytes {
  static_assert(kFormat == Format::kFp8E4m3 || kFormat == Format::kFp8E5m2,
                "or one of those below");
  using Words = CellWords<2>;
  static constexpr float kUnit = 1.0f;
  static __device__ void rows(const Words& words, int fragment, uint32_t& g, uint32_t& g8) {
    g = whole_bytes<0>(words.word[0][fragment], words.word[1][fragment]);
    g8 = whole_bytes<1>(words.word[0][fragment], words.word[1][fragment]);
  }
};

// Exponent and mantissa where e4m3 has their low and their high ends, as codec/fp.cuh does for 16 bits; the factor that
// mends the bias is taken out of the sums.
template <>
struct Fp8Bytes<Format::kFp4E2m1> {
  using Words = CellWords<1>;
  static constexpr float kUnit = 64.0f;  // 2^(7 - 1), of the biases
  static __device__ void rows(const Words& words, int fragment, uint32_t& g, uint32_t& g8) {
    const uint32_t word = words.word[0][fragment];
    g = and_or(word << 4, 0x80808080u, word << 2 & 0x1c1c1c1cu);
    g8 = and_or(word, 0x80808080u, word >> 2 & 0x1c1c1c1cu);
  }
};

// q - 8, looked up in registers as code books are (codec/book.cuh): four codes by three prmt.
template <>
struct Fp8Bytes<Format::kInt4> {
  using Words = CellWords<1>;
  static constexpr float kUnit = 1.0f;

  static __device__ void rows(const Words& words, int fragment, uint32_t& g, uint32_t& g8) {
    const uint32_t word = words.word[0][fragment];
    const uint32_t low = word & 0x77777777u;
    const uint32_t top = and_or(word >> 1, 0x44444444u, 0x32103210u);
    const uint32_t first = look_up(low, top);               // element 0 of registers 0..3
    const uint32_t second = look_up(low >> 16, top >> 16);  // element 1
    g = ptx::prmt(first, second, 0x6420u);
    g8 = ptx::prmt(first, second, 0x7531u);
  }

 private:
  // -8 .. -5, -4 .. -1, 0 .. 3, 4 .. 7 in e4m3.
  static __device__ uint32_t look_up(uint32_t low, uint32_t top) {
    return ptx::prmt(ptx::prmt(0xcaccced0u, 0xb8c0c4c8u, low),
                     ptx::prmt(0x44403800u, 0x4e4c4a48u, low), top);
  }
};

}  // namespace lowbit::cuda
