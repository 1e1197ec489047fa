// From the bytes of a block (32 k of 16 rows) to pairs of bf16, and to AMX B tiles. Included after V and codec-inl.h; x86-64 only.
//
// bf16: one tile, 16 rows of 64 bytes; a 32-bit lane holds two k of one output row. Rows 2Q and 2Q + 1 of the tile are
// quad Q of the block as (k0, k2) and (k1, k3): that order costs one shift of a register of codes where (k0, k1) costs a
// permutation, and x is given the same one (amx_pack-inl.h, ops_gemm.cpp).
// int8: half a tile, 8 rows of four k: quads as they are.
//
// A decoder is a plain function, called once per 512 weights, so that the blocking around it is compiled once and not
// per format. Formats and bits are known here and nowhere else.

// What a decoder needs to know about the current group of a strip.
struct TileGroup {
  Group floats;
  V::I zeros;        // kInt: the zero of row n in every byte of lane n
  bool small_zeros;  // ... and all of them are at most 16
};

inline TileGroup tile_group(const WeightView& w, const uint8_t* strip, int64_t g) {
  TileGroup group{{group_scales(w, strip, g), V::zero()}, V::izero(), false};
  if (w.zero_kind == ZeroKind::kNone) return group;
  group.floats.zero = group_zeros(w, strip, g);
  if (w.zero_kind == ZeroKind::kInt) {
    const V::I zeros = V::iload_u8(strip + w.zeros_offset + g * 16);
    group.zeros = V::imul(zeros, V::iset1(0x01010101));
    group.small_zeros = _mm512_cmpgt_epi32_mask(zeros, _mm512_set1_epi32(16)) == 0;
  }
  return group;
}

// Decodes one block to `to`; int8 decoders also add the codes of each row to `sum`.
using DecodeBlock = void (*)(const void* codec, const uint8_t* block, const TileGroup& group,
                             uint8_t* to, V::I& sum);

// Calls action(0), action(1), .. action(7) with the index as a constant: the quads of a block.
template <int Q>
struct Index {
  static constexpr int value = Q;
};
template <int Q = 0, class Action>
LOWBIT_UNROLLED inline void for_each_quad(const Action& action) {
  if constexpr (Q < 8) {
    action(Index<Q>());
    for_each_quad<Q + 1>(action);
  }
}

// ---- pairs of bf16 -------------------------------------------------------------------------------------------------

// The upper halves of two floats as one pair per lane: exact for values that are exact in bf16.
inline V::I pair_exact(V::F even, V::F odd) {
  return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(_mm512_castps_si512(even), 16),
                                 _mm512_castps_si512(odd));
}

#if defined(__AVX512BF16__)
// Rounded to the nearest, ties to even; subnormals become zero. The instruction leaves the 16 odd values above the 16
// even ones, one permutation joins them.
inline V::I pair_rounded(V::F even, V::F odd) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i order =
      _mm512_or_si512(lane, _mm512_slli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(16)), 16));
  return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}
#else
inline V::I round_bf16(V::F value) {  // in the upper half of each lane
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  const __m512i exponent = _mm512_and_si512(bits, _mm512_set1_epi32(0x7f800000));
  const __mmask16 subnormal = _mm512_testn_epi32_mask(exponent, exponent);
  return _mm512_mask_and_epi32(kept, subnormal, bits, _mm512_set1_epi32(INT32_MIN));
}
inline V::I pair_rounded(V::F even, V::F odd) {
  return pair_exact(_mm512_castsi512_ps(round_bf16(even)), _mm512_castsi512_ps(round_bf16(odd)));
}
#endif

// ---- any codec -----------------------------------------------------------------------------------------------------

// Codes without scale, where they are exact in bf16.
template <class Codec>
void decode_codes(const void* codec, const uint8_t* block, const TileGroup& group, uint8_t* to,
                  V::I&) {
  const Codec& c = *static_cast<const Codec*>(codec);
  for_each_quad([&](auto quad) LOWBIT_UNROLLED {
    constexpr int Q = decltype(quad)::value;
    const V::F k0 = c.template value<Q, 0>(block, group.floats),
               k1 = c.template value<Q, 1>(block, group.floats),
               k2 = c.template value<Q, 2>(block, group.floats),
               k3 = c.template value<Q, 3>(block, group.floats);
    V::istore(to + 2 * Q * 64, pair_exact(k0, k2));
    V::istore(to + (2 * Q + 1) * 64, pair_exact(k1, k3));
  });
}

