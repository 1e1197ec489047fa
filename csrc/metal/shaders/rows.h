// Rows of activations in registers.
#pragma once

#include "metal/shaders/numbers.h"
#include "metal/shaders/weight.h"

namespace lowbit {

// x[k .. k+7] of a row of `columns`, zeros behind its end. Vector loads where rows start at multiples of 16 bytes.
template <class T>
inline void load_eight(device const T* row, uint k, uint columns, bool vectors,
                       thread float (&x)[8]) {
  if (vectors && k + 8u <= columns) {
    const vec<T, 4> a = *(device const vec<T, 4>*)(row + k);
    const vec<T, 4> b = *(device const vec<T, 4>*)(row + k + 4u);
    LOWBIT_UNROLL
    for (int i = 0; i < 4; ++i) {
      x[i] = float(a[i]);
      x[4 + i] = float(b[i]);
    }
  } else {
    LOWBIT_UNROLL
    for (uint i = 0; i < 8u; ++i) x[i] = inside(k + i, columns) ? float(row[k + i]) : 0.0f;
  }
}

inline bool has_vectors(int kinds) { return (kinds & metal_params::kVectors) != 0; }

// One number of y: scaled by its row's activation scale, bias added in fp32, rounded once.
inline void write_result(float value, int m, int n, device const uchar* bias, device uchar* y,
                         device const float* x_scales, thread const Gemm& p) {
  if (!inside(m, p.M) || !inside(n, p.N)) return;
  if ((p.kinds & metal_params::kHasXScales) != 0 && p.x_groups == 1) value *= x_scales[m];
  if ((p.kinds & metal_params::kHasBias) != 0)
    value += load_element(bias, n, bias_type_of(p.kinds));
  store_element(y, long(m) * long(p.y_stride) + long(n), value, y_type_of(p.kinds));
}

}  // namespace lowbit
