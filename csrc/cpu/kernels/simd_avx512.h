// Sixteen lanes as one AVX-512 register. See simd_portable.h for what each function means.
#pragma once

#include <immintrin.h>

#include <cstdint>

#define LOWBIT_UNROLLED __attribute__((always_inline))

#if defined(__AVX512VNNI__)
#define LOWBIT_FAST_DOT  // dot4 is one instruction
#else
#define LOWBIT_SMALL_DOT  // V has dot4_small
#endif
#define LOWBIT_FLOAT_LUT  // V has FloatLut and mirrored_lut
#if defined(__AVX512VBMI__)
#define LOWBIT_BYTE_LUT  // V has ByteLut, lut128, float_of_halves and float_of_run
#endif

struct V {
  using F = __m512;
  using I = __m512i;
  using Lut = __m512;
  // vpermps reads only the low four bits of an index, so that callers need not mask.
  static constexpr bool kFastLut = true;
  static constexpr int kStreamRows =
      8;  // as many pointers into x as there are general registers to spare
  static constexpr int kPlaneSums = 24;  // of 32 registers
  static constexpr int kSpareForCodes =
      8;  // with so many sums there is room for the vectors that hold codes
  static constexpr int kPanelRows = 8;
  static constexpr int kPanelStrips = 2;  // 8 x 2 accumulators of 32 registers
  static constexpr int kDotRows = 4;
  static constexpr int kDotStrips = 4;  // 4 x 4 sums of 32 registers

  static F zero() { return _mm512_setzero_ps(); }
  static F set1(float a) { return _mm512_set1_ps(a); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F a) { _mm512_storeu_ps(p, a); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F fma1(F a, const float* x, F c) { return fma(a, set1(*x), c); }

  static I izero() { return _mm512_setzero_si512(); }
  static I iset1(int32_t a) { return _mm512_set1_epi32(a); }
  static I iload(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static void istore(uint8_t* p, I a) { _mm512_storeu_si512(p, a); }
  static I iadd(I a, I b) { return _mm512_add_epi32(a, b); }
  static I isub(I a, I b) { return _mm512_sub_epi32(a, b); }
  static int32_t isum(I a) { return _mm512_reduce_add_epi32(a); }
  // a in a register: it is not loaded again wherever it is used.
  static I kept(I a) {
    __asm__("" : "+v"(a));
    return a;
  }
  static I imul(I a, I b) { return _mm512_mullo_epi32(a, b); }
  static I band(I a, I b) { return _mm512_and_si512(a, b); }
  static I bor(I a, I b) { return _mm512_or_si512(a, b); }
  template <int kBits>
  static I shr(I a) {
    return _mm512_srli_epi32(a, kBits);
  }
  template <int kBits>
  static I shr8(I a) {
    return band(shr<kBits>(a), iset1((0xff >> kBits) * 0x01010101));
  }
  template <int kBits>
  static I shl(I a) {
    return _mm512_slli_epi32(a, kBits);
  }
  static I shr_by(I a, int bits) { return _mm512_srl_epi32(a, _mm_cvtsi32_si128(bits)); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F near_reciprocal(F a) { return _mm512_rcp14_ps(a); }
  static F clamp(F a, F low, F high) { return _mm512_min_ps(_mm512_max_ps(a, low), high); }
  static I to_i(F a) { return _mm512_cvtps_epi32(a); }
  static F to_f(I a) { return _mm512_cvtepi32_ps(a); }
  static F as_f(I a) { return _mm512_castsi512_ps(a); }
  static I as_i(F a) { return _mm512_castps_si512(a); }
  static void store_bytes(uint8_t* p, I a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a));
  }
  static F select_lt(I a, I b, F if_less, F otherwise) {
    return _mm512_mask_blend_ps(_mm512_cmplt_epi32_mask(a, b), otherwise, if_less);
  }

  static I keep_equal(F a, F b, I value) {
    return _mm512_maskz_mov_epi32(_mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ), value);
  }

  // Bit n: whether lane n differs, NaN from everything.
  static uint32_t unequal(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_NEQ_UQ); }

  static Lut make_lut(const float* table) { return _mm512_loadu_ps(table); }
  static F lut16(I index, Lut table) { return _mm512_permutexvar_ps(index, table); }

  // Tables of 128 floats, indexed by the low seven bits of every lane.
  struct FloatLut {
    __m512 part[8];
  };
  static FloatLut make_float_lut(const float* table) {
    FloatLut lut;
    for (int i = 0; i < 8; ++i) lut.part[i] = load(table + 16 * i);
    return lut;
  }
  static F float_lut128(I index, const FloatLut& table) {
    const auto from32 = [&](int i) {
      return _mm512_permutex2var_ps(table.part[2 * i], index, table.part[2 * i + 1]);
    };
    const __mmask16 odd = _mm512_test_epi32_mask(index, iset1(32));
    const F low = _mm512_mask_blend_ps(odd, from32(0), from32(1));
    const F high = _mm512_mask_blend_ps(odd, from32(2), from32(3));
    return _mm512_mask_blend_ps(_mm512_test_epi32_mask(index, iset1(64)), low, high);
  }
  // Of a table that is its own mirror image: 0 at `from` 0, table[from - 1] above, -table[-from - 1] below.
  static F mirrored_lut(I from, const FloatLut& table) {
    const F value = float_lut128(isub(_mm512_abs_epi32(from), iset1(1)), table);
    const I sign = band(from, iset1(INT32_MIN));
    return _mm512_maskz_mov_ps(_mm512_test_epi32_mask(from, from), as_f(bor(as_i(value), sign)));
  }

