// NF4: sixteen levels that follow no rule, looked up in registers. prmt picks four bytes out of eight by four selectors
// of three bits, so a table of sixteen bytes is two prmt and a third that chooses between them by the codes' top bits.
// A level has two bytes, a word eight codes: twelve prmt, and four to put bytes side by side.
#pragma once

#include "cuda/codec/codec.cuh"
#include "formats/codebooks.h"

namespace lowbit::cuda {

// The 16-bit pattern of a level, or of what is lost when it is rounded to 16 bits.
template <class T>
constexpr uint32_t nf4_level(int code, bool rest) {
  const double level = kNf4Code[static_cast<size_t>(code)];
  const uint32_t nearest = T::bits(level);
  return rest ? T::bits(level - T::value(nearest)) : nearest;
}

// One byte (0 low, 1 high) of four levels.
template <class T>
constexpr uint32_t nf4_bytes(int first, int byte, bool rest) {
  uint32_t bytes = 0;
  for (int i = 0; i < 4; ++i)
    bytes |= (nf4_level<T>(first + i, rest) >> (8 * byte) & 0xffu) << (8 * i);
  return bytes;
}

// Four codes' bytes. `low` selects by the codes' lower three bits, `top` by their highest: i or i + 4 for byte i.
template <class T, int kByte, bool kRest>
__device__ uint32_t nf4_lookup(uint32_t low, uint32_t top) {
  constexpr uint32_t t0 = nf4_bytes<T>(0, kByte, kRest), t1 = nf4_bytes<T>(4, kByte, kRest);
  constexpr uint32_t t2 = nf4_bytes<T>(8, kByte, kRest), t3 = nf4_bytes<T>(12, kByte, kRest);
  return ptx::prmt(ptx::prmt(t0, t1, low), ptx::prmt(t2, t3, low), top);
}

template <>
struct Codec<Format::kNf4> {
  static constexpr bool kInteger = false;
  static constexpr bool kExact = false;
  using Words = CellWords<1>;

  template <class T, bool kRest>
  static __device__ void look_up(uint32_t word, uint32_t (&a)[4]) {
    // Selectors in the order element 0 of registers 0, 1, element 1 of registers 0, 1; then of registers 2, 3.
    const uint32_t codes = ptx::prmt(word, 0u, 0x3120u);
    uint32_t low = codes & 0x77777777u;
    uint32_t top = and_or(codes >> 1, 0x44444444u, 0x32103210u);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t lower = nf4_lookup<T, 0, kRest>(low, top);
      const uint32_t upper = nf4_lookup<T, 1, kRest>(low, top);
      a[2 * half] = ptx::prmt(lower, upper, 0x6240u);
      a[2 * half + 1] = ptx::prmt(lower, upper, 0x7351u);
      low >>= 16;
      top >>= 16;
    }
  }

  template <class T>
  static __device__ void decode(const Words& words, int fragment, uint32_t, uint32_t,
                                uint32_t (&a)[4]) {
    look_up<T, false>(words.word[0][fragment], a);
  }
  template <class T>
  static __device__ void decode_rest(const Words& words, int fragment, uint32_t (&a)[4]) {
    look_up<T, true>(words.word[0][fragment], a);
  }
};

}  // namespace lowbit::cuda
