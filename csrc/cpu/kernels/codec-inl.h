// Codecs: from the bytes of a block to 16 fp32 values (one k, 16 rows) or to 4 x 16 clean codes (one quad).
//
// A kernel sees only `Codec::template value<Q, J>(block, group)`: quad Q of a 32-element block, element J of the
// quad. Everything about bits, planes, code books and zeros is here. Included inside a namespace per ISA, after V.

// ---- codes: quad Q of a block as four u8 codes per 32-bit lane -----------------------------------------------------

// Functions that must be inlined where one register of V is several of the machine's: values would go through memory.
#if !defined(LOWBIT_INLINE)
#define LOWBIT_INLINE
#endif
// What takes a part of a kernel as an argument, and that part.
#define LOWBIT_FORCED __attribute__((always_inline))

#include "packing/code_pieces-inl.h"

template <int kBits>
struct Codes {
  // vector(v) gives vector v of the block.
  template <int Q, class Vector>
  LOWBIT_FORCED static V::I quad_of(const Vector& vector) {
    constexpr CodePieces kPieces = code_pieces(kBits, Q);
    V::I codes =
        piece_of<kPieces.piece[0].shift, kPieces.piece[0].bits, 0>(vector(kPieces.piece[0].vector));
    if constexpr (kPieces.piece[1].bits != 0) {
      constexpr CodePiece p = kPieces.piece[1];
      codes = V::bor(codes, piece_of<p.shift, p.bits, p.position>(vector(p.vector)));
    }
    if constexpr (kPieces.piece[2].bits != 0) {
      constexpr CodePiece p = kPieces.piece[2];
      codes = V::bor(codes, piece_of<p.shift, p.bits, p.position>(vector(p.vector)));
    }
    return codes;
  }
  template <int Q>
  LOWBIT_INLINE static V::I quad(const uint8_t* b) {
    return quad_of<Q>([b](int v) LOWBIT_FORCED { return V::iload(b + v * 64); });
  }
  // Element k, in the low bits of each lane.
  static V::I at(const uint8_t* b, uint32_t k) {
    static constexpr CodePieces kTable[8] = {
        code_pieces(kBits, 0), code_pieces(kBits, 1), code_pieces(kBits, 2), code_pieces(kBits, 3),
        code_pieces(kBits, 4), code_pieces(kBits, 5), code_pieces(kBits, 6), code_pieces(kBits, 7)};
    const CodePieces& pieces = kTable[k / 4];
    V::I codes = piece_at(b, pieces.piece[0], k);
    if constexpr (8 % kBits != 0) codes = V::bor(codes, piece_at(b, pieces.piece[1], k));
    if constexpr (kBits == 5 || kBits == 6) codes = V::bor(codes, piece_at(b, pieces.piece[2], k));
    return codes;
  }

 private:
  // Bits go to their place by one shift, whatever crosses the bytes' borders on the way: the mask removes it.
  template <int kShift, int kCount, int kPosition>
  LOWBIT_INLINE static V::I piece_of(V::I vector) {
    constexpr int kRight = kShift - kPosition;
    const V::I mask =
        V::iset1(static_cast<int32_t>((0x01010101u * ((1u << kCount) - 1)) << kPosition));
    if constexpr (kCount == 8) {
      return vector;
    } else if constexpr (kRight == 0) {
      return V::band(vector, mask);
    } else if constexpr (kPosition == 0 && kShift + kCount == 8) {
      return V::shr8<kRight>(vector);
    } else {
      return V::band(V::shr<kRight>(vector), mask);
    }
  }
  static V::I piece_at(const uint8_t* b, const CodePiece& p, uint32_t k) {
    const V::I bits = V::shr_by(V::iload(b + p.vector * 64), p.shift + static_cast<int>(k % 4 * 8));
    const V::I piece = V::band(bits, V::iset1((1 << p.bits) - 1));
    return 8 % kBits == 0 ? piece : V::imul(piece, V::iset1(1 << p.position));
  }
};

// Adds four u8 codes of kBits times four s8 values to every 32-bit lane.
template <int kBits>
LOWBIT_INLINE inline V::I dot_codes(V::I sums, V::I codes, V::I x) {
#if defined(LOWBIT_SMALL_DOT)
  if constexpr (kBits <= 6) return V::dot4_small(sums, codes, x);
#endif
  return V::dot4(sums, codes, x);
}

