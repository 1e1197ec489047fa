// The quantizer's rules, element by element: the one source of its bits on every device.
//
// Round-to-nearest, in fp32 with IEEE division, ties to even (rne), R = rounding to the scales' dtype, top = 2^bits - 1;
// scales and zeros are what is stored, and codes are computed against them:
//
//   no zeros      s = R(amax / (2^(bits-1) - 0.5))                       q = clamp(rne(x / s) + 2^(bits-1), 0, top)
//   int zeros     s = R((hi - lo) / top)    z = clamp(rne(-lo / s))      q = clamp(rne(x / s) + z, 0, top)
//   float zeros   the same s                z = R(-lo / s)               q = clamp(rne(x / s + z), 0, top)
//                 (with zeros, lo = min(x, 0) and hi = max(x, 0))
//   offset        s = R((max - min) / top)  o = R(min)                   q = clamp(rne((x - o) / s), 0, top)
//   code book     s = R(amax / largest)     t = x / s, clamped           fp8, fp4: rne in the format; others: midpoints below t
//   powers of two s = 2^(floor(log2 amax) - floor(log2 largest))         where there are no zeros (OCP MX)
//
// Under a scale of all scales u, R(s) stands for R(s / u) * u.
//
// A group without extent has s = 1, or 0 where no code is 0 (iq4_nl; as powers of two have no 0, the smallest of those); an s
// that would round to 0 becomes the dtype's smallest number; a group with a NaN has a NaN scale.
//
// Scalar functions of IEEE operations in a fixed order: ties to even, correctly rounded division, no contraction
// (-ffp-contract=off, nvcc -fmad=false), no table, no library call. Loops over a group and sums over it belong to whoever
// includes this: vectors on the CPU (cpu/kernels/quantize-inl.h), lanes of a warp on a GPU (cuda/kernels/quantize.cuh,
// metal/shaders/quantize.h).
//
// Included inside a namespace of its own, so that code for one ISA never reaches another, and in C++14 where that is what a
// shader is written in. The includer defines LOWBIT_HD (what a function needs to run on the device; nothing on the CPU),
// LOWBIT_UNROLL (before a loop of constant length), and what numbers are: Float32, with float_bits, bits_float and round_even.
// In quantize/native-inl.h they are the machine's; in metal/shaders/ieee.h, for a machine that has not all of them, integers.

LOWBIT_HD inline bool is_nan(Float32 value) {
  return (float_bits(value) & 0x7fffffffu) > 0x7f800000u;
}

LOWBIT_HD inline Float32 clamp(Float32 value, Float32 low, Float32 high) {
  value = value > low ? value : low;  // also for a NaN
  return value < high ? value : high;
}

// ---- small floats ---------------------------------------------------------------------------------------------------

// A float with few bits: sign, exponent (IEEE bias), mantissa. |value| is at most the largest finite one.
template <int kExponentBits, int kMantissaBits>
struct SmallFloat {
  enum : int { kBias = (1 << (kExponentBits - 1)) - 1, kDrop = 23 - kMantissaBits };
  enum : uint32_t { kSmallestNormal = static_cast<uint32_t>(127 + 1 - kBias) << 23 };
  // Subnormals are multiples of `spacing`, a power of two.
  LOWBIT_HD static constexpr float inverse_spacing() {
    return static_cast<float>(1u << (kBias - 1 + kMantissaBits));
  }
  LOWBIT_HD static constexpr float spacing() { return 1.0f / inverse_spacing(); }

  // fp32 bits of a normal magnitude, rounded to kMantissaBits; the bits dropped are not yet cleared.
  LOWBIT_HD static uint32_t rounded_bits(uint32_t magnitude) {
    return magnitude + (1u << (kDrop - 1)) - 1u + ((magnitude >> kDrop) & 1u);
  }

  LOWBIT_HD static uint8_t encode(Float32 value) {
    const uint32_t bits = float_bits(value);
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t normal =
        (rounded_bits(magnitude) - (static_cast<uint32_t>(127 - kBias) << 23)) >> kDrop;
    const uint32_t subnormal = static_cast<uint32_t>(
        static_cast<int32_t>(round_even(bits_float(magnitude) * inverse_spacing())));
    const uint32_t code = magnitude < kSmallestNormal ? subnormal : normal;
    return static_cast<uint8_t>(code | (bits >> 31) << (kExponentBits + kMantissaBits));
  }

  // What `encode` decodes to, without a table look-up in the inner loop of the scale search.
  LOWBIT_HD static Float32 nearest(Float32 value) {
    const uint32_t bits = float_bits(value);
    const uint32_t magnitude = bits & 0x7fffffffu;
    const Float32 normal = bits_float(rounded_bits(magnitude) >> kDrop << kDrop);
    const Float32 subnormal = round_even(bits_float(magnitude) * inverse_spacing()) * spacing();
    const Float32 result = magnitude < kSmallestNormal ? subnormal : normal;
    return bits_float(float_bits(result) | (bits & 0x80000000u));
  }
};

