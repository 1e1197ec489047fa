// Sixteen lanes as four NEON registers of AArch64. See simd_portable.h for what each function means.
//
// Compiled with dot products (FEAT_DotProd) or 8-bit matrix products (FEAT_I8MM), V's integer part uses them.
#pragma once

#include <arm_neon.h>

#include <cstdint>

#define LOWBIT_UNROLLED __attribute__((always_inline))
// Helpers that a compiler may find too large to inline; between them values would go through memory.
#define LOWBIT_INLINE __attribute__((always_inline))
#define LOWBIT_QUAD_DECODE  // V has look_up, code_float and fp8_float
#if defined(__ARM_FEATURE_MATMUL_INT8)
#define LOWBIT_DOT_PAIRS  // V has dot8_pair and split_pair
#define LOWBIT_FAST_DOT   // dot4 is one instruction
#else
#define LOWBIT_SIGNED_DOT  // V has signed_codes and dot4_signed: there is no product of u8 and s8
#if defined(__ARM_FEATURE_DOTPROD)
#define LOWBIT_SMALL_DOT  // V has dot4_small
#endif
#endif

struct V {
  struct F {
    float32x4_t q[4];
  };
  struct I {
    int32x4_t q[4];
  };
  struct Lut {
    uint8x16_t byte[4];  // byte b of every entry
    uint8x16_t doubled;  // twice the entry as a signed byte, where it is a small multiple of 1/2
  };
  // Converting takes as many instructions, and fewer registers.
  static constexpr bool kFastLut = false;
  // 32 registers: 4 x 4 accumulators leave room for zeros, tables and a quad on its way from codes to floats.
  static constexpr int kStreamRows = 4;
  // 6 x 4 accumulators, 4 of weights, one for x.
  static constexpr int kPanelRows = 6;
  static constexpr int kPanelStrips = 1;
  static constexpr int kDotRows = 4;
  static constexpr int kDotStrips = 1;
  static constexpr int kPlaneSums = 4;  // 16 registers; codes of two strips take 8
  static constexpr int kSpareForCodes = 0;

  LOWBIT_INLINE static F zero() { return set1(0.0f); }
  LOWBIT_INLINE static F set1(float a) {
    const float32x4_t v = vdupq_n_f32(a);
    return {{v, v, v, v}};
  }
  LOWBIT_INLINE static F load(const float* p) {
    return {{vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}};
  }
  LOWBIT_INLINE static void store(float* p, F a) {
    vst1q_f32(p, a.q[0]);
    vst1q_f32(p + 4, a.q[1]);
    vst1q_f32(p + 8, a.q[2]);
    vst1q_f32(p + 12, a.q[3]);
  }
  LOWBIT_INLINE static F add(F a, F b) {
    return each<F>(a, b, [](auto x, auto y) LOWBIT_INLINE { return vaddq_f32(x, y); });
  }
  LOWBIT_INLINE static F sub(F a, F b) {
    return each<F>(a, b, [](auto x, auto y) LOWBIT_INLINE { return vsubq_f32(x, y); });
  }
  LOWBIT_INLINE static F mul(F a, F b) {
    return each<F>(a, b, [](auto x, auto y) LOWBIT_INLINE { return vmulq_f32(x, y); });
  }
  LOWBIT_INLINE static I kept(I a) { return a; }
  LOWBIT_INLINE static F near_reciprocal(F a) {
    return div(set1(1.0f), a);
  }  // estimates have eight bits
  LOWBIT_INLINE static F div(F a, F b) {
    return each<F>(a, b, [](auto x, auto y) LOWBIT_INLINE { return vdivq_f32(x, y); });
  }
  LOWBIT_INLINE static F fma(F a, F b, F c) {
    return {{vfmaq_f32(c.q[0], a.q[0], b.q[0]), vfmaq_f32(c.q[1], a.q[1], b.q[1]),
             vfmaq_f32(c.q[2], a.q[2], b.q[2]), vfmaq_f32(c.q[3], a.q[3], b.q[3])}};
  }
  // By element: a register of its own for x, and a vdupq for it, are saved.
  LOWBIT_INLINE static F fma1(F a, const float* x, F c) {
    const float32x2_t v = {*x, 0.0f};
    return {{vfmaq_lane_f32(c.q[0], a.q[0], v, 0), vfmaq_lane_f32(c.q[1], a.q[1], v, 0),
             vfmaq_lane_f32(c.q[2], a.q[2], v, 0), vfmaq_lane_f32(c.q[3], a.q[3], v, 0)}};
  }

