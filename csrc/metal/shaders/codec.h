// From the codes of a chunk (4 rows x 8 k, packing/metal_tile4.h) to numbers, exactly. The only place that knows formats.
//
// Integers become floats without a conversion and mostly without a shift: where a field of a 16-bit half starts at bit p of a
// half float's mantissa, an OR with the exponent of 2^(10 - p) makes the half 2^(10 - p) + q, and one subtraction takes that
// and the zero away. Both are exact, so what is left is q - zero: unlike sums of q * x that are corrected by zero * sum(x)
// afterwards, it keeps the componentwise error bound where weights are small and zeros are not.
#pragma once

#include "common/enums.h"
#include "metal/shaders/language.h"

namespace lowbit {

constexpr int bits_of(Format format) {
  return format == Format::kInt2                                                               ? 2
         : format == Format::kInt3                                                             ? 3
         : format == Format::kInt5                                                             ? 5
         : format == Format::kInt6                                                             ? 6
         : format == Format::kInt8 || format == Format::kFp8E4m3 || format == Format::kFp8E5m2 ? 8
                                                                                               : 4;
}
constexpr bool is_integer(Format format) { return int(format) <= int(Format::kInt8); }
// Whether half holds what a code stands for.
constexpr bool is_exact(Format format) {
  return format != Format::kNf4 && format != Format::kBnbFp4;
}
constexpr int low_bits(Format format) {
  return bits_of(format) >= 8 ? 8 : bits_of(format) >= 4 ? 4 : 2;
}
constexpr int high_bits(Format format) { return bits_of(format) - low_bits(format); }

// Code books that follow no rule.
constant constexpr float kNf4[16] = {
#include "formats/nf4.inc"
};
constant constexpr float kIq4Nl[16] = {
#include "formats/iq4_nl.inc"
};
constant constexpr float kBnbFp4[16] = {
#include "formats/bnb_fp4.inc"
};

// ---- words -------------------------------------------------------------------------------------------------------------

template <int kWords>
struct Words {
  uint word[kWords > 0 ? kWords : 1];
};

// 16 bytes at once, or as many as there are.
inline void load_words(device const uchar* from, thread Words<8>& to) {
  const uint4 a = ((device const uint4*)from)[0], b = ((device const uint4*)from)[1];
  to.word[0] = a.x, to.word[1] = a.y, to.word[2] = a.z, to.word[3] = a.w;
  to.word[4] = b.x, to.word[5] = b.y, to.word[6] = b.z, to.word[7] = b.w;
}
inline void load_words(device const uchar* from, thread Words<4>& to) {
  const uint4 a = *(device const uint4*)from;
  to.word[0] = a.x, to.word[1] = a.y, to.word[2] = a.z, to.word[3] = a.w;
}
inline void load_words(device const uchar* from, thread Words<2>& to) {
  const uint2 a = *(device const uint2*)from;
  to.word[0] = a.x, to.word[1] = a.y;
}
inline void load_words(device const uchar* from, thread Words<1>& to) {
  to.word[0] = *(device const uint*)from;
}
inline void load_words(device const uchar*, thread Words<0>&) {}

template <Format kFormat>
struct Chunk {
  Words<low_bits(kFormat)> low;
  Words<high_bits(kFormat)> high;
};

// `high_plane` is where a strip's second plane starts.
template <Format kFormat>
inline Chunk<kFormat> load_chunk(device const uchar* strip, uint chunk, uint high_plane) {
  Chunk<kFormat> codes;
  load_words(strip + chunk * uint(4 * low_bits(kFormat)), codes.low);
  load_words(strip + high_plane + chunk * uint(4 * high_bits(kFormat)), codes.high);
  return codes;
}

// ---- pairs -------------------------------------------------------------------------------------------------------------

// Field `index` of 16: the codes of an even k (lower half) and of the next (upper half), still where they stand, from bit
// `at` of each half on.
template <int kBits, int kWords>
inline uint masked(thread const Words<kWords>& words, int index, int at) {
  const int shift = index * kBits % 16 - at;
  const uint mask = ((1u << kBits) - 1u) * 0x00010001u;
  return (words.word[index * kBits / 16] >> shift) & (mask << at);
}

// One plane: 2, 4 or 8 bits. `zero` is an integer.
template <int kBits>
inline half2 integers(thread const Words<kBits>& words, int index, half zero) {
  const int at = index * kBits % 8;  // a field ends within the mantissa of 10 bits
  const uint exponents = uint(25 - at) << 10;
  const half2 raised =
      as_type<half2>(masked<kBits>(words, index, at) | exponents | exponents << 16);
  return raised - half2(half(float(1024 >> at)) + zero);
}
// Two planes.
template <int kLow, int kHigh>
inline half2 integers(thread const Words<kLow>& low, thread const Words<kHigh>& high, int index,
                      half zero) {
  const uint codes = masked<kLow>(low, index, 0) | masked<kHigh>(high, index, 0) << kLow;
  return as_type<half2>(codes | 0x64006400u) - half2(half(1024.0f) + zero);
}

// The numbers of k = 2 * pair and 2 * pair + 1 in a row of a chunk; integers minus `zero`.
template <Format kFormat>
struct Codec;

#define LOWBIT_ONE_PLANE(format)                                                             \
  template <>                                                                                \
  struct Codec<format> {                                                                     \
    static inline float2 pair(thread const Chunk<format>& c, int row, int pair, half zero) { \
      return float2(integers<bits_of(format)>(c.low, 4 * row + pair, zero));                 \
    }                                                                                        \
  };
#define LOWBIT_TWO_PLANES(format)                                                              \
  template <>                                                                                  \
  struct Codec<format> {                                                                       \
    static inline float2 pair(thread const Chunk<format>& c, int row, int pair, half zero) {   \
      return float2(                                                                           \
          integers<low_bits(format), high_bits(format)>(c.low, c.high, 4 * row + pair, zero)); \
    }                                                                                          \
  };
LOWBIT_ONE_PLANE(Format::kInt2)
LOWBIT_TWO_PLANES(Format::kInt3)
LOWBIT_ONE_PLANE(Format::kInt4)
LOWBIT_TWO_PLANES(Format::kInt5)
LOWBIT_TWO_PLANES(Format::kInt6)
LOWBIT_ONE_PLANE(Format::kInt8)
#undef LOWBIT_ONE_PLANE
#undef LOWBIT_TWO_PLANES

// Exponent and mantissa move to where half has them; the exponents' difference is a power of two, and exact.
template <>
struct Codec<Format::kFp8E4m3> {
  static inline float2 pair(thread const Chunk<Format::kFp8E4m3>& c, int row, int pair, half) {
    const uint codes = masked<8>(c.low, 4 * row + pair, 0);
    const half2 value =
        as_type<half2>((codes & 0x00800080u) << 8 | (codes & 0x007f007fu) << 7) * half2(256.0f);
    // All ones, which would be 480, are NaN.
    return float2(fabs(float(value.x)) == 480.0f ? NAN : float(value.x),
                  fabs(float(value.y)) == 480.0f ? NAN : float(value.y));
  }
};
template <>
struct Codec<Format::kFp8E5m2> {
  static inline float2 pair(thread const Chunk<Format::kFp8E5m2>& c, int row, int pair, half) {
    return float2(as_type<half2>(masked<8>(c.low, 4 * row + pair, 0) << 8));
  }
};
template <>
struct Codec<Format::kFp4E2m1> {
  static inline float2 pair(thread const Chunk<Format::kFp4E2m1>& c, int row, int pair, half) {
    const uint codes = masked<4>(c.low, 4 * row + pair, 0);
    return float2(as_type<half2>((codes & 0x00080008u) << 12 | (codes & 0x00070007u) << 9) *
                  half2(16384.0f));
  }
};
#define LOWBIT_BOOK(format, levels)                                                     \
  template <>                                                                           \
  struct Codec<format> {                                                                \
    static inline float2 pair(thread const Chunk<format>& c, int row, int pair, half) { \
      const uint codes = masked<4>(c.low, 4 * row + pair, 0);                           \
      return float2(levels[codes & 15u], levels[codes >> 16]);                          \
    }                                                                                   \
  };
LOWBIT_BOOK(Format::kNf4, kNf4)
LOWBIT_BOOK(Format::kIq4Nl, kIq4Nl)
LOWBIT_BOOK(Format::kBnbFp4, kBnbFp4)
#undef LOWBIT_BOOK

}  // namespace lowbit
