// A packed weight: where a chunk's scales and zeros are, and what its 32 weights are.
#pragma once

#include "metal/shaders/arguments.h"
#include "metal/shaders/codec.h"
#include "metal/shaders/numbers.h"
#include "metal/shaders/scales.h"

namespace lowbit {

using metal_params::Gemm;
using metal_params::kNoSupers;

inline device const uchar* strip_of(device const uchar* w, int strip, thread const Gemm& p) {
  return w + ulong(strip) * ulong(p.strip_bytes);
}

// A division per chunk would cost a fifth of the kernel where the group size is no power of two; mostly it is.
inline uint group_of(uint k, thread const Gemm& p) {
  return p.group_shift >= 0 ? k >> uint(p.group_shift) : k / uint(p.group_size);
}

// The numbers of four rows: one vector.
inline float4 load_four(device const uchar* at, ScaleDtype dtype) {
  switch (dtype) {
    case ScaleDtype::kFloat32:
      return *(device const float4*)at;
    case ScaleDtype::kFloat16:
      return float4(*(device const half4*)at);
    default:
      return as_type<float4>(uint4(*(device const ushort4*)at) << 16u);
  }
}
inline float load_one(device const uchar* at, ScaleDtype dtype) {
  switch (dtype) {
    case ScaleDtype::kFloat32:
      return *(device const float*)at;
    case ScaleDtype::kFloat16:
      return float(*(device const half*)at);
    default:
      return as_type<float>(uint(*(device const ushort*)at) << 16u);
  }
}

// ---- scales of one byte, and of two levels -------------------------------------------------------------------------------

// Of 4 bits, an offset may stand in the other half of a byte: from bit `shift` on.
inline float4 decode_four(device const uchar* codes, uint shift, ScaleDtype dtype) {
  const uint mask = dtype == ScaleDtype::kUInt4 ? 15u : 255u;
  const uint4 four = uint4(*(device const uchar4*)codes) >> shift;
  return float4(scale_code_value(four.x & mask, dtype), scale_code_value(four.y & mask, dtype),
                scale_code_value(four.z & mask, dtype), scale_code_value(four.w & mask, dtype));
}

inline float4 load_supers(device const uchar* strip, uint offset, uint group,
                          thread const Gemm& p) {
  const ScaleDtype dtype = ScaleDtype(p.super_dtype);
  const uint row = group >> uint(p.super_shift);
  return load_four(strip + offset + row * (dtype == ScaleDtype::kFloat32 ? 16u : 8u), dtype);
}

inline float4 load_small_scales(device const uchar* strip, uint group, thread const Gemm& p) {
  LOWBIT_EXACT
  const ScaleDtype dtype = scale_dtype_of(p.kinds);
  device const uchar* codes = strip + p.scales_offset;
  if ((p.kinds & metal_params::kOneScale) != 0)
    return float4(scale_code_value(codes[group], dtype));
  float4 scales = decode_four(codes + group * 4u, 0u, dtype);
  if (p.super_shift != kNoSupers) scales = scales * load_supers(strip, p.supers_offset, group, p);
  if (dtype == ScaleDtype::kDynamic8)  // one number for all
    scales = scales + load_four(strip + p.super_zeros_offset, ScaleDtype(p.super_dtype));
  return scales;
}

// Offsets are codes in the dtype of the scales, of 4 bits in the same bytes.
inline float4 load_small_offsets(device const uchar* strip, uint group, thread const Gemm& p) {
  const ScaleDtype dtype = scale_dtype_of(p.kinds);
  const bool shared = dtype == ScaleDtype::kUInt4;
  const uint offset = shared ? p.scales_offset : p.zeros_offset;
  return decode_four(strip + offset + group * 4u, shared ? 4u : 0u, dtype) *
         load_supers(strip, p.super_zeros_offset, group, p);
}

inline float4 load_scales(device const uchar* strip, uint group, thread const Gemm& p) {
  const ScaleDtype dtype = scale_dtype_of(p.kinds);
  if (dtype > ScaleDtype::kBFloat16) return load_small_scales(strip, group, p);
  const uint bytes = dtype == ScaleDtype::kFloat32 ? 4u : 2u;
  device const uchar* scales = strip + p.scales_offset;
  if ((p.kinds & metal_params::kOneScale) != 0)
    return float4(load_one(scales + group * bytes, dtype));
  return load_four(scales + group * 4u * bytes, dtype);
}

// What is subtracted from (float, int zeros, or none: the middle) or added to (offsets) the codes.
inline float4 load_zeros(device const uchar* strip, uint group, thread const Gemm& p,
                         float middle) {
  device const uchar* zeros = strip + p.zeros_offset;
  switch (zero_kind_of(p.kinds)) {
    case ZeroKind::kNone:
      return float4(middle);
    case ZeroKind::kInt:
      return float4(*(device const uchar4*)(zeros + group * 4u));
    default: {
      const ScaleDtype dtype = scale_dtype_of(p.kinds);
      if (dtype > ScaleDtype::kBFloat16) return load_small_offsets(strip, group, p);
      return load_four(zeros + group * (dtype == ScaleDtype::kFloat32 ? 16u : 8u), dtype);
    }
  }
}

// Zeros that are no integers, and offsets: weights are then not codes times a scale.
inline bool is_affine(int kinds) { return zero_kind_of(kinds) >= ZeroKind::kFloat; }

// codes[row][k] of a chunk, exactly: q - zero for integers with integer zeros, the number that the code stands for
// otherwise. Times the scales they are the weights, unless the weight is affine.
template <Format kFormat>
inline void chunk_codes(device const uchar* strip, uint chunk, uint group, thread const Gemm& p,
                        thread float (&codes)[4][8]) {
  const Chunk<kFormat> c = load_chunk<kFormat>(strip, chunk, p.high_plane);
  float4 zeros = float4(0.0f);
  if (is_integer(kFormat)) zeros = load_zeros(strip, group, p, float(1 << (bits_of(kFormat) - 1)));
  LOWBIT_UNROLL
  for (int row = 0; row < 4; ++row) {
    LOWBIT_UNROLL
    for (int pair = 0; pair < 4; ++pair) {
      const float2 value = Codec<kFormat>::pair(c, row, pair, half(zeros[row]));
      codes[row][2 * pair] = value.x;
      codes[row][2 * pair + 1] = value.y;
    }
  }
}

// weights[row][k] of a chunk that is affine: (q - zero) * scale, or q * scale + offset.
template <Format kFormat>
inline void affine_weights(device const uchar* strip, uint chunk, uint group, thread const Gemm& p,
                           float4 scales, thread float (&weights)[4][8]) {
  LOWBIT_EXACT
  const Chunk<kFormat> c = load_chunk<kFormat>(strip, chunk, p.high_plane);
  const float4 zeros = load_zeros(strip, group, p, 0.0f);
  const bool offsets = zero_kind_of(p.kinds) == ZeroKind::kOffset;
  LOWBIT_UNROLL
  for (int row = 0; row < 4; ++row) {
    LOWBIT_UNROLL
    for (int pair = 0; pair < 4; ++pair) {
      const float2 q = Codec<kFormat>::pair(c, row, pair, half(0.0f));
      float2 value;
      if (offsets) {
        value = q * scales[row];
        value = value + zeros[row];
      } else {
        value = q - zeros[row];
        value = value * scales[row];
      }
      weights[row][2 * pair] = value.x;
      weights[row][2 * pair + 1] = value.y;
    }
  }
}

// weights[row][k] of any chunk, if it is in this group, as dequantize has them: computed in fp32 in the contract's order.
template <Format kFormat>
inline void group_weights(device const uchar* strip, uint chunk, uint group, thread const Gemm& p,
                          thread float (&weights)[4][8]) {
  const float4 scales = load_scales(strip, group, p);
  if (is_integer(kFormat) && is_affine(p.kinds)) {
    affine_weights<kFormat>(strip, chunk, group, p, scales, weights);
    return;
  }
  chunk_codes<kFormat>(strip, chunk, group, p, weights);
  LOWBIT_UNROLL
  for (int row = 0; row < 4; ++row) {
    LOWBIT_UNROLL
    for (int k = 0; k < 8; ++k) weights[row][k] *= scales[row];
  }
}

template <Format kFormat>
inline void chunk_weights(device const uchar* strip, uint chunk, thread const Gemm& p,
                          thread float (&weights)[4][8]) {
  group_weights<kFormat>(strip, chunk, group_of(chunk * 8u, p), p, weights);
}

}  // namespace lowbit