// Element J of a quad, in the low byte of each lane.
template <int J>
LOWBIT_INLINE inline V::I lane(V::I codes) {
  if constexpr (J == 3) {
    return V::shr<24>(codes);
  } else {
    return V::band(V::shr<8 * J>(codes), V::iset1(0xff));
  }
}

// ---- values --------------------------------------------------------------------------------------------------------

// Scales, zeros and offsets of one group: 16 values in the storage dtype.
inline V::F load16(const uint8_t* p, ScaleDtype dtype) {
  if (dtype == ScaleDtype::kFloat32) {
    float values[16];
    __builtin_memcpy(values, p, 64);
    return V::load(values);
  }
  return dtype == ScaleDtype::kFloat16 ? V::load_half(p) : V::load_bfloat(p);
}

inline float load1(const uint8_t* p, ScaleDtype dtype) {
  if (dtype == ScaleDtype::kFloat32) {
    float value;
    __builtin_memcpy(&value, p, 4);
    return value;
  }
  uint8_t row[64] = {p[0], p[1]};
  float values[16];
  V::store(values, load16(row, dtype));
  return values[0];
}

inline V::F group_scales(const WeightView& w, const uint8_t* strip, int64_t g) {
  const uint8_t* p = strip + w.scales_offset + g * w.scales_per_group * w.scale_bytes;
  return w.scales_per_group == 1 ? V::set1(load1(p, w.scale_dtype)) : load16(p, w.scale_dtype);
}

inline V::F group_zeros(const WeightView& w, const uint8_t* strip, int64_t g) {
  const uint8_t* p = strip + w.zeros_offset + g * 16 * w.zero_bytes;
  return w.zero_kind == ZeroKind::kInt ? V::load_u8(p) : load16(p, w.scale_dtype);
}

// What a codec needs to know about the current group. With offsets the scale is applied to every weight (w = q*s + o),
// elsewhere once per group to the sum.
struct Group {
  V::F scale;
  V::F zero;  // or the offset
};

enum class Zeros { kMiddle, kGiven, kOffset };  // 2^(bits-1) | zeros per group | offsets per group

// Integers: (q - zero), or q * scale + offset.
template <int kBits, Zeros kZeros>
struct IntCodec {
  static constexpr bool kScaledInside = kZeros == Zeros::kOffset;
  V::Lut table;

  explicit IntCodec(const WeightView&) : table(make_table()) {}

  template <int Q, int J>
  LOWBIT_INLINE V::F value(const uint8_t* block, const Group& g) const {
    const V::F q = code<Q, J>(block);
    if constexpr (kZeros == Zeros::kMiddle) {
      return q;
    } else if constexpr (kZeros == Zeros::kGiven) {
      return V::sub(q, g.zero);
    } else {
      return V::add(V::mul(q, g.scale), g.zero);
    }
  }

 private:
  static constexpr bool kUseLut = V::kFastLut && kBits <= 4;
  // Symmetric zeros are subtracted in the table, or right after the conversion: exact either way.
  static constexpr int kMiddle = kZeros == Zeros::kMiddle ? 1 << (kBits - 1) : 0;

  static V::Lut make_table() {
    float values[16];
    for (int q = 0; q < 16; ++q) values[q] = static_cast<float>(q - kMiddle);
    static_assert(sizeof(values) == 64, "a table has 16 entries");
    if constexpr (kUseLut) {
      return V::make_lut(values);
    } else {
      return V::Lut{};
    }
  }

  template <int Q, int J>
  LOWBIT_INLINE V::F code(const uint8_t* block) const {
#if defined(LOWBIT_QUAD_DECODE)
    return V::code_float<J, kMiddle>(Codes<kBits>::template quad<Q>(block));
#else
    if constexpr (kUseLut && kBits == 4) {
      // One shift: the table look-up ignores what stands above the nibble.
      return V::lut16(V::shr<8 * J + Q % 2 * 4>(V::iload(block + Q / 2 * 64)), table);
    } else if constexpr (kUseLut) {
      return V::lut16(V::shr<8 * J>(Codes<kBits>::template quad<Q>(block)), table);
    } else {
      const V::F q = V::to_f(lane<J>(Codes<kBits>::template quad<Q>(block)));
      return kMiddle == 0 ? q : V::sub(q, V::set1(static_cast<float>(kMiddle)));
    }
#endif
  }
};

// Four-bit code books. kHalves: the levels are small multiples of 1/2, and V can make use of that.
template <bool kHalves>
struct Code4Codec {
  static constexpr bool kScaledInside = false;
  V::Lut table;

  explicit Code4Codec(const WeightView& w) : table(V::make_lut(w.code)) {}