// ---- storage of scales, zeros, offsets ---------------------------------------------------------------------------------

LOWBIT_HD inline uint32_t half_bits_of(Float32 value) {
  const uint32_t bits = float_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // rounds to 2^16 or more
  if (magnitude < 0x38800000u) {
    // Below 2^-14. Adding 0.5 rounds to a multiple of 2^-24, the spacing of fp16's subnormals.
    return sign | (float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u);
  }
  const uint32_t rebiased = magnitude - 0x38000000u;
  return sign | ((rebiased + 0xfffu + ((rebiased >> 13) & 1u)) >> 13);
}

LOWBIT_HD inline Float32 half_value_of(uint32_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_float(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  if (magnitude >= 0x400u) return bits_float(sign | ((magnitude << 13) + 0x38000000u));
  // Exact, and never subnormal in fp32.
  return bits_float(
      float_bits(static_cast<Float32>(static_cast<int32_t>(magnitude)) * bits_float(0x33800000u)) |
      sign);
}

LOWBIT_HD inline uint32_t bfloat_bits_of(Float32 value) {
  const uint32_t bits = float_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (bits >> 16) | 0x40u;
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

// The power of two nearest to a positive number, from 2^-127 on; 0 for others, a NaN beyond 2^127.
LOWBIT_HD inline Float32 nearest_power(Float32 value) {
  if (value <= 0.0f) return 0.0f;
  const uint32_t bits = float_bits(value);
  if (bits < 0x00600000u) return bits_float(0x00400000u);
  const uint32_t power = (bits + 0x00400000u) & 0x7f800000u;
  return bits_float(power == 0x7f800000u ? 0x7fc00000u : power);
}

// E4M3 has no infinity: what rounds to more than 448 is a NaN.
LOWBIT_HD inline Float32 nearest_e4m3(Float32 value) {
  const bool fits = value >= -464.0f && value <= 464.0f;
  return fits ? SmallFloat<4, 3>::nearest(value) : bits_float(0x7fc00000u);
}

// The code of a number that `rounded` gave.
LOWBIT_HD inline uint8_t scale_code(Float32 value, ScaleDtype dtype) {
  if (dtype == ScaleDtype::kE8m0)
    return is_nan(value) ? 255 : static_cast<uint8_t>(float_bits(value) >> 23);
  return is_nan(value) ? 0x7f : SmallFloat<4, 3>::encode(value);
}

// What a reader of the stored number will see.
LOWBIT_HD inline Float32 rounded(Float32 value, ScaleDtype dtype) {
  if (dtype == ScaleDtype::kFloat16) return half_value_of(half_bits_of(value));
  if (dtype == ScaleDtype::kBFloat16) return bits_float(bfloat_bits_of(value) << 16);
  if (dtype == ScaleDtype::kE8m0) return nearest_power(value);
  if (dtype == ScaleDtype::kE4m3) return nearest_e4m3(value);
  return value;
}

// The bits that are stored, and how many bytes.
LOWBIT_HD inline uint32_t stored_bits(Float32 value, ScaleDtype dtype) {
  if (dtype == ScaleDtype::kFloat32) return float_bits(value);
  if (dtype == ScaleDtype::kFloat16) return half_bits_of(value);
  if (dtype == ScaleDtype::kBFloat16) return bfloat_bits_of(value);
  return scale_code(rounded(value, dtype), dtype);
}
LOWBIT_HD inline int stored_bytes(ScaleDtype dtype) {
  return dtype == ScaleDtype::kFloat32                              ? 4
         : dtype == ScaleDtype::kE8m0 || dtype == ScaleDtype::kE4m3 ? 1
                                                                    : 2;
}

// Least byte first. A pointer of any kind: to bytes of an address space, on some devices.
template <class Pointer>
LOWBIT_HD inline void store_rounded(Float32 value, ScaleDtype dtype, Pointer to) {
  const uint32_t bits = stored_bits(value, dtype);
  for (int i = 0; i < stored_bytes(dtype); ++i) to[i] = static_cast<uint8_t>(bits >> (8 * i));
}

// The smallest positive number of a dtype: what a scale becomes that would otherwise round to zero.
LOWBIT_HD inline Float32 smallest(ScaleDtype dtype) {
  return dtype == ScaleDtype::kFloat32   ? bits_float(1)
         : dtype == ScaleDtype::kFloat16 ? bits_float(0x33800000u)
         : dtype == ScaleDtype::kE4m3    ? bits_float(0x3b000000u)
         : dtype == ScaleDtype::kE8m0    ? bits_float(0x00400000u)
                                         : bits_float(0x10000u);
}

// How a scale is stored: in a dtype, in units of the scale of all scales (1 where there is none).
struct ScaleStorage {
  ScaleDtype dtype;
  Float32 unit;
};

// A usable scale: one unit for a group of zeros, never 0 for one that is not.
LOWBIT_HD inline Float32 rounded_scale(Float32 scale, ScaleStorage to) {
  if (scale == 0.0f) return to.unit;
  const Float32 result = rounded(scale / to.unit, to.dtype);
  return (result == 0.0f ? smallest(to.dtype) : result) * to.unit;
}

template <class Pointer>
LOWBIT_HD inline void store_scale(Float32 scale, ScaleStorage storage, Pointer to) {
  store_rounded(scale / storage.unit, storage.dtype, to);
}

// ---- codes -------------------------------------------------------------------------------------------------------------

struct Affine {
  Float32 scale;
  Float32 zero;    // none, int, float
  Float32 offset;  // offset
};

// Integers. kKind decides where zero or offset enter and what is rounded.
template <ZeroKind kKind>
struct IntEncoder {
  enum : int { kZeros = static_cast<int>(kKind) };
  Affine p;
  Float32 top;  // 2^bits - 1

  LOWBIT_HD Float32 rounded_code(Float32 x) const {
    const Float32 limit = 65536.0f;  // keeps round_even exact
    if (kKind == ZeroKind::kOffset) {
      return clamp(round_even(clamp((x - p.offset) / p.scale, -limit, limit)), 0.0f, top);
    } else if (kKind == ZeroKind::kFloat) {
      return clamp(round_even(clamp(x / p.scale + p.zero, -limit, limit)), 0.0f, top);
    } else {
      return clamp(round_even(clamp(x / p.scale, -limit, limit)) + p.zero, 0.0f, top);
    }
  }
  LOWBIT_HD uint8_t code(Float32 x) const {
    return static_cast<uint8_t>(static_cast<int>(rounded_code(x)));
  }
  // What the scale multiplies, and the weight itself.
  LOWBIT_HD Float32 level(Float32 x) const {
    const Float32 q = rounded_code(x);
    return kKind == ZeroKind::kOffset ? q : q - p.zero;
  }
  LOWBIT_HD Float32 value(Float32 x) const {
    const Float32 scaled = level(x) * p.scale;
    return kKind == ZeroKind::kOffset ? scaled + p.offset : scaled;
  }
};

// Code books that are floats: round to nearest even.
template <class Float>
struct FloatEncoder {
  enum : int { kZeros = static_cast<int>(ZeroKind::kNone) };
  Affine p;
  Float32 max;

  LOWBIT_HD Float32 scaled(Float32 x) const { return clamp(x / p.scale, -max, max); }
  LOWBIT_HD uint8_t code(Float32 x) const { return Float::encode(scaled(x)); }
  LOWBIT_HD Float32 level(Float32 x) const { return Float::nearest(scaled(x)); }
  LOWBIT_HD Float32 value(Float32 x) const { return level(x) * p.scale; }
};

// Code books that follow no rule: the nearest of 16 levels, which ascend; a tie goes to the lower one.
struct BookEncoder {
  enum : int { kZeros = static_cast<int>(ZeroKind::kNone) };
  Affine p;
  Float32 levels[16], middle[15];

  template <class Table>
  LOWBIT_HD explicit BookEncoder(Table table) : p{} {
    LOWBIT_UNROLL
    for (int i = 0; i < 16; ++i) levels[i] = table[i];
    LOWBIT_UNROLL
    for (int i = 0; i < 15; ++i) middle[i] = (table[i] + table[i + 1]) * 0.5f;
  }
  LOWBIT_HD uint8_t code(Float32 x) const {
    const Float32 t = x / p.scale;
    int index = 0;
    LOWBIT_UNROLL
    for (int i = 0; i < 15; ++i) index += t > middle[i];
    return static_cast<uint8_t>(index);
  }
  LOWBIT_HD Float32 level(Float32 x) const {
    const Float32 t = x / p.scale;
    Float32 nearest = levels[0];
    LOWBIT_UNROLL
    for (int i = 0; i < 15; ++i) {
      const Float32 above = levels[i + 1];  // loaded in any case, so that the choice is a blend
      nearest = t > middle[i] ? above : nearest;
    }
    return nearest;
  }
  LOWBIT_HD Float32 value(Float32 x) const { return level(x) * p.scale; }
};

// ---- scale and zero of a group -----------------------------------------------------------------------------------------

struct Range {
  Float32 low, high, magnitude;
  bool has_nan;
};

// What a negative scale changes where a format has no zeros.
enum class Mirror : int {
  kNothing,   // every code has its opposite
  kLongSide,  // codes reach further down (-8) than up (7), so the larger extreme of a group decides
  kBoth  // and much follows from it: both signs are tried (two bits: -2 .. 1; nf4: seven levels below 0, eight above;
         // iq4_nl: -127 .. 113, and no 0)
};

LOWBIT_HD inline Mirror mirror_of(Format format) {
  switch (format) {
    case Format::kInt2:
    case Format::kInt3:
    case Format::kNf4:
    case Format::kIq4Nl:
      return Mirror::kBoth;
    case Format::kInt4:
    case Format::kInt5:
    case Format::kInt6:
    case Format::kInt8:
      return Mirror::kLongSide;
    default:
      return Mirror::kNothing;
  }
}

LOWBIT_HD inline bool has_zero(Format format) { return format != Format::kIq4Nl; }

// The parts of a quantizer's job that scale and zero depend on.
struct CodeGrid {
  ScaleStorage scales;
  int bits;
  Float32 max;  // FormatInfo::max
  Mirror mirror;
  bool has_zero;  // among the codes
};

LOWBIT_HD inline Float32 power_below(Float32 value) {
  return bits_float(float_bits(value) & 0x7f800000u);
}

// Symmetric codes and code books: the largest magnitude goes to the largest code. Powers of two are taken by OCP's rule, the
// exponent of the magnitude less that of the largest code, so that up to a quarter of the range is clipped.
LOWBIT_HD inline Float32 symmetric_scale(CodeGrid grid, Float32 magnitude) {
  if (grid.scales.dtype != ScaleDtype::kE8m0) {
    if (magnitude == 0.0f && !grid.has_zero) return 0.0f;
    return rounded_scale(magnitude / grid.max, grid.scales);
  }
  if (magnitude == 0.0f) return grid.has_zero ? Float32(1.0f) : bits_float(0x00400000u);
  const Float32 scale = power_below(magnitude) / power_below(grid.max);
  return scale < bits_float(0x00400000u) ? bits_float(0x00400000u)
                                         : rounded(scale, grid.scales.dtype);
}

// Scale and zero for a group whose range is taken to be `factor` times its own.
template <ZeroKind kKind>
LOWBIT_HD inline Affine affine_of(CodeGrid grid, Range r, Float32 factor) {
  const Float32 top = static_cast<Float32>((1 << grid.bits) - 1);
  Affine p{1.0f, 0.0f, 0.0f};
  if (kKind == ZeroKind::kNone) {
    p.scale = symmetric_scale(grid, r.magnitude * factor);
    p.zero = static_cast<Float32>(1 << (grid.bits - 1));
  } else if (kKind == ZeroKind::kOffset) {
    const Float32 middle = (r.low + r.high) * 0.5f;
    p.scale = rounded_scale((r.high - r.low) * factor / top, grid.scales);
    p.offset =
        rounded(factor == 1.0f ? r.low : middle - (middle - r.low) * factor, grid.scales.dtype);
  } else {
    // Zero stays inside the range, so that an exact 0 is never lost and integer zeros fit their codes.
    const Float32 low = (r.low < 0.0f ? r.low : 0.0f) * factor;
    const Float32 high = (r.high > 0.0f ? r.high : 0.0f) * factor;
    p.scale = rounded_scale((high - low) / top, grid.scales);
    p.zero = kKind == ZeroKind::kInt
                 ? clamp(round_even(clamp(-low / p.scale, 0.0f, 65536.0f)), 0.0f, top)
                 : rounded(-low / p.scale, grid.scales.dtype);
  }
  return p;
}

template <ZeroKind kKind>
LOWBIT_HD inline Affine round_to_storage(Affine p, ScaleStorage scales) {
  p.scale = rounded_scale(p.scale, scales);
  if (kKind == ZeroKind::kFloat) p.zero = rounded(p.zero, scales.dtype);
  if (kKind == ZeroKind::kOffset) p.offset = rounded(p.offset, scales.dtype);
  return p;
}

// What is stored for a group with a NaN: a NaN scale (and offset).
template <ZeroKind kKind>
LOWBIT_HD inline Affine with_nan(Affine p) {
  const Float32 quiet_nan = bits_float(0x7fc00000u);
  return {quiet_nan, kKind == ZeroKind::kInt ? 0.0f : p.zero, quiet_nan};
}

template <ZeroKind kKind, class Pointer>
LOWBIT_HD inline void store_zero(Affine p, ScaleDtype dtype, Pointer to) {
  if (kKind == ZeroKind::kInt)
    *to = static_cast<uint8_t>(static_cast<int>(clamp(p.zero, 0.0f, 255.0f)));
  if (kKind == ZeroKind::kFloat) store_rounded(p.zero, dtype, to);
  if (kKind == ZeroKind::kOffset) store_rounded(p.offset, dtype, to);
}
