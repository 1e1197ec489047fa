// Integers of 2..8 bits. A code in the lowest mantissa bits of 2^M (M = mantissa bits of the type) is the number 2^M + q;
// subtracting 2^M + zero, which is one fma with 1, leaves q - zero, all of it exact.
#pragma once

#include "cuda/codec/codec.cuh"

namespace lowbit::cuda {

// Bits of q | magic, for register r of the pair registers of a fragment.
template <Format kFormat, int kRegister>
__device__ uint32_t integer_field(const CellWords<Planes<kFormat>::kWords>& words, int fragment,
                                  uint32_t magic) {
  using P = Planes<kFormat>;
  constexpr uint32_t low_mask = twice((1u << P::kLow) - 1u);
  if constexpr (P::kLow == 8) {
    return and_or(words.word[kRegister / 2][fragment] >> (8 * (kRegister % 2)), low_mask, magic);
  } else {
    const uint32_t low = and_or(words.word[0][fragment] >> (P::kLow * kRegister), low_mask, magic);
    if constexpr (P::kHigh == 0) {
      return low;
    } else {
      constexpr uint32_t high_mask = twice(((1u << P::kHigh) - 1u) << P::kLow);
      const uint32_t high = shift_up<P::kLow - P::kHigh * kRegister>(words.word[1][fragment]);
      return and_or(high, high_mask, low);
    }
  }
}

template <Format kFormat>
struct IntegerCodec {
  static constexpr bool kInteger = true;
  static constexpr bool kExact = true;
  using Words = CellWords<Planes<kFormat>::kWords>;

  // -(2^M + z), twice. bfloat16 has 8 significant bits: exact for z <= 128, and no code of fewer than 8 bits has a zero
  // above its own range.
  template <class T>
  static __device__ uint32_t zero(uint32_t z) {
    return twice(T::bits(-double{1 << T::kMantissaBits})) + (z << 16 | z);
  }

  template <class T>
  static __device__ void decode(const WeightParams&, const Words& words, int fragment,
                                uint32_t zero_g, uint32_t zero_g8, uint32_t (&a)[4]) {
    constexpr uint32_t magic = twice(T::bits(1 << T::kMantissaBits));
    a[0] = add<T>(integer_field<kFormat, 0>(words, fragment, magic), zero_g);
    a[1] = add<T>(integer_field<kFormat, 1>(words, fragment, magic), zero_g8);
    a[2] = add<T>(integer_field<kFormat, 2>(words, fragment, magic), zero_g);
    a[3] = add<T>(integer_field<kFormat, 3>(words, fragment, magic), zero_g8);
  }
};

// Eight bits do not fit bfloat16's seven. With q = q7 + 128 top:
//   128 + q7           is q7 below the magic exponent
//   top ? -128 : -256  differ in the lowest bit of the exponent, which is where q's own top bit stands
// and their sum is q - 128: the symmetric zero. Any other zero is one more exact addition.
template <>
struct Codec<Format::kInt8> : IntegerCodec<Format::kInt8> {
  static __device__ uint32_t minus_128(uint32_t q) {
    const uint32_t low = and_or(q, 0x007f007fu, twice(BFloat16::bits(128)));
    const uint32_t top =
        ptx::lop3<0x6a>(q, 0x00800080u, twice(BFloat16::bits(-256)));  // (a & b) ^ c
    return add<BFloat16>(low, top);
  }

  template <class T>
  static __device__ uint32_t zero(uint32_t z) {
    if constexpr (T::kMantissaBits >= 8) {
      return IntegerCodec<Format::kInt8>::zero<T>(z);
    } else {
      return minus_128(z << 16 | z) ^ 0x80008000u;  // 128 - z
    }
  }

  template <class T>
  static __device__ void decode(const WeightParams& w, const Words& words, int fragment,
                                uint32_t zero_g, uint32_t zero_g8, uint32_t (&a)[4]) {
    if constexpr (T::kMantissaBits >= 8) {
      IntegerCodec<Format::kInt8>::decode<T>(w, words, fragment, zero_g, zero_g8, a);
    } else {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const uint32_t q = words.word[r / 2][fragment] >> (8 * (r % 2));
        a[r] = add<T>(minus_128(q), r % 2 == 0 ? zero_g : zero_g8);
      }
    }
  }
};

template <>
struct Codec<Format::kInt2> : IntegerCodec<Format::kInt2> {};
template <>
struct Codec<Format::kInt3> : IntegerCodec<Format::kInt3> {};
template <>
struct Codec<Format::kInt4> : IntegerCodec<Format::kInt4> {};
template <>
struct Codec<Format::kInt5> : IntegerCodec<Format::kInt5> {};
template <>
struct Codec<Format::kInt6> : IntegerCodec<Format::kInt6> {};

}  // namespace lowbit::cuda
