// Scales of one byte or of two levels, and offsets, from a stage's stored rows into its rows of floats (stages.h): fast kernels
// then read what they read of plain weights. Sixteen threads make a row of 64, four numbers each.
//
// A step of a strip has some hundred numbers to make and thousands of weights to decode: done once per number here, it costs
// less than in the lanes of a warp, four of which need the same one.
#pragma once

#include <cstdint>

#include "cuda/code_values.cuh"
#include "cuda/device.cuh"
#include "cuda/elements.cuh"
#include "cuda/params.h"
#include "cuda/ptx.cuh"
#include "cuda/stages.h"

namespace lowbit::cuda {

// One strip's stored rows in a stage.
struct StoredRows {
  uint8_t *scales, *offsets, *supers, *super_zeros;
};
__device__ inline StoredRows stored_rows(const WeightParams& w, const StageLayout& layout,
                                         uint8_t* stage, int strip) {
  uint8_t* const scales = stage + layout.stored + strip * layout.stored_bytes;
  uint8_t* const offsets = scales + layout.groups * w.stored.scale_row_bytes;
  uint8_t* const supers = offsets + layout.groups * w.stored.zero_row_bytes;
  return {scales, offsets, supers, supers + layout.supers * w.supers.row_bytes};
}

// Four neighbours of a row of super scales; the one of all, where there is one.
__device__ inline void load_supers(const WeightParams& w, const WeightParams::Table& table,
                                   const uint8_t* row, int at, float (&to)[4]) {
  const Element type = element_of(w.super_dtype);
  const uint8_t* const shared = w.data + table.offset;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    to[i] = w.shared_super ? load_element(shared, 0, type) : load_element(row, at + i, type);
}

__device__ inline void decode_four(ScaleDtype dtype, uint32_t codes, float (&to)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) to[i] = scale_code_value(dtype, codes >> (8 * i) & 0xffu);
}

__device__ inline void store_four(const float (&from)[4], bool pairs, uint8_t* row, int at) {
  if (pairs) {
    *reinterpret_cast<uint2*>(row + 2 * at) =
        make_uint2(ptx::pack_bf16x2(from[0], from[1]), ptx::pack_bf16x2(from[2], from[3]));
  } else {
    *reinterpret_cast<float4*>(row + 4 * at) = make_float4(from[0], from[1], from[2], from[3]);
  }
}

// Positions at .. at + 3 of group j of the step.
__device__ inline void expand_four(const WeightParams& w, const StoredRows& stored, int j,
                                   int super_row, int at, uint8_t* scales, uint8_t* offsets) {
  const bool nibbles =
      w.stored.dtype == ScaleDtype::kUInt4;  // an offset may stand in the other half
  const int place = j * kStripRows + at;
  const uint32_t codes = *reinterpret_cast<const uint32_t*>(stored.scales + place);
  float value[4], super[4];
  decode_four(w.stored.dtype, nibbles ? codes & 0x0f0f0f0fu : codes, value);
  if (w.supers.offset != 0) {
    load_supers(w, w.supers, stored.supers + super_row * w.supers.row_bytes, at, super);
#pragma unroll
    for (int i = 0; i < 4; ++i) value[i] = ptx::mul_rn(value[i], super[i]);
  }
  if (w.stored.dtype == ScaleDtype::kDynamic8) {
    const float plus = load_element(w.data + w.super_zeros.offset, 0, element_of(w.super_dtype));
#pragma unroll
    for (int i = 0; i < 4; ++i) value[i] = ptx::add_rn(value[i], plus);
  }
  store_four(value, w.scale_dtype == ScaleDtype::kBFloat16, scales, at);
  if (w.zero_kind != ZeroKind::kOffset) return;
  const uint32_t high = codes >> 4 & 0x0f0f0f0fu;
  decode_four(w.stored.dtype,
              nibbles ? high : *reinterpret_cast<const uint32_t*>(stored.offsets + place), value);
  load_supers(w, w.super_zeros, stored.super_zeros + super_row * w.super_zeros.row_bytes, at,
              super);
#pragma unroll
  for (int i = 0; i < 4; ++i) value[i] = ptx::mul_rn(value[i], super[i]);
  store_four(value, false, offsets, at);
}

// The rows of a step whose first group is `first`, `left` groups before the last; by thread `thread` of kThreads.
template <int kThreads>
__device__ void expand_rows(const WeightParams& w, const StageLayout& layout, uint8_t* stage,
                            int strip, int first, int left, int thread) {
  const int count = left < layout.groups ? left : layout.groups;
  const StoredRows stored = stored_rows(w, layout, stage, strip);
  uint8_t* const scales = stage + layout.scales + strip * layout.groups * w.scale_row_bytes;
  uint8_t* const offsets = stage + layout.zeros + strip * layout.groups * w.zero_row_bytes;
  if (w.one_scale) {  // one number for all rows
    if (!inside(thread, count)) return;
    const float value = scale_code_value(w.stored.dtype, stored.scales[thread * 16]);
    store_element(value, scales + thread * w.scale_row_bytes, 0, element_of(w.scale_dtype));
    return;
  }
#pragma unroll 1
  for (int i = thread; inside(i, count * 16); i += kThreads) {
    const int j = i / 16;
    const int super_row = ((first + j) >> w.supers.shift) - (first >> w.supers.shift);
    expand_four(w, stored, j, super_row, i % 16 * 4, scales + j * w.scale_row_bytes,
                offsets + j * w.zero_row_bytes);
  }
}

}  // namespace lowbit::cuda