// Weights: the fp32 value that dequantize gives, rounded once.
template <class Codec>
void decode_weights(const void* codec, const uint8_t* block, const TileGroup& group, uint8_t* to,
                    V::I&) {
  const Codec& c = *static_cast<const Codec*>(codec);
  for_each_quad([&](auto quad) LOWBIT_UNROLLED {
    constexpr int Q = decltype(quad)::value;
    V::F k[4] = {
        c.template value<Q, 0>(block, group.floats), c.template value<Q, 1>(block, group.floats),
        c.template value<Q, 2>(block, group.floats), c.template value<Q, 3>(block, group.floats)};
    if constexpr (!Codec::kScaledInside) {
      for (int j = 0; j < 4; ++j) k[j] = V::mul(k[j], group.floats.scale);
    }
    V::istore(to + 2 * Q * 64, pair_rounded(k[0], k[2]));
    V::istore(to + (2 * Q + 1) * 64, pair_rounded(k[1], k[3]));
  });
}

#if defined(__AVX512BF16__)
// The same for four bits, in three quarters of the time. Each code is looked up where its pair will stand: a lane holds
// one k, and the two lanes of a row of W are neighbours, so that rounding leaves pairs and nothing is left to permute.
struct NibbleWeights {
  V::Lut values;

  explicit NibbleWeights(const WeightView& w) {
    float table[16];
    const float middle = w.code == nullptr && w.zero_kind == ZeroKind::kNone ? 8.0f : 0.0f;
    for (int q = 0; q < 16; ++q)
      table[q] = w.code != nullptr ? w.code[q] : static_cast<float>(q) - middle;
    values = V::make_lut(table);
  }
};

// Lanes 0 .. 7, or 8 .. 15, each twice.
inline V::I twice(int first) {
  const __m512i lane = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
  return _mm512_add_epi32(lane, _mm512_set1_epi32(first));
}

template <Zeros kZeros>
LOWBIT_UNROLLED inline V::F weigh(V::F q, const Group& g) {
  if constexpr (kZeros == Zeros::kMiddle) return V::mul(q, g.scale);
  if constexpr (kZeros == Zeros::kGiven) return V::mul(V::sub(q, g.zero), g.scale);
  return V::add(V::mul(q, g.scale), g.zero);
}

template <Zeros kZeros>
void decode_nibble_weights(const void* codec, const uint8_t* block, const TileGroup& group,
                           uint8_t* to, V::I&) {
  const V::Lut values = static_cast<const NibbleWeights*>(codec)->values;
  Group half[2];
  for (int i = 0; i < 2; ++i) {
    half[i].scale = _mm512_permutexvar_ps(twice(8 * i), group.floats.scale);
    half[i].zero = _mm512_permutexvar_ps(twice(8 * i), group.floats.zero);
  }
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) {
    const V::I codes = V::iload(block + 64 * v);
    const V::I low = _mm512_permutexvar_epi32(twice(0), codes),
               high = _mm512_permutexvar_epi32(twice(8), codes);
#pragma GCC unroll 4
    for (int row = 0; row < 4; ++row, to += 64) {
      // Row 0: k0 and k2 of the first quad; 1: k1 and k3; 2, 3: of the second quad, four bits up.
      const int shift = row % 2 * 8 + row / 2 * 4;
      const __m512i shifts = _mm512_set1_epi64(static_cast<int64_t>(shift + 16) << 32 | shift);
      const V::F first = weigh<kZeros>(V::lut16(_mm512_srlv_epi32(low, shifts), values), half[0]);
      const V::F second = weigh<kZeros>(V::lut16(_mm512_srlv_epi32(high, shifts), values), half[1]);
      V::istore(to, (__m512i)_mm512_cvtne2ps_pbh(second, first));
    }
  }
}
#endif

// ---- faster ways for codes -----------------------------------------------------------------------------------------

// The values of 32 indices as bf16, for vpermw: it reads the low five bits of each 16-bit lane.
struct WordTable {
  __m512i words;

  template <class Value>
  explicit WordTable(const Value& value) {
    uint16_t table[32];
    for (int i = 0; i < 32; ++i) {
      const float f = value(i);
      uint32_t bits;
      __builtin_memcpy(&bits, &f, 4);
      table[i] = static_cast<uint16_t>(bits >> 16);
    }
    words = _mm512_loadu_si512(table);
  }
  V::I operator()(V::I index) const { return _mm512_permutexvar_epi16(index, words); }
};

// Four bits: what stands above a nibble is cut off by the table, which repeats after 16.
inline void decode_nibbles(const void* table, const uint8_t* block, const TileGroup&, uint8_t* to,
                           V::I&) {
  const WordTable& value = *static_cast<const WordTable*>(table);
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v, block += 64, to += 4 * 64) {
    const V::I codes = V::iload(block);
    V::istore(to, value(codes));
    V::istore(to + 64, value(_mm512_srli_epi16(codes, 8)));
    V::istore(to + 128, value(_mm512_srli_epi16(codes, 4)));
    V::istore(to + 192, value(_mm512_srli_epi16(codes, 12)));
  }
}

