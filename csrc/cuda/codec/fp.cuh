// FP4 E2M1, FP8 E4M3 and FP8 E5M2: small IEEE-style numbers, whose bits are put where the 16-bit type has its own
// exponent's low end and mantissa's high end. That is the number times 2^(narrow bias - wide bias), subnormals included,
// because a subnormal of the one becomes a subnormal of the other; one exact multiplication by a power of two mends it.
#pragma once

#include "cuda/codec/codec.cuh"

namespace lowbit::cuda {

// A field of sign, exponent and mantissa bits, the lowest at bit kAt of each half, as 16-bit numbers (not yet mended).
template <class T, int kExponentBits, int kMantissaBits, int kAt>
__device__ uint32_t place_number(uint32_t word) {
  constexpr int up = T::kMantissaBits - kMantissaBits;  // where the mantissa's lowest bit goes
  constexpr int width = kExponentBits + kMantissaBits;
  constexpr uint32_t magnitude = twice(((1u << width) - 1u) << up);
  return and_or(shift_up<15 - width - kAt>(word), 0x80008000u,
                shift_up<up - kAt>(word) & magnitude);
}

// 2^(wide bias - narrow bias), twice.
template <class T, int kExponentBits>
constexpr uint32_t bias_power() {
  constexpr int wide = T::kMantissaBits == 10 ? 15 : 127;
  constexpr int narrow = (1 << (kExponentBits - 1)) - 1;
  // The exponent field of 2^e is e + wide, here 2 * wide - narrow: below the field of infinity for every format here.
  return twice(static_cast<uint32_t>(2 * wide - narrow) << T::kMantissaBits);
}

template <>
struct Codec<Format::kFp4E2m1> {
  static constexpr bool kInteger = false;
  static constexpr bool kExact = true;
  using Words = CellWords<1>;

  template <class T>
  static __device__ void decode(const WeightParams&, const Words& words, int fragment, uint32_t,
                                uint32_t, uint32_t (&a)[4]) {
    const uint32_t word = words.word[0][fragment];
    constexpr uint32_t power = bias_power<T, 2>();
    a[0] = multiply<T>(place_number<T, 2, 1, 0>(word), power);
    a[1] = multiply<T>(place_number<T, 2, 1, 4>(word), power);
    a[2] = multiply<T>(place_number<T, 2, 1, 8>(word), power);
    a[3] = multiply<T>(place_number<T, 2, 1, 12>(word), power);
  }
};

// E4M3 has no infinity and spends one code per sign, the one that would be 480, on NaN. Multiplied by the number `brink`,
// 480 overflows to infinity and 448, the next below, does not; infinity times zero is NaN, anything else times zero adds
// nothing. Two fma, where comparing would take integer instructions, which are the scarcer ones.
template <>
struct Codec<Format::kFp8E4m3> {
  static constexpr bool kInteger = false;
  static constexpr bool kExact = true;
  using Words = CellWords<2>;

  template <class T>
  static __device__ uint32_t value(uint32_t placed) {
    // fp16: 480 * 137 = 65760 > 65520 > 448 * 137.    bf16: 480 * 137 > 2^16 > 448 * 137, times 2^112.
    constexpr uint32_t brink = twice(T::bits(T::kMantissaBits == 10 ? 137.0 : 137.0 * 0x1p112));
    const uint32_t number = multiply<T>(placed, bias_power<T, 4>());
    return T::fma(multiply<T>(number, brink), 0u, number);
  }

  template <class T>
  static __device__ void decode(const WeightParams&, const Words& words, int fragment, uint32_t,
                                uint32_t, uint32_t (&a)[4]) {
    a[0] = value<T>(place_number<T, 4, 3, 0>(words.word[0][fragment]));
    a[1] = value<T>(place_number<T, 4, 3, 8>(words.word[0][fragment]));
    a[2] = value<T>(place_number<T, 4, 3, 0>(words.word[1][fragment]));
    a[3] = value<T>(place_number<T, 4, 3, 8>(words.word[1][fragment]));
  }
};

// E5M2 is the upper byte of fp16, infinities and NaN included. bfloat16 takes the detour by way of fp32, which keeps them.
template <>
struct Codec<Format::kFp8E5m2> {
  static constexpr bool kInteger = false;
  static constexpr bool kExact = true;
  using Words = CellWords<2>;

  template <class T>
  static __device__ uint32_t value(uint32_t half) {
    if constexpr (T::kMantissaBits == 10) {
      return half;
    } else {
      return T::pack(Float16::low(half), Float16::high(half));
    }
  }

  template <class T>
  static __device__ void decode(const WeightParams&, const Words& words, int fragment, uint32_t,
                                uint32_t, uint32_t (&a)[4]) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const uint32_t word = words.word[j][fragment];
      a[2 * j] = value<T>(word << 8 & 0xff00ff00u);
      a[2 * j + 1] = value<T>(word & 0xff00ff00u);
    }
  }
};

}  // namespace lowbit::cuda