  LOWBIT_INLINE static I izero() { return iset1(0); }
  LOWBIT_INLINE static I iset1(int32_t a) {
    const int32x4_t v = vdupq_n_s32(a);
    return {{v, v, v, v}};
  }
  LOWBIT_INLINE static I iload(const uint8_t* p) {
    return {{vreinterpretq_s32_u8(vld1q_u8(p)), vreinterpretq_s32_u8(vld1q_u8(p + 16)),
             vreinterpretq_s32_u8(vld1q_u8(p + 32)), vreinterpretq_s32_u8(vld1q_u8(p + 48))}};
  }
  LOWBIT_INLINE static void istore(uint8_t* p, I a) {
    vst1q_u8(p, u8(a.q[0]));
    vst1q_u8(p + 16, u8(a.q[1]));
    vst1q_u8(p + 32, u8(a.q[2]));
    vst1q_u8(p + 48, u8(a.q[3]));
  }
  LOWBIT_INLINE static I iadd(I a, I b) {
    return each<I>(a, b, [](auto x, auto y) LOWBIT_INLINE { return vaddq_s32(x, y); });
  }
  LOWBIT_INLINE static I isub(I a, I b) {
    return each<I>(a, b, [](auto x, auto y) LOWBIT_INLINE { return vsubq_s32(x, y); });
  }
  LOWBIT_INLINE static int32_t isum(I a) {
    return vaddvq_s32(vaddq_s32(vaddq_s32(a.q[0], a.q[1]), vaddq_s32(a.q[2], a.q[3])));
  }
  LOWBIT_INLINE static I imul(I a, I b) {
    return each<I>(a, b, [](auto x, auto y) LOWBIT_INLINE { return vmulq_s32(x, y); });
  }
  LOWBIT_INLINE static I band(I a, I b) {
    return each<I>(a, b, [](auto x, auto y) LOWBIT_INLINE { return vandq_s32(x, y); });
  }
  LOWBIT_INLINE static I bor(I a, I b) {
    return each<I>(a, b, [](auto x, auto y) LOWBIT_INLINE { return vorrq_s32(x, y); });
  }
  template <int kBits>
  LOWBIT_INLINE static I shr(I a) {
    if constexpr (kBits == 0) return a;
    return each<I>(a, [](auto x) LOWBIT_INLINE {
      return vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(x), kBits == 0 ? 1 : kBits));
    });
  }
  LOWBIT_INLINE static I shr_by(I a, int bits) {
    const int32x4_t left = vdupq_n_s32(-bits);
    return each<I>(a, [left](auto x) LOWBIT_INLINE {
      return vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(x), left));
    });
  }
  template <int kBits>
  LOWBIT_INLINE static I shr8(I a) {
    return bytes(a, [](auto x) LOWBIT_INLINE { return vshrq_n_u8(x, kBits); });
  }
  template <int kBits>
  LOWBIT_INLINE static I shl(I a) {
    return each<I>(a, [](auto x) LOWBIT_INLINE { return vshlq_n_s32(x, kBits); });
  }
  LOWBIT_INLINE static F clamp(F a, F low,
                               F high) {  // a NaN becomes `low`, which vmaxq would not do
    const F up = each<F>(
        a, low, [](auto x, auto y) LOWBIT_INLINE { return vbslq_f32(vcgtq_f32(x, y), x, y); });
    return each<F>(up, high,
                   [](auto x, auto y) LOWBIT_INLINE { return vbslq_f32(vcltq_f32(x, y), x, y); });
  }
  LOWBIT_INLINE static I to_i(F a) {
    return {{vcvtnq_s32_f32(a.q[0]), vcvtnq_s32_f32(a.q[1]), vcvtnq_s32_f32(a.q[2]),
             vcvtnq_s32_f32(a.q[3])}};
  }
  LOWBIT_INLINE static F to_f(I a) {
    return {{vcvtq_f32_s32(a.q[0]), vcvtq_f32_s32(a.q[1]), vcvtq_f32_s32(a.q[2]),
             vcvtq_f32_s32(a.q[3])}};
  }

  LOWBIT_INLINE static F as_f(I a) {
    return {{vreinterpretq_f32_s32(a.q[0]), vreinterpretq_f32_s32(a.q[1]),
             vreinterpretq_f32_s32(a.q[2]), vreinterpretq_f32_s32(a.q[3])}};
  }
  LOWBIT_INLINE static I as_i(F a) {
    return {{vreinterpretq_s32_f32(a.q[0]), vreinterpretq_s32_f32(a.q[1]),
             vreinterpretq_s32_f32(a.q[2]), vreinterpretq_s32_f32(a.q[3])}};
  }
  LOWBIT_INLINE static F select_lt(I a, I b, F if_less, F otherwise) {
    F r;
    for (int i = 0; i < 4; ++i)
      r.q[i] = vbslq_f32(vcltq_s32(a.q[i], b.q[i]), if_less.q[i], otherwise.q[i]);
    return r;
  }
  LOWBIT_INLINE static void store_bytes(uint8_t* p, I a) {  // the low byte of every lane
    const uint8x16_t low = vuzp1q_u8(u8(a.q[0]), u8(a.q[1]));
    const uint8x16_t high = vuzp1q_u8(u8(a.q[2]), u8(a.q[3]));
    vst1q_u8(p, vuzp1q_u8(low, high));
  }

  LOWBIT_INLINE static I keep_equal(F a, F b, I value) {
    I r;
    for (int i = 0; i < 4; ++i)
      r.q[i] = vandq_s32(vreinterpretq_s32_u32(vceqq_f32(a.q[i], b.q[i])), value.q[i]);
    return r;
  }

  // Bit n: whether lane n differs, NaN from everything.
  LOWBIT_INLINE static uint32_t unequal(F a, F b) {
    const uint16x4_t bit = {1, 2, 4, 8};
    uint32_t bits = 0;
    for (int i = 0; i < 4; ++i) {
      const uint16x4_t differs = vmvn_u16(vmovn_u32(vceqq_f32(a.q[i], b.q[i])));
      bits |= static_cast<uint32_t>(vaddv_u16(vand_u16(differs, bit))) << 4 * i;
    }
    return bits;
  }

  // ---- a quad of clean codes to floats: element J of every lane -------------------------------------------------

  LOWBIT_INLINE static Lut make_lut(const float* table) {
    const uint8x16x4_t planes = vld4q_u8(reinterpret_cast<const uint8_t*>(table));
    int8_t doubled[16];
    for (int i = 0; i < 16; ++i) doubled[i] = static_cast<int8_t>(2.0f * table[i]);
    return {{planes.val[0], planes.val[1], planes.val[2], planes.val[3]},
            vreinterpretq_u8_s8(vld1q_s8(doubled))};
  }
  // Codes below 16. kHalves: every entry is a multiple of 1/2 and at most 63. Otherwise the look-ups serve all four J, and
  // only the last step differs.
  template <int J, bool kHalves>
  LOWBIT_INLINE static F look_up(I codes, const Lut& table) {
    return quads(codes, [&table](uint8x16_t c) LOWBIT_INLINE {
      if constexpr (kHalves)
        return vcvtq_n_f32_s32(vreinterpretq_s32_u8(to_top<J>(vqtbl1q_u8(table.doubled, c))), 25);
      const uint16x8_t low =
          pair_bytes<J>(vqtbl1q_u8(table.byte[0], c), vqtbl1q_u8(table.byte[1], c));
      const uint16x8_t high =
          pair_bytes<J>(vqtbl1q_u8(table.byte[2], c), vqtbl1q_u8(table.byte[3], c));
      return float_of<J>(low, high);
    });
  }
  // code - kMiddle: the byte goes to the top of its lane, and the conversion divides by 2^24.
  template <int J, int kMiddle>
  LOWBIT_INLINE static F code_float(I codes) {
    return quads(codes, [](uint8x16_t c) LOWBIT_INLINE {
      if constexpr (kMiddle == 0) return vcvtq_n_f32_u32(vreinterpretq_u32_u8(to_top<J>(c)), 24);
      const uint8x16_t less = vsubq_u8(c, vdupq_n_u8(kMiddle));  // a signed byte
      return vcvtq_n_f32_s32(vreinterpretq_s32_u8(to_top<J>(less)), 24);
    });
  }
  template <int J, bool kE4m3>
  LOWBIT_INLINE static F fp8_float(I codes) {
    if constexpr (kE4m3) {
      return quads(codes, [](uint8x16_t c) LOWBIT_INLINE { return e4m3_float<J>(c); });
    } else {
      return e5m2_float<J>(codes);
    }
  }

  // ---- rows of other types ------------------------------------------------------------------------------------------

  LOWBIT_INLINE static I iload_u8(const uint8_t* p) {
    const uint8x16_t bytes = vld1q_u8(p);
    const uint16x8_t low = vmovl_u8(vget_low_u8(bytes)), high = vmovl_high_u8(bytes);
    return {{vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(low))),
             vreinterpretq_s32_u32(vmovl_high_u16(low)),
             vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(high))),
             vreinterpretq_s32_u32(vmovl_high_u16(high))}};
  }
  LOWBIT_INLINE static F load_u8(const uint8_t* p) { return to_f(iload_u8(p)); }
  LOWBIT_INLINE static F load_half(const uint8_t* p) {
    return halves_to_floats(vreinterpretq_u16_u8(vld1q_u8(p)),
                            vreinterpretq_u16_u8(vld1q_u8(p + 16)));
  }
  LOWBIT_INLINE static F load_bfloat(const uint8_t* p) {
    const uint16x8_t low = vreinterpretq_u16_u8(vld1q_u8(p));
    const uint16x8_t high = vreinterpretq_u16_u8(vld1q_u8(p + 16));
    return {{vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(low), 16)),
             vreinterpretq_f32_u32(vshll_high_n_u16(low, 16)),
             vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(high), 16)),
             vreinterpretq_f32_u32(vshll_high_n_u16(high, 16))}};
  }
  LOWBIT_INLINE static void store_half(uint8_t* p, F a) {
    const float16x8_t low = vcvt_high_f16_f32(vcvt_f16_f32(a.q[0]), a.q[1]);
    const float16x8_t high = vcvt_high_f16_f32(vcvt_f16_f32(a.q[2]), a.q[3]);
    vst1q_u8(p, vreinterpretq_u8_f16(low));
    vst1q_u8(p + 16, vreinterpretq_u8_f16(high));
  }

  // ---- integer products ---------------------------------------------------------------------------------------------

  LOWBIT_INLINE static I broadcast4(const int8_t* p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    return iset1(four);
  }

