// Reads a packed weight code by code, for any format that the layout holds: everything about it is known at run time only.
// The general kernels' way; the fast ones have codecs instead.
//
// What comes at once is a pair of registers of one lane of the layout (picture in packing/cuda_tile64.h): for a cell of
// 16 k, one half of it and t = 0..3, the codes of k, k + 1 in the eight rows g, g + 8, ..., g + 56 of a strip. They are
// one 16-byte vector of each plane.
#pragma once

#include <cstdint>

#include "cuda/code_values.cuh"
#include "cuda/device.cuh"
#include "cuda/elements.cuh"
#include "cuda/params.h"
#include "cuda/ptx.cuh"
#include "packing/cuda_tile64.h"

namespace lowbit::cuda {

inline constexpr int kReaderRows = 8;  // g, g + 8, ..., g + 56

// Codes of eight rows at k and k + 1: row g + 8j is word j / 2, its code of k + e at bit 16e + (j % 2) * row_shift.
struct CodePairs {
  uint32_t low[4], high[4];  // high: zero where the format has one plane

  // Moves the rows from the third on to the front, for loops that are not unrolled.
  __device__ void drop_two() {
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      low[i] = low[i + 1];
      high[i] = high[i + 1];
    }
  }
};

class TileReader {
 public:
  __device__ explicit TileReader(const WeightParams& w)
      : w_(w),
        low_log_(w.bits >= 8   ? 3
                 : w.bits >= 4 ? 2
                               : 1),
        high_bits_(w.bits - (1 << low_log_)),
        high_log_(high_bits_ == 2 ? 1 : 0) {}

  __device__ const uint8_t* strip(int64_t index) const { return w_.data + index * w_.strip_bytes; }

  // The pair that begins at k = 16 * cell + 8 * half + 2 * t; cells count from the strip's first.
  __device__ CodePairs pairs(const uint8_t* strip, int cell, int half, int g, int t) const {
    const uint8_t* tile = strip + static_cast<int64_t>(cell / 8) * w_.tile_bytes;
    const int lane = 4 * g + t;
    const int first = cell % 8 * 4 + 2 * half;  // row g's register of the pair, among the tile's 32
    CodePairs codes{};
    load(tile, low_log_, first, lane, codes.low);
    if (high_bits_ > 0)
      load(tile + kStripRows * kTileK / 8 * (1 << low_log_), high_log_, first, lane, codes.high);
    return codes;
  }

  // Code of row g + 8j at k + e.
  __device__ uint32_t code(const CodePairs& codes, int j, int e) const {
    const uint32_t low = field(codes.low[j / 2], 16 * e, j % 2, low_log_);
    if (high_bits_ == 0) return low;
    return low | field(codes.high[j / 2], 16 * e, j % 2, high_log_) << (1 << low_log_);
  }

  __device__ int64_t scale_row(int64_t group) const {
    return group_row(w_, group, w_.scales_offset, w_.scale_row_bytes);
  }
  __device__ int64_t zero_row(int64_t group) const {
    return group_row(w_, group, w_.zeros_offset, w_.zero_row_bytes);
  }

  // Scale of row g + 8j of a strip, in fp32.
  __device__ float scale(const uint8_t* strip, int64_t group, int g, int j) const {
    if (!w_.plain) return stored_scale(strip, group, g, j);
    return load_element(strip + scale_row(group), w_.one_scale ? 0 : kReaderRows * g + j,
                        element_of(w_.scale_dtype));
  }
  // What the formula subtracts from a code (or, for offsets, adds to the product): a number of row g + 8j.
  __device__ float third(const uint8_t* strip, int64_t group, int g, int j) const {
    if (w_.zero_kind == ZeroKind::kNone)
      return is_integer() ? static_cast<float>(1 << (w_.bits - 1)) : 0.0f;
    const uint8_t* row = strip + zero_row(group);
    if (w_.zero_kind == ZeroKind::kInt) return static_cast<float>(row[kReaderRows * g + j]);
    if (!w_.plain) {  // a code in the dtype of the scales, of 4 bits in the same byte
      const uint32_t q = w_.scale_dtype == ScaleDtype::kUInt4
                             ? uint32_t{strip[scale_row(group) + kReaderRows * g + j]} >> 4
                             : uint32_t{row[kReaderRows * g + j]};
      return ptx::mul_rn(scale_code_value(w_.scale_dtype, q),
                         super(w_.super_zeros, strip, group, g, j));
    }
    return load_element(row, kReaderRows * g + j, element_of(w_.scale_dtype));
  }

