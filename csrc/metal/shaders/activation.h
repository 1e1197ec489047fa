// Activations: quantized to 8 bits, and made ready for a GEMM.
//
// quantize_activation follows cpu/kernels/activation-inl.h operation by operation. torch compiles shaders in Metal's safe math
// mode, where division is correctly rounded, so the bits are the CPU's; what differs is subnormal fp32 numbers, which Apple's
// GPUs may take for zero.
#pragma once

#include "metal/shaders/arguments.h"
#include "metal/shaders/numbers.h"

namespace lowbit {

using metal_params::Rows;

// Ties to even, for |value| < 2^22; not min and max, which drop a NaN: it comes out as `least`.
inline float clamp_to(float value, float least, float most) {
  value = value > least ? value : least;
  return value < most ? value : most;
}
inline float bounded(float value) { return clamp_to(value, -65536.0f, 65536.0f); }

// |value| <= 448 to fp8 e4m3, to nearest even. Below 2^-6 codes are multiples of 2^-9.
inline uint fp8_e4m3_code(float value) {
  const uint bits = as_type<uint>(value), magnitude = bits & 0x7fffffffu;
  const uint rounded = magnitude + 0x7ffffu + ((magnitude >> 20) & 1u);
  const uint normal = (rounded - (120u << 23)) >> 20;
  const uint subnormal = uint(rint(as_type<float>(magnitude) * 512.0f));
  return (magnitude < (121u << 23) ? subnormal : normal) | (bits >> 31) << 7;
}

struct Range {
  float low, high;  // of what is not NaN
  uint nan;         // bit 0: there is one, bit 1: it is the first
};

struct RangeShared {
  float low[8], high[8];
  uint nan[8];
};

inline Range join(Range a, float low, float high, uint nan) {
  return {low < a.low ? low : a.low, high > a.high ? high : a.high, a.nan | nan};
}

// Of all threads of the threadgroup, 32 * kSimds.
template <int kSimds>
inline Range join_threads(Range r, uint lane, uint simd, threadgroup RangeShared& shared) {
  r = {simd_min(r.low), simd_max(r.high), simd_max(r.nan)};
  if (kSimds == 1) return r;
  if (lane == 0u) {
    shared.low[simd] = r.low;
    shared.high[simd] = r.high;
    shared.nan[simd] = r.nan;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = 0; i < kSimds; ++i) r = join(r, shared.low[i], shared.high[i], shared.nan[i]);
  return r;
}

struct Coder {
  float scale, zero, least;
};

inline Coder coder_of(Range r, device const float* static_scale, device const int* static_zero,
                      thread const Rows& p) {
  const bool is_int8 = y_type_of(p.kinds) == Element::kInt8;
  const bool symmetric = (p.kinds & metal_params::kSymmetric) != 0;
  // The CPU's search starts from the first element: a NaN there stays.
  if ((r.nan & 2u) != 0u) r.low = r.high = NAN;
  Coder c = {1.0f, 0.0f, -128.0f};
  if ((p.kinds & metal_params::kStatic) != 0) {
    c.scale = static_scale[0];
    if ((p.kinds & metal_params::kStaticZero) != 0) c.zero = float(static_zero[0]);
  } else if (symmetric || !is_int8) {
    c.scale = (-r.low > r.high ? -r.low : r.high) / (is_int8 ? 127.0f : 448.0f);
    c.least = -127.0f;
  } else {
    const float least = r.low < 0.0f ? r.low : 0.0f, most = r.high > 0.0f ? r.high : 0.0f;
    c.scale = (most - least) / 255.0f;
    if (c.scale > 0.0f)
      c.zero = clamp_to(rint(bounded(-128.0f - least / c.scale)), -128.0f, 127.0f);
  }
  if (c.scale == 0.0f) c.scale = 1.0f;
  if (r.nan != 0u) c.scale = NAN;
  return c;
}

// A threadgroup per scale: group.x: groups of k; group.y: rows.
template <int kSimds>
[[kernel]] void quantize_activation(LOWBIT_PARAMS_ARGUMENTS, device const uchar* x [[buffer(5)]],
                                    device uchar* xq [[buffer(6)]],
                                    device float* x_scales [[buffer(7)]],
                                    device int* x_zeros [[buffer(8)]],
                                    device const float* static_scale [[buffer(9)]],
                                    device const int* static_zero [[buffer(10)]],
                                    device const float* pre_scale [[buffer(11)]], LOWBIT_POSITION) {
  LOWBIT_SHARED(RangeShared, shared);
  const Rows p = LOWBIT_PARAMS(Rows);
  const int m = int(group.y), first = int(group.x) * p.group_size;
  const int end = min(first + p.group_size, p.K);
  const Element type = x_type_of(p.kinds);
  const bool scaled = (p.kinds & metal_params::kPreScale) != 0;
  const long row = long(m) * long(p.stride);
  Range r = {INFINITY, -INFINITY, 0u};
  for (int k = first + int(thread_index); inside(k, end); k += 32 * kSimds) {
    const float value = load_element(x, row + long(k), type) * (scaled ? pre_scale[k] : 1.0f);
    r = join(r, value, value, is_nan(value) ? (k == first ? 3u : 1u) : 0u);
  }
  r = join_threads<kSimds>(r, lane, simd, shared);
  const Coder c = coder_of(r, static_scale, static_zero, p);
  const bool is_int8 = y_type_of(p.kinds) == Element::kInt8;
  for (int k = first + int(thread_index); inside(k, end); k += 32 * kSimds) {
    const float value = load_element(x, row + long(k), type) * (scaled ? pre_scale[k] : 1.0f);
    const float level = value / c.scale;
    xq[long(m) * long(p.K) + long(k)] =
        is_int8 ? uchar(char(int(clamp_to(rint(bounded(level)) + c.zero, c.least, 127.0f))))
                : uchar(fp8_e4m3_code(clamp_to(level, -448.0f, 448.0f)));
  }
  if (thread_index == 0u) {
    x_scales[long(m) * long(p.groups) + long(group.x)] = c.scale;
    if (is_int8 && (p.kinds & metal_params::kSymmetric) == 0) x_zeros[m] = int(c.zero);
  }
}

// Rows as a GEMM's kernels want them where they are not: gathered by perm, and 8-bit codes minus their zeros in half.
// group.x: columns, 256 at a time; group.y: rows.
template <class T>
[[kernel]] void prepare_rows(LOWBIT_PARAMS_ARGUMENTS, device const uchar* x [[buffer(5)]],
                             device const uchar* w [[buffer(6)]],
                             device const int* x_zeros [[buffer(7)]], device T* to [[buffer(8)]],
                             LOWBIT_POSITION) {
  const Rows p = LOWBIT_PARAMS(Rows);
  const int m = int(group.y), k = 256 * int(group.x) + int(thread_index);
  if (!inside(k, p.K)) return;
  int column = k;
  if ((p.kinds & metal_params::kHasPerm) != 0) {
    column = ((device const int*)(w + (ulong(p.perm_high) << 32 | ulong(p.perm_low))))[k];
  }
  float value = load_element(x, long(m) * long(p.stride) + long(column), x_type_of(p.kinds));
  if ((p.kinds & metal_params::kHasXZeros) != 0) value -= float(x_zeros[m]);
  to[long(m) * long(p.to_stride) + long(k)] = T(value);
}

}  // namespace lowbit
