// Everything else: any format, group size, dtype and perm in one pipeline each for products and gradients. One SIMD-group per
// token and strip (per token and chunk of columns), formats and dtypes looked at while it runs.
//
// Templates of one instantiation, because those can be given a name for the host.
#pragma once

#include "metal/shaders/grad.h"

namespace lowbit {

inline void any_group(device const uchar* strip, uint chunk, uint group, thread const Gemm& p,
                      thread float (&weights)[4][8]) {
  switch (format_of(p.kinds)) {
    case Format::kInt2:
      return group_weights<Format::kInt2>(strip, chunk, group, p, weights);
    case Format::kInt3:
      return group_weights<Format::kInt3>(strip, chunk, group, p, weights);
    case Format::kInt4:
      return group_weights<Format::kInt4>(strip, chunk, group, p, weights);
    case Format::kInt5:
      return group_weights<Format::kInt5>(strip, chunk, group, p, weights);
    case Format::kInt6:
      return group_weights<Format::kInt6>(strip, chunk, group, p, weights);
    case Format::kInt8:
      return group_weights<Format::kInt8>(strip, chunk, group, p, weights);
    case Format::kFp8E4m3:
      return group_weights<Format::kFp8E4m3>(strip, chunk, group, p, weights);
    case Format::kFp8E5m2:
      return group_weights<Format::kFp8E5m2>(strip, chunk, group, p, weights);
    case Format::kFp4E2m1:
      return group_weights<Format::kFp4E2m1>(strip, chunk, group, p, weights);
    case Format::kIq4Nl:
      return group_weights<Format::kIq4Nl>(strip, chunk, group, p, weights);
    case Format::kBnbFp4:
      return group_weights<Format::kBnbFp4>(strip, chunk, group, p, weights);
    default:
      return group_weights<Format::kNf4>(strip, chunk, group, p, weights);
  }
}

// Blocks that run across rows may have fewer than 8 k in common with one: 1, 2 or 4.
inline void any_weights(device const uchar* strip, uint chunk, thread const Gemm& p,
                        thread float (&weights)[4][8]) {
  if (p.group_size >= 8 || p.group_size == p.K) {
    any_group(strip, chunk, group_of(chunk * 8u, p), p, weights);
    return;
  }
  const uint size = uint(p.group_size), first = chunk * (8u / size);
  for (uint j = 0; j < 8u / size; ++j) {
    float part[4][8];
    if (inside((first + j) * size, uint(p.K))) any_group(strip, chunk, first + j, p, part);
    for (uint row = 0; row < 4u; ++row) {
      for (uint k = j * size; k < (j + 1u) * size; ++k) weights[row][k] = part[row][k];
    }
  }
}

// group.x: strips; group.y: rows of x. x may be 8 bits wide; its columns are gathered here.
template <int kOnly>
[[kernel]] void general(LOWBIT_GEMM_ARGUMENTS, device const uchar* w [[buffer(11)]],
                        device const uchar* x [[buffer(12)]], device uchar* y [[buffer(13)]],
                        device const uchar* bias [[buffer(14)]],
                        device const float* x_scales [[buffer(15)]],
                        device const int* x_zeros [[buffer(16)]], LOWBIT_POSITION) {
  const Gemm p = LOWBIT_GEMM_PARAMS;
  const int strip = int(group.x), m = int(group.y);
  const float zero = (p.kinds & metal_params::kHasXZeros) != 0 ? float(x_zeros[m]) : 0.0f;
  float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  for (uint chunk = lane; inside(chunk, uint(p.chunks)); chunk += 32u) {
    float weights[4][8];
    any_weights(strip_of(w, strip, p), chunk, p, weights);
    for (int i = 0; i < 8; ++i) {
      const int k = int(chunk) * 8 + i;
      if (!inside(k, p.K)) continue;
      const int column = original_column(k, w, p);
      float value =
          load_element(x, long(m) * long(p.x_stride) + long(column), x_type_of(p.kinds)) - zero;
      if (p.x_groups > 1) value *= x_scales[long(m) * long(p.x_groups) + long(column / 128)];
      for (int row = 0; row < 4; ++row) sums[row] = fma(weights[row][i], value, sums[row]);
    }
  }
  for (int row = 0; row < 4; ++row) {
    const float total = simd_sum(sums[row]);
    if (int(lane) == row) write_result(total, m, 4 * strip + row, bias, y, x_scales, p);
  }
}

// group.x: chunks of columns; group.y: rows of dy.
template <int kOnly>
[[kernel]] void general_grad(LOWBIT_GEMM_ARGUMENTS, device const uchar* w [[buffer(11)]],
                             device const uchar* x [[buffer(12)]], device uchar* y [[buffer(13)]],
                             LOWBIT_POSITION) {
  const Gemm p = LOWBIT_GEMM_PARAMS;
  const int m = int(group.y);
  float sums[8];
  for (int i = 0; i < 8; ++i) sums[i] = 0.0f;
  for (int strip = int(lane); inside(strip, p.strips); strip += 32) {
    float weights[4][8];
    any_weights(strip_of(w, strip, p), group.x, p, weights);
    for (int row = 0; row < 4; ++row) {
      const int n = 4 * strip + row;
      if (!inside(n, p.N)) continue;
      const float value = load_element(x, long(m) * long(p.x_stride) + long(n), x_type_of(p.kinds));
      for (int i = 0; i < 8; ++i) sums[i] = fma(value, weights[row][i], sums[i]);
    }
  }
  for (int i = 0; i < 8; ++i) {
    const float total = simd_sum(sums[i]);
    const int k = int(group.x) * 8 + i;
    if (int(lane) == i && inside(k, p.K)) {
      store_element(y, long(m) * long(p.y_stride) + long(original_column(k, w, p)), total,
                    y_type_of(p.kinds));
    }
  }
}

}  // namespace lowbit