#if defined(__ARM_FEATURE_MATMUL_INT8)
  LOWBIT_INLINE static I dot4(I sums, I codes, I x) {
    I r;
    for (int i = 0; i < 4; ++i)
      r.q[i] = vusdotq_s32(sums.q[i], u8(codes.q[i]), vreinterpretq_s8_s32(x.q[i]));
    return r;
  }
  template <int Q>
  LOWBIT_INLINE static I dot4_at(I sums, I codes, const int8_t* p) {
    const int8x16_t x = vld1q_s8(p + Q / 4 * 16);
    return {{vusdotq_laneq_s32(sums.q[0], u8(codes.q[0]), x, Q % 4),
             vusdotq_laneq_s32(sums.q[1], u8(codes.q[1]), x, Q % 4),
             vusdotq_laneq_s32(sums.q[2], u8(codes.q[2]), x, Q % 4),
             vusdotq_laneq_s32(sums.q[3], u8(codes.q[3]), x, Q % 4)}};
  }
  // Eight k and two rows of x at once. Until split_pair, a register of `a` and one of `b` hold the 2 x 2 results of rows
  // of the strip and of x: (n0 x0, n0 x1, n1 x0, n1 x1) in a, those of n2 and n3 in b.
  LOWBIT_INLINE static void dot8_pair(I& a, I& b, I low, I high, const int8_t* x0,
                                      const int8_t* x1) {
    const int8x16_t x = vcombine_s8(vld1_s8(x0), vld1_s8(x1));
    for (int i = 0; i < 4; ++i) {
      a.q[i] = vusmmlaq_s32(a.q[i], u8(vzip1q_s32(low.q[i], high.q[i])), x);
      b.q[i] = vusmmlaq_s32(b.q[i], u8(vzip2q_s32(low.q[i], high.q[i])), x);
    }
  }
  LOWBIT_INLINE static void split_pair(I& a, I& b) {
    for (int i = 0; i < 4; ++i) {
      const int32x4_t first = vuzp1q_s32(a.q[i], b.q[i]);
      b.q[i] = vuzp2q_s32(a.q[i], b.q[i]);
      a.q[i] = first;
    }
  }