  template <int Q, int J>
  LOWBIT_INLINE V::F value(const uint8_t* block, const Group&) const {
#if defined(LOWBIT_QUAD_DECODE)
    return V::look_up<J, kHalves>(Codes<4>::quad<Q>(block), table);
#else
    return V::lut16(V::shr<8 * J + Q % 2 * 4>(V::iload(block + Q / 2 * 64)), table);
#endif
  }
};

#if defined(LOWBIT_QUAD_DECODE)
using Fp4Codec = Code4Codec<true>;

// V decodes the four elements of a quad itself; what they have in common is computed once.
template <bool kE4m3>
struct Fp8QuadCodec {
  static constexpr bool kScaledInside = false;

  explicit Fp8QuadCodec(const WeightView&) {}

  template <int Q, int J>
  LOWBIT_INLINE V::F value(const uint8_t* block, const Group&) const {
    return V::fp8_float<J, kE4m3>(Codes<8>::quad<Q>(block));
  }
};

using E4m3Codec = Fp8QuadCodec<true>;
using E5m2Codec = Fp8QuadCodec<false>;
#else
using Fp4Codec = Code4Codec<false>;

// FP8, by moving the bits to where fp32 has them. Subnormals are converted as integers, so that no subnormal fp32 is
// ever an operand (a thread may flush those to zero). E4M3's NaN is all ones; E5M2 has IEEE's. Codes are one per lane.
template <int kExponentBits, int kMantissaBits, bool kIeee>
LOWBIT_FORCED inline V::F fp8_values(V::I codes) {
  constexpr int kBias = (1 << (kExponentBits - 1)) - 1;
  const V::I magnitude = V::band(codes, V::iset1(0x7f));
  const V::I sign = V::shl<24>(V::band(codes, V::iset1(0x80)));
  const V::I shifted =
      V::iadd(V::shl<23 - kMantissaBits>(magnitude), V::iset1((127 - kBias) << 23));
  // 2^(1 - bias - mantissa bits): the spacing of subnormals.
  const V::F subnormal =
      V::mul(V::to_f(magnitude), V::as_f(V::iset1((127 + 1 - kBias - kMantissaBits) << 23)));
  V::F value = V::select_lt(magnitude, V::iset1(1 << kMantissaBits), subnormal, V::as_f(shifted));
  constexpr int kInfinity = kIeee ? ((1 << kExponentBits) - 1) << kMantissaBits : 0x7f;
  constexpr int kLastFinite = kInfinity - 1;
  if constexpr (kIeee) {
    // exponent all ones: keep the mantissa, raise fp32's exponent to all ones too
    value = V::select_lt(V::iset1(kLastFinite), magnitude,
                         V::as_f(V::bor(shifted, V::iset1(0x7f800000))), value);
  } else {
    value = V::select_lt(V::iset1(kLastFinite), magnitude, V::as_f(V::iset1(0x7fc00000)), value);
  }
  // as_f(x | sign) without an integer view of a float: negate where the sign is set.
  return V::select_lt(sign, V::izero(), V::sub(V::set1(-0.0f), value), value);
}

template <int kExponentBits, int kMantissaBits, bool kIeee>
struct Fp8Codec {
  static constexpr bool kScaledInside = false;

  explicit Fp8Codec(const WeightView&) {}

  template <int Q, int J>
  LOWBIT_INLINE V::F value(const uint8_t* block, const Group&) const {
    return fp8_values<kExponentBits, kMantissaBits, kIeee>(lane<J>(Codes<8>::quad<Q>(block)));
  }
};

#if defined(LOWBIT_BYTE_LUT)
// FP8 by two byte tables: every value of both formats is exact in bf16, which is the upper half of fp32. Two look-ups
// serve 64 weights, one permutation more per 16 builds the floats: a quarter of the instructions of Fp8Codec.
struct Fp8TableCodec {
  static constexpr bool kScaledInside = false;
  V::ByteLut low, high;

  explicit Fp8TableCodec(const WeightView& w) : Fp8TableCodec(w.code) {}
  explicit Fp8TableCodec(const float* code) {
    uint8_t halves[2][128];
    for (int q = 0; q < 128; ++q) {
      uint32_t bits;
      __builtin_memcpy(&bits, code + q, 4);
      halves[0][q] = static_cast<uint8_t>(bits >> 16);
      halves[1][q] = static_cast<uint8_t>(bits >> 24);
    }
    low = V::make_byte_lut(halves[0]);
    high = V::make_byte_lut(halves[1]);
  }

