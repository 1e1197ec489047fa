// Code books of sixteen levels that follow no rule (nf4, iq4_nl, bnb_fp4), looked up in registers. prmt picks four bytes out of
// eight by four selectors of three bits, so a table of sixteen bytes is two prmt and a third that chooses between them by the
// codes' top bits. A level has two bytes, a word eight codes: twelve prmt, and four to put bytes side by side.
//
// Which book it is, nothing here knows: its bytes come with the weight (BookBytes), and one instantiation serves them all.
#pragma once

#include "cuda/codec/codec.cuh"

namespace lowbit::cuda {

template <>
struct Codec<kBookCodec> {
  static constexpr bool kInteger = false;
  static constexpr bool kExact = false;
  using Words = CellWords<1>;

  template <class T>
  static __device__ void decode(const WeightParams& w, const Words& words, int fragment, uint32_t,
                                uint32_t, uint32_t (&a)[4]) {
    look_up(w.book.nearest, words.word[0][fragment], a);
  }
  template <class T>
  static __device__ void decode_rest(const WeightParams& w, const Words& words, int fragment,
                                     uint32_t (&a)[4]) {
    look_up(w.book.rest, words.word[0][fragment], a);
  }

 private:
  static __device__ void look_up(const uint32_t (&bytes)[2][4], uint32_t word, uint32_t (&a)[4]) {
    // Selectors in the order element 0 of registers 0, 1, element 1 of registers 0, 1; then of registers 2, 3.
    const uint32_t codes = ptx::prmt(word, 0u, 0x3120u);
    uint32_t low = codes & 0x77777777u;
    uint32_t top = and_or(codes >> 1, 0x44444444u, 0x32103210u);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t lower = four_bytes(bytes[0], low, top);
      const uint32_t upper = four_bytes(bytes[1], low, top);
      a[2 * half] = ptx::prmt(lower, upper, 0x6240u);
      a[2 * half + 1] = ptx::prmt(lower, upper, 0x7351u);
      low >>= 16;
      top >>= 16;
    }
  }

  // Of four codes. `low` selects by their lower three bits, `top` by their highest: i or i + 4 for byte i.
  static __device__ uint32_t four_bytes(const uint32_t (&table)[4], uint32_t low, uint32_t top) {
    return ptx::prmt(ptx::prmt(table[0], table[1], low), ptx::prmt(table[2], table[3], low), top);
  }
};

}  // namespace lowbit::cuda