#if defined(__AVX512VBMI__)
  // Tables of 128 bytes, indexed by the low seven bits of every byte.
  struct ByteLut {
    __m512i low, high;
  };
  static ByteLut make_byte_lut(const uint8_t* table) { return {iload(table), iload(table + 64)}; }
  static I lut128(I index, ByteLut table) {
    return _mm512_permutex2var_epi8(table.low, index, table.high);
  }
  // Lane n as the float whose upper half is (high << 8 | low) of byte 4 * n + kByte.
  template <int kByte>
  static F float_of_halves(I low, I high) {
    const I pattern = _mm512_add_epi32(
        _mm512_set1_epi32(kByte << 16 | (64 + kByte) << 24),
        _mm512_mullo_epi32(_mm512_set1_epi32(0x04040000),
                           _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0)));
    return as_f(_mm512_maskz_permutex2var_epi8(0xccccccccccccccccull, low, pattern, high));
  }
  // Lane n as the float whose upper half is (high << 8 | low) of byte 16 * kRun + n.
  template <int kRun>
  static F float_of_run(I low, I high) {
    const I pattern = _mm512_add_epi32(
        _mm512_set1_epi32((16 * kRun) << 16 | (64 + 16 * kRun) << 24),
        _mm512_mullo_epi32(_mm512_set1_epi32(0x01010000),
                           _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0)));
    return as_f(_mm512_maskz_permutex2var_epi8(0xccccccccccccccccull, low, pattern, high));
  }
  // Words of (high << 8 | low) of bytes 4 * n + kByte and 4 * n + kByte + 2: two for lane n.
  template <int kByte>
  static I pair_of_halves(I low, I high) {
    const I lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const I pattern = _mm512_add_epi32(_mm512_mullo_epi32(_mm512_set1_epi32(0x04040404), lane),
                                       _mm512_set1_epi32(0x42024000 + 0x01010101 * kByte));
    return _mm512_permutex2var_epi8(low, pattern, high);
  }
  // Tables of 32 words, indexed by the low five bits of every word.
  static I word_lut32(I index, I table) { return _mm512_permutexvar_epi16(index, table); }
  static I word_lut64(I index, I low, I high) {
    return _mm512_permutex2var_epi16(low, index, high);
  }
  template <int kBits>
  static I shr16(I a) {  // every word by itself
    return kBits == 0 ? a : _mm512_srli_epi16(a, kBits);
  }
#endif

  static F load_u8(const uint8_t* p) { return _mm512_cvtepi32_ps(iload_u8(p)); }
  static I iload_u8(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static F load_half(const uint8_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static F load_bfloat(const uint8_t* p) {
    return as_f(_mm512_slli_epi32(
        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
  }
  static void store_half(uint8_t* p, F a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }

  static I broadcast4(const int8_t* p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
  }
  static I dot4(I sums, I codes, I x) {
#if defined(__AVX512VNNI__)
    return _mm512_dpbusd_epi32(sums, codes, x);
#else
    // Even and odd bytes as 16-bit pairs: u8 * s8 does not fit vpmaddubsw's saturating sums.
    const __m512i low = _mm512_set1_epi16(0xff);
    const __m512i even = _mm512_madd_epi16(_mm512_and_si512(codes, low),
                                           _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8));
    const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(codes, 8), _mm512_srai_epi16(x, 8));
    return _mm512_add_epi32(sums, _mm512_add_epi32(even, odd));
#endif
  }

#if !defined(__AVX512VNNI__)
  // Codes of at most six bits: two products fit 16 bits.
  static I dot4_small(I sums, I codes, I x) {
    return _mm512_add_epi32(
        sums, _mm512_madd_epi16(_mm512_maddubs_epi16(codes, x), _mm512_set1_epi16(1)));
  }
#endif

  // Bits of a where the mask has them, else of b.
  static I choose(I mask, I a, I b) { return _mm512_ternarylogic_epi32(mask, a, b, 0xca); }
  static bool bytes_at_most(I a, int most) {
    return _mm512_cmpgt_epu8_mask(a, _mm512_set1_epi8(static_cast<char>(most))) == 0;
  }
  static I isub8(I a, I b) { return _mm512_sub_epi8(a, b); }
#if defined(__AVX512BF16__)
  static I broadcast_pair(const uint16_t* p) {
    int32_t pair;
    __builtin_memcpy(&pair, p, 4);
    return _mm512_set1_epi32(pair);
  }
  static F dot2(F sums, I a, I b) { return _mm512_dpbf16_ps(sums, (__m512bh)a, (__m512bh)b); }
#endif
};
