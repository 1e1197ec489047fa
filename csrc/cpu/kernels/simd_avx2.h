// Sixteen lanes as two AVX2 registers (with FMA and F16C). See simd_portable.h for what each function means.
#pragma once

#include <immintrin.h>

#include <cstdint>

#define LOWBIT_UNROLLED __attribute__((always_inline))
#define LOWBIT_SMALL_DOT  // V has dot4_small

struct V {
  struct F {
    __m256 lo, hi;
  };
  struct I {
    __m256i lo, hi;
  };
  struct Lut {
    __m256 lo, hi;
  };
  static constexpr bool kFastLut =
      false;  // two permutes and a blend: no better than convert for integers
  static constexpr int kStreamRows = 4;  // 4 x 2 accumulators of 16 registers
  static constexpr int kPlaneSums = 6;   // 12 of 16 registers
  static constexpr int kSpareForCodes = 0;
  static constexpr int kPanelRows = 6;
  static constexpr int kPanelStrips = 1;  // 6 x 2 accumulators
  static constexpr int kDotRows = 8;
  static constexpr int kDotStrips = 1;

  static F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static F set1(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
  static F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static void store(float* p, F a) {
    _mm256_storeu_ps(p, a.lo);
    _mm256_storeu_ps(p + 8, a.hi);
  }
  static F add(F a, F b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
  static F sub(F a, F b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
  static F mul(F a, F b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
  static F fma(F a, F b, F c) {
    return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
  }
  static F fma1(F a, const float* x, F c) { return fma(a, set1(*x), c); }

  static I izero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static I iset1(int32_t a) { return {_mm256_set1_epi32(a), _mm256_set1_epi32(a)}; }
  static I iload(const uint8_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
  }
  static void istore(uint8_t* p, I a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.lo);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), a.hi);
  }
  static I iadd(I a, I b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
  static I isub(I a, I b) { return {_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)}; }
  static int32_t isum(I a) {
    const __m256i eight = _mm256_add_epi32(a.lo, a.hi);
    const __m128i four =
        _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    const __m128i two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 1)));
  }
  static I imul(I a, I b) {
    return {_mm256_mullo_epi32(a.lo, b.lo), _mm256_mullo_epi32(a.hi, b.hi)};
  }
  static I band(I a, I b) { return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)}; }
  static I bor(I a, I b) { return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)}; }
  template <int kBits>
  static I shr(I a) {
    return {_mm256_srli_epi32(a.lo, kBits), _mm256_srli_epi32(a.hi, kBits)};
  }
  template <int kBits>
  static I shr8(I a) {
    return band(shr<kBits>(a), iset1((0xff >> kBits) * 0x01010101));
  }
  template <int kBits>
  static I shl(I a) {
    return {_mm256_slli_epi32(a.lo, kBits), _mm256_slli_epi32(a.hi, kBits)};
  }
  static I shr_by(I a, int bits) {
    const __m128i count = _mm_cvtsi32_si128(bits);
    return {_mm256_srl_epi32(a.lo, count), _mm256_srl_epi32(a.hi, count)};
  }
  static I kept(I a) { return a; }
  static F near_reciprocal(F a) { return {_mm256_rcp_ps(a.lo), _mm256_rcp_ps(a.hi)}; }
  static F div(F a, F b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
  static F clamp(F a, F low, F high) {
    return {_mm256_min_ps(_mm256_max_ps(a.lo, low.lo), high.lo),
            _mm256_min_ps(_mm256_max_ps(a.hi, low.hi), high.hi)};
  }
  static I to_i(F a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
  static F to_f(I a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
  static F as_f(I a) { return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)}; }
  static I as_i(F a) { return {_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)}; }
  static void store_bytes(uint8_t* p, I a) {
    // The low byte of every lane to the front of its half, four from each.
    const __m256i low =
        _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 4, 8, 12,
                         -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m256i halves =
        _mm256_unpacklo_epi64(_mm256_shuffle_epi8(a.lo, low), _mm256_shuffle_epi8(a.hi, low));
    const __m256i order = _mm256_setr_epi32(0, 4, 2, 6, 0, 0, 0, 0);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(halves, order)));
  }
  static F select_lt(I a, I b, F if_less, F otherwise) {
    return {_mm256_blendv_ps(otherwise.lo, if_less.lo,
                             _mm256_castsi256_ps(_mm256_cmpgt_epi32(b.lo, a.lo))),
            _mm256_blendv_ps(otherwise.hi, if_less.hi,
                             _mm256_castsi256_ps(_mm256_cmpgt_epi32(b.hi, a.hi)))};
  }

  static I keep_equal(F a, F b, I value) {
    return band(value, {_mm256_castps_si256(_mm256_cmp_ps(a.lo, b.lo, _CMP_EQ_OQ)),
                        _mm256_castps_si256(_mm256_cmp_ps(a.hi, b.hi, _CMP_EQ_OQ))});
  }

  // Bit n: whether lane n differs, NaN from everything.
  static uint32_t unequal(F a, F b) {
    const int low = _mm256_movemask_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_NEQ_UQ));
    const int high = _mm256_movemask_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_NEQ_UQ));
    return static_cast<uint32_t>(low | high << 8);
  }

  static Lut make_lut(const float* table) {
    return {_mm256_loadu_ps(table), _mm256_loadu_ps(table + 8)};
  }
  static F lut16(I index, Lut table) { return {lut8x2(index.lo, table), lut8x2(index.hi, table)}; }

  static I iload_u8(const uint8_t* p) {
    return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))),
            _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8)))};
  }
  static F load_u8(const uint8_t* p) { return to_f(iload_u8(p)); }
  static F load_half(const uint8_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
            _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16)))};
  }
  static F load_bfloat(const uint8_t* p) {
    const I wide = {
        _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
        _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16)))};
    return as_f(shl<16>(wide));
  }
  static void store_half(uint8_t* p, F a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 16),
                     _mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }

  static I broadcast4(const int8_t* p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    return iset1(four);
  }
  static I dot4(I sums, I codes, I x) {
    return {dot4_half(sums.lo, codes.lo, x.lo), dot4_half(sums.hi, codes.hi, x.hi)};
  }
  // Codes of at most six bits: two products fit 16 bits.
  static I dot4_small(I sums, I codes, I x) {
    const __m256i ones = _mm256_set1_epi16(1);
    return {
        _mm256_add_epi32(sums.lo, _mm256_madd_epi16(_mm256_maddubs_epi16(codes.lo, x.lo), ones)),
        _mm256_add_epi32(sums.hi, _mm256_madd_epi16(_mm256_maddubs_epi16(codes.hi, x.hi), ones))};
  }

 private:
  static __m256 lut8x2(__m256i index, Lut table) {
    // Bit 3 of the index, moved to the sign, picks the upper half of the table.
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.lo, index),
                            _mm256_permutevar8x32_ps(table.hi, index),
                            _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
  }
  // Even and odd bytes as 16-bit pairs: u8 * s8 does not fit vpmaddubsw's saturating sums.
  static __m256i dot4_half(__m256i sums, __m256i codes, __m256i x) {
    const __m256i low = _mm256_set1_epi16(0xff);
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(codes, low),
                                           _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(codes, 8), _mm256_srai_epi16(x, 8));
    return _mm256_add_epi32(sums, _mm256_add_epi32(even, odd));
  }
};