  template <int Q, int J>
  LOWBIT_INLINE V::F value(const uint8_t* block, const Group&) const {
    const V::I codes = Codes<8>::quad<Q>(block);
    const V::I sign = V::band(codes, V::iset1(static_cast<int32_t>(0x80808080u)));
    return V::float_of_halves<J>(V::lut128(codes, low), V::bor(V::lut128(codes, high), sign));
  }
};

using E4m3Codec = Fp8TableCodec;
using E5m2Codec = Fp8TableCodec;
#else
using E4m3Codec = Fp8Codec<4, 3, false>;
using E5m2Codec = Fp8Codec<5, 2, true>;
#endif
#endif

// ---- halves of blocks -----------------------------------------------------------------------------------------------

// Which half of a block of 32, as a type: its quads are kQuad .. kQuad + 3.
template <int kHalf>
struct BlockHalf {
  static constexpr int kQuad = 4 * kHalf;
};

// visit(BlockHalf, offset, k) for each half between k0 and k1, multiples of 16: where its block begins in a strip, and the
// block's first k. `offset` is that of k0's block, and becomes that of k1's. A block is in one half only where group sizes
// are odd multiples of 16. kTwice: whole blocks have a loop of their own, for kernels that are little more than it; it doubles
// their code.
template <bool kTwice, class Visit>
LOWBIT_FORCED inline void for_halves(int64_t& offset, int64_t block_bytes, int64_t k0, int64_t k1,
                                     const Visit& visit) {
  if constexpr (kTwice) {
    if ((k0 | k1) % 32 == 0) {
      for (int64_t k = k0; k < k1; k += 32, offset += block_bytes) {
        visit(BlockHalf<0>{}, offset, k);
        visit(BlockHalf<1>{}, offset, k);
      }
      return;
    }
  }
  for (int64_t k = k0 & -32; k < k1; k += 32, offset += block_bytes) {
    __asm__("" : "+r"(k));  // or the compiler takes out the first and the last block
    if (k >= k0) visit(BlockHalf<0>{}, offset, k);
    if (k < k1 - 16) visit(BlockHalf<1>{}, offset, k);
  }
  if (k1 % 32 != 0) offset -= block_bytes;
}

// What is read soon, asked for once per block.
template <int kQuad>
LOWBIT_FORCED inline void prefetch_half(const uint8_t* block) {
  if constexpr (kQuad == 0) __builtin_prefetch(block + 1024);
}

// ---- from a format id to a codec type -------------------------------------------------------------------------------

template <int kBits, class Action>
void with_int_codec(const WeightView& w, const Action& action) {
  if (w.zero_kind == ZeroKind::kNone) {
    action(IntCodec<kBits, Zeros::kMiddle>(w));
  } else if (w.zero_kind == ZeroKind::kOffset) {
    action(IntCodec<kBits, Zeros::kOffset>(w));
  } else {
    action(IntCodec<kBits, Zeros::kGiven>(w));
  }
}

template <int kBits>
struct Bits {
  static constexpr int value = kBits;
};

// Calls action(Bits<n>()) for an integer format of n bits: for kernels that multiply integers.
template <class Action>
void with_bits(const WeightView& w, const Action& action) {
  switch (w.format) {
    case Format::kInt2:
      return action(Bits<2>());
    case Format::kInt3:
      return action(Bits<3>());
    case Format::kInt4:
      return action(Bits<4>());
    case Format::kInt5:
      return action(Bits<5>());
    case Format::kInt6:
      return action(Bits<6>());
    default:
      return action(Bits<8>());
  }
}

// Calls action(codec) with the codec of w.format: the one place that maps formats to code.
template <class Action>
void with_codec(const WeightView& w, const Action& action) {
  switch (w.format) {
    case Format::kInt2:
      return with_int_codec<2>(w, action);
    case Format::kInt3:
      return with_int_codec<3>(w, action);
    case Format::kInt4:
      return with_int_codec<4>(w, action);
    case Format::kInt5:
      return with_int_codec<5>(w, action);
    case Format::kInt6:
      return with_int_codec<6>(w, action);
    case Format::kInt8:
      return with_int_codec<8>(w, action);
    case Format::kFp8E4m3:
      return action(E4m3Codec(w));
    case Format::kFp8E5m2:
      return action(E5m2Codec(w));
    case Format::kFp4E2m1:
      return action(Fp4Codec(w));
    case Format::kNf4:
    case Format::kIq4Nl:
    case Format::kBnbFp4:
      return action(Code4Codec<false>(w));
  }
}
