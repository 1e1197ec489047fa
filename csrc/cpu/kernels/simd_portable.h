// Sixteen lanes as four 128-bit vectors of the compilers' vector extension: SSE2, NEON, or whatever the target has.
//
// This is the contract of every simd_*.h: a struct V with F (16 floats), I (16 int32 lanes, each also seen as four
// bytes), Lut (a 16-entry float table) and the functions below. Kernels (-inl.h) are written against it once and
// compiled once per ISA; each of those files includes only <cstdint> and intrinsics, so that no function compiled
// for a newer ISA can be merged by the linker into code that runs on an older one.
#pragma once

#include <cstdint>

// Decoding is unrolled by force where registers are wide; here that would only make code.
#define LOWBIT_UNROLLED __attribute__((noinline))
#define LOWBIT_NO_STREAM

struct V {
  typedef float F4 __attribute__((vector_size(16)));
  typedef int32_t I4 __attribute__((vector_size(16)));
  typedef uint32_t U4 __attribute__((vector_size(16)));
  struct F {
    F4 q[4];
  };
  struct I {
    I4 q[4];
  };
  struct Lut {
    const float* table;
  };
  static constexpr int kPlaneSums = 8;
  static constexpr bool kFastLut = false;
  static constexpr int kStreamRows = 0;  // no stream kernel: its code would outgrow its gain
  static constexpr int kPanelRows = 2;
  static constexpr int kPanelStrips = 1;
  static constexpr int kDotRows =
      4;  // the least: a tile of eight would be half of the portable code
  static constexpr int kDotStrips = 1;

  static F zero() { return F{}; }
  static F set1(float a) {
    const F4 v = {a, a, a, a};
    return {{v, v, v, v}};
  }
  static F load(const float* p) {
    F r{};
    __builtin_memcpy(&r, p, 64);
    return r;
  }
  static void store(float* p, F a) { __builtin_memcpy(p, &a, 64); }
  static F add(F a, F b) {
    return {{a.q[0] + b.q[0], a.q[1] + b.q[1], a.q[2] + b.q[2], a.q[3] + b.q[3]}};
  }
  static F sub(F a, F b) {
    return {{a.q[0] - b.q[0], a.q[1] - b.q[1], a.q[2] - b.q[2], a.q[3] - b.q[3]}};
  }
  static F mul(F a, F b) {
    return {{a.q[0] * b.q[0], a.q[1] * b.q[1], a.q[2] * b.q[2], a.q[3] * b.q[3]}};
  }
  static F fma(F a, F b, F c) {
    return add(mul(a, b), c);
  }  // two roundings where the ISA has no fused one
  static F fma1(F a, const float* x, F c) { return fma(a, set1(*x), c); }

  static I izero() { return I{}; }
  static I iset1(int32_t a) {
    const I4 v = {a, a, a, a};
    return {{v, v, v, v}};
  }
  static I iload(const uint8_t* p) {  // 64 bytes
    I r{};
    __builtin_memcpy(&r, p, 64);
    return r;
  }
  static I iadd(I a, I b) {
    return {{a.q[0] + b.q[0], a.q[1] + b.q[1], a.q[2] + b.q[2], a.q[3] + b.q[3]}};
  }
  static I isub(I a, I b) {
    return {{a.q[0] - b.q[0], a.q[1] - b.q[1], a.q[2] - b.q[2], a.q[3] - b.q[3]}};
  }
  static I imul(I a, I b) {
    return {{a.q[0] * b.q[0], a.q[1] * b.q[1], a.q[2] * b.q[2], a.q[3] * b.q[3]}};
  }
  static I band(I a, I b) {
    return {{a.q[0] & b.q[0], a.q[1] & b.q[1], a.q[2] & b.q[2], a.q[3] & b.q[3]}};
  }
  static I bor(I a, I b) {
    return {{a.q[0] | b.q[0], a.q[1] | b.q[1], a.q[2] | b.q[2], a.q[3] | b.q[3]}};
  }
  template <int kBits>
  static I shr(I a) {  // logical
    return {{(I4)((U4)a.q[0] >> kBits), (I4)((U4)a.q[1] >> kBits), (I4)((U4)a.q[2] >> kBits),
             (I4)((U4)a.q[3] >> kBits)}};
  }
  template <int kBits>
  static I shr8(I a) {  // every byte by itself
    return band(shr<kBits>(a), iset1((0xff >> kBits) * 0x01010101));
  }
  template <int kBits>
  static I shl(I a) {
    return {{(I4)((U4)a.q[0] << kBits), (I4)((U4)a.q[1] << kBits), (I4)((U4)a.q[2] << kBits),
             (I4)((U4)a.q[3] << kBits)}};
  }
  static I shr_by(I a, int bits) {
    return {{(I4)((U4)a.q[0] >> bits), (I4)((U4)a.q[1] >> bits), (I4)((U4)a.q[2] >> bits),
             (I4)((U4)a.q[3] >> bits)}};
  }
  static F div(F a, F b) {
    return {{a.q[0] / b.q[0], a.q[1] / b.q[1], a.q[2] / b.q[2], a.q[3] / b.q[3]}};
  }
  static F clamp(F a, F low, F high) {
    F r{};
    for (int i = 0; i < 4; ++i) {
      const F4 up = a.q[i] > low.q[i] ? a.q[i] : low.q[i];
      r.q[i] = up < high.q[i] ? up : high.q[i];
    }
    return r;
  }
  static I to_i(F a) {  // to the nearest, ties to even; |a| < 2^22
    const F magic = set1(12582912.0f);
    const F rounded = sub(add(a, magic), magic);
    return {{__builtin_convertvector(rounded.q[0], I4), __builtin_convertvector(rounded.q[1], I4),
             __builtin_convertvector(rounded.q[2], I4), __builtin_convertvector(rounded.q[3], I4)}};
  }
  static F to_f(I a) {
    return {{__builtin_convertvector(a.q[0], F4), __builtin_convertvector(a.q[1], F4),
             __builtin_convertvector(a.q[2], F4), __builtin_convertvector(a.q[3], F4)}};
  }
  static F as_f(I a) { return {{(F4)a.q[0], (F4)a.q[1], (F4)a.q[2], (F4)a.q[3]}}; }
  static I as_i(F a) { return {{(I4)a.q[0], (I4)a.q[1], (I4)a.q[2], (I4)a.q[3]}}; }
  static void store_bytes(uint8_t* p, I a) {  // the low byte of every lane
    for (int i = 0; i < 16; ++i) p[i] = static_cast<uint8_t>(a.q[i / 4][i % 4]);
  }
  static F select_lt(I a, I b, F if_less, F otherwise) {  // per lane: a < b ? if_less : otherwise
    F r{};
    for (int i = 0; i < 4; ++i) {
      const I4 less = a.q[i] < b.q[i];
      r.q[i] = (F4)((less & (I4)if_less.q[i]) | (~less & (I4)otherwise.q[i]));
    }
    return r;
  }