#else
  // Codes of eight bits less 128; narrower ones are signed bytes as they are.
  template <int kBits>
  LOWBIT_INLINE static I signed_codes(I codes) {
    if constexpr (kBits < 8) return codes;
    return bytes(codes, [](auto x) LOWBIT_INLINE { return veorq_u8(x, vdupq_n_u8(0x80)); });
  }
  LOWBIT_INLINE static I dot4(I sums, I codes, I x) {
    // q * x = (q - 128) * x + 64 * x + 64 * x
    const I half = iset1(0x40404040);
    return dot4_signed<8>(dot4_signed<7>(dot4_signed<7>(sums, half, x), half, x),
                          signed_codes<8>(codes), x);
  }
  template <int kBits>  // of the codes: two products of fewer than eight bits fit 16 bits together
  LOWBIT_INLINE static I dot4_signed(I sums, I codes, I x) {
    I r;
    for (int i = 0; i < 4; ++i) r.q[i] = dot_register<kBits>(sums.q[i], s8(codes.q[i]), s8(x.q[i]));
    return r;
  }
#if defined(__ARM_FEATURE_DOTPROD)
  LOWBIT_INLINE static I dot4_small(I sums, I codes, I x) { return dot4_signed<6>(sums, codes, x); }
  template <int Q, int kBits>
  LOWBIT_INLINE static I dot4_signed_at(I sums, I codes, const int8_t* p) {
    const int8x16_t x = vld1q_s8(p + Q / 4 * 16);
    return {{vdotq_laneq_s32(sums.q[0], s8(codes.q[0]), x, Q % 4),
             vdotq_laneq_s32(sums.q[1], s8(codes.q[1]), x, Q % 4),
             vdotq_laneq_s32(sums.q[2], s8(codes.q[2]), x, Q % 4),
             vdotq_laneq_s32(sums.q[3], s8(codes.q[3]), x, Q % 4)}};
  }