// Up to five bits.
template <int kBits>
void decode_table(const void* table, const uint8_t* block, const TileGroup&, uint8_t* to, V::I&) {
  const WordTable& value = *static_cast<const WordTable*>(table);
  for_each_quad([&](auto quad) LOWBIT_UNROLLED {
    constexpr int Q = decltype(quad)::value;
    const V::I codes = Codes<kBits>::template quad<Q>(block);
    V::istore(to + 2 * Q * 64, value(codes));
    V::istore(to + (2 * Q + 1) * 64, value(_mm512_srli_epi16(codes, 8)));
  });
}

// Up to four bits with integer zeros: q - zero is -16 .. 15, five bits in two's complement. Larger zeros are legal
// too, and take the way of floats.
template <int kBits>
struct ZeroTable {
  WordTable table;
  IntCodec<kBits, Zeros::kGiven> codec;

  explicit ZeroTable(const WeightView& w)
      : table([](int i) { return static_cast<float>(i < 16 ? i : i - 32); }), codec(w) {}
};
template <int kBits>
void decode_zeros(const void* codec, const uint8_t* block, const TileGroup& group, uint8_t* to,
                  V::I& sum) {
  const ZeroTable<kBits>& c = *static_cast<const ZeroTable<kBits>*>(codec);
  if (!group.small_zeros) {
    return decode_codes<IntCodec<kBits, Zeros::kGiven>>(&c.codec, block, group, to, sum);
  }
  for_each_quad([&](auto quad) LOWBIT_UNROLLED {
    constexpr int Q = decltype(quad)::value;
    const V::I codes = _mm512_sub_epi8(Codes<kBits>::template quad<Q>(block), group.zeros);
    V::istore(to + 2 * Q * 64, c.table(codes));
    V::istore(to + (2 * Q + 1) * 64, c.table(_mm512_srli_epi16(codes, 8)));
  });
}

#if defined(LOWBIT_BYTE_LUT)
// Low and high bytes of four bf16 per lane as the pairs (k0, k2) and (k1, k3).
inline void store_bytes(V::I low, V::I high, uint8_t* to) {
  constexpr unsigned long long kEven = 0x5555555555555555ull;
  V::istore(to, _mm512_mask_mov_epi8(_mm512_slli_epi16(high, 8), kEven, low));
  V::istore(to + 64, _mm512_mask_mov_epi8(_mm512_srli_epi16(low, 8), ~kEven, high));
}

// FP8 through the byte tables of its codec.
inline void decode_fp8(const void* codec, const uint8_t* block, const TileGroup&, uint8_t* to,
                       V::I&) {
  const Fp8TableCodec& c = *static_cast<const Fp8TableCodec*>(codec);
#pragma GCC unroll 8
  for (int q = 0; q < 8; ++q, block += 64, to += 128) {
    const V::I codes = V::iload(block);
    const V::I sign = V::band(codes, V::iset1(static_cast<int32_t>(0x80808080u)));
    store_bytes(V::lut128(codes, c.low), V::bor(V::lut128(codes, c.high), sign), to);
  }
}

// q - 128 through byte tables of its magnitude. 128 has an index of its own only by name: the tables end at 127.
struct MagnitudeTable {
  V::ByteLut low, high;

  explicit MagnitudeTable(const WeightView&) {
    uint8_t halves[2][128];
    for (int q = 0; q < 128; ++q) {
      const float f = static_cast<float>(q);
      uint32_t bits;
      __builtin_memcpy(&bits, &f, 4);
      halves[0][q] = static_cast<uint8_t>(bits >> 16);
      halves[1][q] = static_cast<uint8_t>(bits >> 24);
    }
    low = V::make_byte_lut(halves[0]);
    high = V::make_byte_lut(halves[1]);
  }
};
inline void decode_bytes(const void* codec, const uint8_t* block, const TileGroup&, uint8_t* to,
                         V::I&) {
  const MagnitudeTable& c = *static_cast<const MagnitudeTable*>(codec);
  const V::I top = V::iset1(static_cast<int32_t>(0x80808080u));
#pragma GCC unroll 8
  for (int q = 0; q < 8; ++q, block += 64, to += 128) {
    const V::I code = _mm512_xor_si512(V::iload(block), top);  // q - 128 as a signed byte
    const V::I magnitude = _mm512_abs_epi8(code);
    const __mmask64 least = _mm512_cmpeq_epi8_mask(magnitude, top);  // -128: 0xc300
    const V::I high =
        _mm512_mask_mov_epi8(V::lut128(magnitude, c.high), least, _mm512_set1_epi8(0x43));
    const V::I low = _mm512_mask_mov_epi8(V::lut128(magnitude, c.low), least, V::izero());
    store_bytes(low, V::bor(high, V::band(code, top)), to);
  }
}
#endif