  static Lut make_lut(const float* table) { return {table}; }
  static F lut16(
      I index,
      Lut table) {  // the low four bits of each lane pick an entry; higher bits are ignored
    F r{};
    for (int i = 0; i < 4; ++i) {
      const I4 at = index.q[i] & 15;
      r.q[i] = F4{table.table[at[0]], table.table[at[1]], table.table[at[2]], table.table[at[3]]};
    }
    return r;
  }

  static I iload_u8(const uint8_t* p) {  // 16 bytes, one per lane
    I r{};
    for (int i = 0; i < 4; ++i) r.q[i] = I4{p[4 * i], p[4 * i + 1], p[4 * i + 2], p[4 * i + 3]};
    return r;
  }
  static F load_u8(const uint8_t* p) { return to_f(iload_u8(p)); }
  static F load_half(const uint8_t* p) {  // 16 fp16 values
    F r{};
    for (int i = 0; i < 4; ++i, p += 8) r.q[i] = F4{half(p), half(p + 2), half(p + 4), half(p + 6)};
    return r;
  }
  static F load_bfloat(const uint8_t* p) {  // 16 bf16 values
    uint16_t bits[16];
    __builtin_memcpy(bits, p, 32);
    I r{};
    for (int i = 0; i < 4; ++i)
      r.q[i] = I4{bits[4 * i], bits[4 * i + 1], bits[4 * i + 2], bits[4 * i + 3]};
    return as_f(shl<16>(r));
  }
  static void store_half(uint8_t* p, F a) {  // ties to even
    for (int i = 0; i < 16; ++i) {
      const uint16_t bits = to_half(a.q[i / 4][i % 4]);
      __builtin_memcpy(p + 2 * i, &bits, 2);
    }
  }

  static I broadcast4(const int8_t* p) {  // the same four bytes in every lane
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    return iset1(four);
  }
  static I dot4(I sums, I codes, I x) {  // per lane: sums += sum of four u8 * s8 products, exactly
    for (int i = 0; i < 4; ++i) {
      // Even and odd bytes as words, whose products fit words.
      const H8 c = (H8)codes.q[i], v = (H8)x.q[i];
      sums.q[i] += add_words((c & 0xff) * (v << 8 >> 8)) + add_words((H8)((U8)c >> 8) * (v >> 8));
    }
    return sums;
  }

 private:
  typedef int16_t H8 __attribute__((vector_size(16)));
  typedef uint16_t U8 __attribute__((vector_size(16)));

  static I4 add_words(H8 words) {  // the two of every lane
    const I4 both = (I4)words;
    return ((I4)((U4)both << 16) >> 16) + (both >> 16);
  }
  // Kept here, beside the copies in common/half.h, because kernel files share no inline functions (see above).
  static float half(const uint8_t* p) {
    uint16_t bits;
    __builtin_memcpy(&bits, p, 2);
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
    const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7fffu);
    uint32_t out;
    if (magnitude >= 0x7c00u) {
      out = sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13);
    } else if (magnitude >= 0x400u) {
      out = sign | ((magnitude << 13) + 0x38000000u);
    } else {
      const float value = static_cast<float>(static_cast<int32_t>(magnitude)) *
                          0x1p-24f;  // exact, never subnormal in fp32
      __builtin_memcpy(&out, &value, 4);
      out |= sign;
    }
    float result;
    __builtin_memcpy(&result, &out, 4);
    return result;
  }
  static uint16_t to_half(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u)
      return static_cast<uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
    if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
    if (magnitude < 0x38800000u) {
      // Adding 0.5 makes the hardware round to a multiple of 2^-24, the spacing of fp16's subnormals.
      float small;
      __builtin_memcpy(&small, &magnitude, 4);
      small += 0.5f;
      uint32_t rounded;
      __builtin_memcpy(&rounded, &small, 4);
      return static_cast<uint16_t>(sign | (rounded - 0x3f000000u));
    }
    const uint32_t rebiased = magnitude - 0x38000000u;
    return static_cast<uint16_t>(sign | ((rebiased + 0xfffu + ((rebiased >> 13) & 1u)) >> 13));
  }
};