#else
  template <int Q, int kBits>
  LOWBIT_INLINE static I dot4_signed_at(I sums, I codes, const int8_t* p) {
    return dot4_signed<kBits>(sums, codes, broadcast4(p + 4 * Q));
  }
#endif
#endif

 private:
  LOWBIT_INLINE static uint8x16_t u8(int32x4_t a) { return vreinterpretq_u8_s32(a); }
  LOWBIT_INLINE static int8x16_t s8(int32x4_t a) { return vreinterpretq_s8_s32(a); }

  template <class T, class Op>
  LOWBIT_INLINE static T each(T a, const Op& op) {
    return {{op(a.q[0]), op(a.q[1]), op(a.q[2]), op(a.q[3])}};
  }
  template <class T, class Op>
  LOWBIT_INLINE static T each(T a, T b, const Op& op) {
    return {{op(a.q[0], b.q[0]), op(a.q[1], b.q[1]), op(a.q[2], b.q[2]), op(a.q[3], b.q[3])}};
  }
  template <class Op>
  LOWBIT_INLINE static I bytes(I a, const Op& op) {
    return each<I>(a, [&op](int32x4_t x) LOWBIT_INLINE { return vreinterpretq_s32_u8(op(u8(x))); });
  }
  template <class Op>
  LOWBIT_INLINE static F quads(I codes, const Op& op) {
    return {{op(u8(codes.q[0])), op(u8(codes.q[1])), op(u8(codes.q[2])), op(u8(codes.q[3]))}};
  }

  // Byte J of every lane as its top byte, zeros below it.
  template <int J>
  LOWBIT_INLINE static uint8x16_t to_top(uint8x16_t bytes) {
    constexpr uint8_t kNone = 0xff;  // vqtbl1q gives 0 for it
    const uint8x16_t index = {kNone, kNone, kNone, J,     kNone, kNone, kNone, 4 + J,
                              kNone, kNone, kNone, 8 + J, kNone, kNone, kNone, 12 + J};
    return vqtbl1q_u8(bytes, index);
  }
  // Bytes of two planes side by side: J and J + 2 of every lane for J = 0, 1.
  template <int J>
  LOWBIT_INLINE static uint16x8_t pair_bytes(uint8x16_t low, uint8x16_t high) {
    return vreinterpretq_u16_u8(J % 2 == 0 ? vtrn1q_u8(low, high) : vtrn2q_u8(low, high));
  }
  // The float of halves that pair_bytes left side by side.
  template <int J>
  LOWBIT_INLINE static float32x4_t float_of(uint16x8_t low, uint16x8_t high) {
    return vreinterpretq_f32_u16(J < 2 ? vtrn1q_u16(low, high) : vtrn2q_u16(low, high));
  }

  // Every value of E4M3 is exact in bf16, the upper half of a float: (magnitude << 4) + (120 << 7), with a table
  // for what is subnormal, and all ones for the NaN.
  template <int J>
  LOWBIT_INLINE static float32x4_t e4m3_float(uint8x16_t codes) {
    const uint8x16_t small_low = {0x00, 0x00, 0x80, 0xc0, 0x00, 0x20, 0x40, 0x60,
                                  0x80, 0x90, 0xa0, 0xb0, 0xc0, 0xd0, 0xe0, 0xf0};
    const uint8x16_t small_high = {0x00, 0x3b, 0x3b, 0x3b, 0x3c, 0x3c, 0x3c, 0x3c,
                                   0x3c, 0x3c, 0x3c, 0x3c, 0x3c, 0x3c, 0x3c, 0x3c};
    const uint8x16_t sign = vandq_u8(codes, vdupq_n_u8(0x80));
    const uint8x16_t magnitude = veorq_u8(codes, sign);
    // vqtbx1q keeps what it is given where the index is 16 or more.
    const uint8x16_t low = vqtbx1q_u8(vshlq_n_u8(magnitude, 4), small_low, magnitude);
    uint8x16_t high = vqtbx1q_u8(vsraq_n_u8(vdupq_n_u8(0x3c), magnitude, 4), small_high, magnitude);
    high = vorrq_u8(high, vceqq_u8(magnitude, vdupq_n_u8(0x7f)));
    high = vorrq_u8(high, sign);
    return float_of<J>(vdupq_n_u16(0), pair_bytes<J>(low, high));
  }

  // E5M2 is the upper byte of an fp16, subnormals, infinities and NaNs included.
  template <int J>
  LOWBIT_INLINE static F e5m2_float(I codes) {
    uint16x8_t halves[4];
    for (int i = 0; i < 4; ++i) {  // elements J % 2 and J % 2 + 2 of every lane
      const uint16x8_t c = vreinterpretq_u16_s32(codes.q[i]);
      halves[i] = J % 2 == 0 ? vshlq_n_u16(c, 8) : vandq_u16(c, vdupq_n_u16(0xff00));
    }
    if constexpr (J < 2)
      return halves_to_floats(vuzp1q_u16(halves[0], halves[1]), vuzp1q_u16(halves[2], halves[3]));
    return halves_to_floats(vuzp2q_u16(halves[0], halves[1]), vuzp2q_u16(halves[2], halves[3]));
  }
  LOWBIT_INLINE static F halves_to_floats(uint16x8_t low, uint16x8_t high) {
    const float16x8_t a = vreinterpretq_f16_u16(low), b = vreinterpretq_f16_u16(high);
    return {{vcvt_f32_f16(vget_low_f16(a)), vcvt_high_f32_f16(a), vcvt_f32_f16(vget_low_f16(b)),
             vcvt_high_f32_f16(b)}};
  }

#if !defined(__ARM_FEATURE_MATMUL_INT8)
  template <int kBits>
  LOWBIT_INLINE static int32x4_t dot_register(int32x4_t sums, int8x16_t codes, int8x16_t x) {
#if defined(__ARM_FEATURE_DOTPROD)
    return vdotq_s32(sums, codes, x);
#else
    const int16x8_t low = vmull_s8(vget_low_s8(codes), vget_low_s8(x));
    const int16x8_t high = vmull_high_s8(codes, x);
    if constexpr (kBits < 8) return vpadalq_s16(sums, vpaddq_s16(low, high));
    // -128 * -128 twice does not fit.
    return vaddq_s32(sums, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
#endif
  }
#endif
};