  __device__ float super(const WeightParams::Table& t, const uint8_t* strip, int64_t group, int g,
                         int j) const {
    const int64_t row = group >> t.shift;
    return load_element(strip + t.offset, row * kStripRows + kReaderRows * g + j,
                        element_of(w_.super_dtype));
  }
  __device__ float stored_scale(const uint8_t* strip, int64_t group, int g, int j) const {
    const uint32_t q = strip[scale_row(group) + (w_.one_scale ? 0 : kReaderRows * g + j)];
    float value =
        scale_code_value(w_.scale_dtype, w_.scale_dtype == ScaleDtype::kUInt4 ? q & 15u : q);
    if (w_.supers.offset != 0) value = ptx::mul_rn(value, super(w_.supers, strip, group, g, j));
    if (w_.scale_dtype == ScaleDtype::kDynamic8)
      value = ptx::add_rn(value, super(w_.super_zeros, strip, group, g, j));
    return value;
  }

  __device__ bool is_integer() const { return cuda::is_integer(w_.format); }

 private:
  // A plane of 2^log bits: its vector `first` / fields of this lane, shifted so that the pair's fields are lowest.
  __device__ void load(const uint8_t* plane, int log, int first, int lane,
                       uint32_t (&to)[4]) const {
    const int fields_log = 4 - log;  // 16 bits hold 2^fields_log
    const int vector = first >> fields_log;
    const int shift = (first & ((1 << fields_log) - 1)) << log;
    const uint4 v = *reinterpret_cast<const uint4*>(plane + vector * kWarpVector + 16 * lane);
    to[0] = v.x >> shift;
    to[1] = v.y >> shift;
    to[2] = v.z >> shift;
    to[3] = v.w >> shift;
  }
  static __device__ uint32_t field(uint32_t word, int element, int row, int log) {
    return word >> (element + (row << log)) & ((1u << (1 << log)) - 1u);
  }

  const WeightParams& w_;
  const int low_log_, high_bits_, high_log_;  // bits of the planes: 2^low_log, 0 or 2^high_log
};

// ---- values of codes ---------------------------------------------------------------------------------------------------

// The value of a code, before its scale: integers as they are. `levels` are those of the weight, where lanes may index them.
__device__ inline float code_value(Format format, uint32_t q, const float* levels) {
  switch (format) {
    case Format::kFp8E4m3:
      return fp8_e4m3_value(q);
    case Format::kFp8E5m2:
      return fp8_e5m2_value(q);
    case Format::kFp4E2m1:
      return fp4_e2m1_value(q);
    case Format::kNf4:
    case Format::kIq4Nl:
    case Format::kBnbFp4:
      return levels[q];
    default:
      return static_cast<float>(q);
  }
}

// The weight, every operation rounded as on the CPU. `third` is TileReader::third().
__device__ inline float weight_value(float value, float scale, float third, ZeroKind kind,
                                     bool is_integer) {
  if (!is_integer) return ptx::mul_rn(value, scale);
  if (kind == ZeroKind::kOffset) return ptx::add_rn(ptx::mul_rn(value, scale), third);
  return ptx::mul_rn(ptx::sub_rn(value, third), scale);
}

}  // namespace lowbit::cuda
