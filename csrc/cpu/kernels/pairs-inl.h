// Codes of 16 rows to pairs of bf16, in registers, for gemm_stream_bf16-inl.h. Included after V and codec-inl.h; V needs word_lut32,
// word_lut64, choose and ByteLut.
//
// A look-up takes the low five (or six) bits of every 16-bit word and ignores the others, so a table that repeats after
// 2^bits makes masks needless: what stands above a code in its word is another one.

// Two registers of pairs: (k0, k2) and (k1, k3) of a quad of 16 rows.
struct Pairs {
  V::I even, odd;
};

// The upper halves of floats, rounded to the nearest: exact but for the levels of nf4 and bnb_fp4.
inline uint16_t bfloat_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// kWords values: value(i).
template <int kWords>
struct WordValues {
  V::I words[kWords / 32];

  template <class Value>
  explicit WordValues(const Value& value) {
    uint16_t table[kWords];
    for (int i = 0; i < kWords; ++i) table[i] = bfloat_bits(value(i));
    for (int r = 0; r < kWords / 32; ++r)
      words[r] = V::iload(reinterpret_cast<const uint8_t*>(table + 32 * r));
  }
  LOWBIT_INLINE V::I at(V::I index) const {
    if constexpr (kWords == 32) {
      return V::word_lut32(index, words[0]);
    } else {
      return V::word_lut64(index, words[0], words[1]);
    }
  }
};

// What code q stands for: of a code book, or of an integer without zeros.
inline float code_value(const WeightView& w, int q) {
  const int code = q & ((1 << w.bits) - 1);
  return w.code != nullptr ? w.code[code] : static_cast<float>(code - (1 << (w.bits - 1)));
}

// What a codec has to know of a group of a strip.
struct NoState {
  NoState() = default;
  NoState(const WeightView&, const uint8_t*, int64_t) {}
  static constexpr bool fits() { return true; }
};

// Up to six bits.
template <int kCodeBits>
struct CodePairs {
  static constexpr int kBits = kCodeBits;
  using State = NoState;
  WordValues<kBits == 6 ? 64 : 32> values;

  explicit CodePairs(const WeightView& w) : values([&w](int q) { return code_value(w, q); }) {}

  template <int Q>
  LOWBIT_UNROLLED Pairs quad(const uint8_t* block, const State&) const {
    constexpr CodePieces kPieces = code_pieces(kBits, Q);
    constexpr int kShift = kPieces.piece[0].shift;
    const V::I first = V::iload(block + kPieces.piece[0].vector * 64);
    if constexpr (kPieces.piece[1].bits == 0) {
      return {values.at(V::shr16<kShift>(first)), values.at(V::shr16<8 + kShift>(first))};
    } else {
      const V::I codes = add_piece<Q, 2>(add_piece<Q, 1>(V::shr16<kShift>(first), block), block);
      return {values.at(codes), values.at(V::shr16<8>(codes))};
    }
  }

 private:
  // What stands above the piece comes with it.
  template <int Q, int kIndex>
  LOWBIT_UNROLLED static V::I add_piece(V::I codes, const uint8_t* block) {
    constexpr CodePiece kPiece = code_pieces(kBits, Q).piece[kIndex];
    if constexpr (kPiece.bits == 0) {
      return codes;
    } else {
      const V::I piece =
          V::shr16<kPiece.shift - kPiece.position>(V::iload(block + kPiece.vector * 64));
      return V::choose(V::iset1(((1 << kPiece.position) - 1) * 0x01010101), codes, piece);
    }
  }
};

// Four bits less integer zeros of at most 16: -16 .. 15, five bits in two's complement.
struct ZeroPairs {
  static constexpr int kBits = 4;
  struct State {
    V::I zeros;  // that of row n in every byte of lane n
    State() = default;
    State(const WeightView& w, const uint8_t* strip, int64_t g)
        : zeros(V::imul(V::iload_u8(strip + w.zeros_offset + g * 16), V::iset1(0x01010101))) {}
    bool fits() const { return V::bytes_at_most(zeros, 16); }
  };
  WordValues<32> values;

  explicit ZeroPairs(const WeightView&)
      : values([](int i) { return static_cast<float>(i < 16 ? i : i - 32); }) {}

  template <int Q>
  LOWBIT_UNROLLED Pairs quad(const uint8_t* block, const State& state) const {
    const V::I codes = V::isub8(Codes<4>::template quad<Q>(block), state.zeros);
    return {values.at(codes), values.at(V::shr16<8>(codes))};
  }
};

// Eight bits: tables of the halves' bytes, as in Fp8TableCodec, and one permutation for each register of pairs.
struct BytePairs {
  static constexpr int kBits = 8;
  using State = NoState;
  Fp8TableCodec bytes;

  explicit BytePairs(const WeightView& w) : bytes(w) {}

  template <int Q>
  LOWBIT_UNROLLED Pairs quad(const uint8_t* block, const State&) const {
    const V::I codes = V::iload(block + Q * 64);
    const V::I sign = V::band(codes, V::iset1(static_cast<int32_t>(0x80808080u)));
    const V::I low = V::lut128(codes, bytes.low), high = V::bor(V::lut128(codes, bytes.high), sign);
    return {V::pair_of_halves<0>(low, high), V::pair_of_halves<1>(low, high)};
  }
};

// Pairs that are decoded already: a block is what decode_bf16-inl.h makes of one.
struct DecodedPairs {
  using State = NoState;
  template <int Q>
  LOWBIT_UNROLLED Pairs quad(const uint8_t* block, const State&) const {
    return {V::iload(block + 2 * Q * 64), V::iload(block + (2 * Q + 1) * 64)};
  }
};