// ---- from a format to a decoder ------------------------------------------------------------------------------------

template <class Codec, class Action>
void with_generic(const Codec& codec, const Action& action) {
  action(&decode_codes<Codec>, static_cast<const void*>(&codec));
}

template <int kBits, class Action>
void with_int_code_decoder(const WeightView& w, const Action& action) {
  if (w.zero_kind == ZeroKind::kInt) {
    if constexpr (kBits <= 4) {
      const ZeroTable<kBits> table(w);
      return action(&decode_zeros<kBits>, static_cast<const void*>(&table));
    } else {
      return with_generic(IntCodec<kBits, Zeros::kGiven>(w), action);
    }
  }
  if constexpr (kBits <= 5) {
    const WordTable table(
        [](int i) { return static_cast<float>((i & ((1 << kBits) - 1)) - (1 << (kBits - 1))); });
    action(kBits == 4 ? &decode_nibbles : &decode_table<kBits>, static_cast<const void*>(&table));
  } else {
#if defined(LOWBIT_BYTE_LUT)
    if constexpr (kBits == 8) {
      const MagnitudeTable table(w);
      return action(&decode_bytes, static_cast<const void*>(&table));
    }
#endif
    with_generic(IntCodec<kBits, Zeros::kMiddle>(w), action);
  }
}

// Calls action(decoder, codec) for codes that are exact in bf16; kernel_table.cpp sends no others here.
template <class Action>
void with_code_decoder(const WeightView& w, const Action& action) {
  switch (w.format) {
    case Format::kInt2:
      return with_int_code_decoder<2>(w, action);
    case Format::kInt3:
      return with_int_code_decoder<3>(w, action);
    case Format::kInt4:
      return with_int_code_decoder<4>(w, action);
    case Format::kInt5:
      return with_int_code_decoder<5>(w, action);
    case Format::kInt6:
      return with_int_code_decoder<6>(w, action);
    case Format::kInt8:
      return with_int_code_decoder<8>(w, action);
    case Format::kFp8E4m3:
    case Format::kFp8E5m2: {
#if defined(LOWBIT_BYTE_LUT)
      const Fp8TableCodec codec(w);
      return action(&decode_fp8, static_cast<const void*>(&codec));
#else
      if (w.format == Format::kFp8E4m3) return with_generic(E4m3Codec(w), action);
      return with_generic(E5m2Codec(w), action);
#endif
    }
    default: {
      const WordTable table([&w](int i) { return w.code[i & 15]; });
      return action(&decode_nibbles, static_cast<const void*>(&table));
    }
  }
}

template <class Action>
struct WeightDecoder {
  const Action& action;

  template <class Codec>
  void operator()(const Codec& codec) const {
    action(&decode_weights<Codec>, static_cast<const void*>(&codec));
  }
};

// Calls action(decoder, codec) for weights rounded to bf16: every format.
template <class Action>
void with_weight_decoder(const WeightView& w, const Action& action) {
#if defined(__AVX512BF16__)
  if (w.bits == 4) {
    const NibbleWeights codec(w);
    const bool scaled = w.zero_kind == ZeroKind::kNone, offset = w.zero_kind == ZeroKind::kOffset;
    return action(scaled   ? &decode_nibble_weights<Zeros::kMiddle>
                  : offset ? &decode_nibble_weights<Zeros::kOffset>
                           : &decode_nibble_weights<Zeros::kGiven>,
                  static_cast<const void*>(&codec));
  }
#endif
  with_codec(w, WeightDecoder<Action>{action});
}

// ---- int8 ----------------------------------------------------------------------------------------------------------

template <int kBits>
void decode_i8(const void*, const uint8_t* block, const TileGroup&, uint8_t* to, V::I& sum) {
  for_each_quad([&](auto quad) LOWBIT_UNROLLED {
    constexpr int Q = decltype(quad)::value;
    const V::I codes = Codes<kBits>::template quad<Q>(block);
    sum = V::dot4(sum, codes, V::iset1(0x01010101));
    V::istore(to + Q * 64, codes);
  });
}

// Integer formats only.
inline DecodeBlock i8_decoder(int bits) {
  switch (bits) {
    case 2:
      return &decode_i8<2>;
    case 3:
      return &decode_i8<3>;
    case 4:
      return &decode_i8<4>;
    case 5:
      return &decode_i8<5>;
    case 6:
      return &decode_i8<6>;
    default:
      return &decode_i8<8>;
  }
}
