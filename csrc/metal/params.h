// What shaders are told, shared by host and shaders: plain structs of 32-bit fields, which travel as 64-bit words because an
// argument of torch's interface to Metal is a tensor or an int64. Field 2i is the lower half of word i. No upload, no buffer
// whose lifetime anybody must think of: a word is part of the command.
//
// Words stand in buffers 0, 1, ..., tensors behind them.
#pragma once

#include <cstdint>

#include "common/enums.h"

namespace lowbit {
namespace metal_params {

// ---- GEMM --------------------------------------------------------------------------------------------------------------

// A packed weight (packing/metal_tile4.h), activations and results.
struct Gemm {
  int32_t M, N;
  int32_t K, chunks;                // chunks of 8 k in a strip
  int32_t group_size, group_shift;  // its logarithm, or -1 where it is no power of two
  uint32_t strip_bytes, high_plane;
  uint32_t scales_offset, zeros_offset;
  int32_t x_stride, y_stride;                  // elements
  int32_t kinds, x_groups;                     // see below; scales per row of 8-bit activations
  int32_t strips, split;                       // SIMD-groups that share a strip's K (stream)
  uint32_t perm_low, perm_high;                // bytes from the start of the weight
  uint32_t supers_offset, super_zeros_offset;  // of the second level of scales
  int32_t super_shift,
      super_dtype;  // row g >> super_shift is that of group g; 31: there is no second level
};
#define LOWBIT_GEMM_WORDS 11

// ---- everything else ---------------------------------------------------------------------------------------------------

// Five words each: eight ints, then two unsigned ones.
#define LOWBIT_PARAMS_WORDS 5

// Canonical tensors (packing/canonical.h): dequantize, pack, unpack.
struct Canonical {
  int32_t N, K;
  int32_t group_size, groups;
  int32_t row_bytes, kinds;
  int32_t tables, super_tables;  // what make_table says of scales and zeros; of their super scales
  uint32_t strip_bytes, high_plane;
};

// How the entries of a tensor beside the codes belong to groups: GroupTable of packing/canonical.h.
enum TableRows : int32_t { kOwnRows, kBlockRows, kSharedRows, kFlatRows };

//   bit   0      2      8       13
//         | rows | bits | shift | dtype (of super scales)
constexpr int32_t make_table(int32_t rows, int32_t bits, int32_t shift, ScaleDtype dtype) {
  return rows | bits << 2 | shift << 8 | (static_cast<int32_t>(dtype) & 7) << 13;
}

// pack, unpack: one such tensor, and where a strip has its entries.
struct Table {
  int32_t N, groups;
  int32_t rows, bits;  // a TableRows; of an entry in the tensor
  int32_t bytes,
      count;  // of an entry in a strip, 0: the upper half of a scale's byte; entries of a row
  int32_t shift, fine_shift;
  uint32_t strip_bytes, offset;
};

// quantize: canonical tensors from a weight.
struct Quantize {
  int32_t N, K;
  int32_t group_size, groups;
  int32_t row_bytes, kinds;
  int32_t stride, threads;  // elements between rows of the weight; of a threadgroup
  uint32_t code_max,
      first;  // FormatInfo::max, its bits; the row (or block of 128) that the command starts with
};

// Rows of activations. quantize_activation: group_size and groups; what makes rows ready for a GEMM: perm's place in the
// weight, in bytes.
struct Rows {
  int32_t M, K;
  int32_t stride, to_stride;  // elements
  int32_t group_size, groups;
  int32_t kinds, spare;
  uint32_t perm_low, perm_high;
};

// ---- kinds: small enumerations in one int ------------------------------------------------------------------------------

//   bit   0             4            8            12           16           20           24
//         | scale dtype | zero kind  | x type     | y type     | bias type  | format     | flags
// (Enumerations, because variables of a shader's namespaces have to be in the constant address space.)
enum KindFlags : int32_t {
  kOneScale = 1 << 24,  // 128x128 blocks: one scale per group of a strip
  kHasBias = 1 << 25,
  kHasPerm = 1 << 26,
  kHasXScales = 1 << 27,
  kVectors = 1 << 28,  // rows of x start at multiples of 16 bytes
  kHasXZeros = 1 << 29,
  // quantize
  kHasImportance = 1 << 25,
  kHasSuper = 1 << 26,  // a scale of all scales
  // quantize_activation
  kSymmetric = 1 << 24,
  kStatic = 1 << 25,
  kStaticZero = 1 << 26,
  kPreScale = 1 << 30,
};

enum : int32_t { kNoSupers = 31 };

constexpr int32_t make_kinds(ScaleDtype scale, ZeroKind zero, Element x, Element y, Element bias,
                             Format format) {
  return static_cast<int32_t>(scale) | static_cast<int32_t>(zero) << 4 |
         static_cast<int32_t>(x) << 8 | static_cast<int32_t>(y) << 12 |
         static_cast<int32_t>(bias) << 16 | static_cast<int32_t>(format) << 20;
}
constexpr ScaleDtype scale_dtype_of(int32_t kinds) { return static_cast<ScaleDtype>(kinds & 15); }
constexpr ZeroKind zero_kind_of(int32_t kinds) { return static_cast<ZeroKind>(kinds >> 4 & 15); }
constexpr Element x_type_of(int32_t kinds) { return static_cast<Element>(kinds >> 8 & 15); }
constexpr Element y_type_of(int32_t kinds) { return static_cast<Element>(kinds >> 12 & 15); }
constexpr Element bias_type_of(int32_t kinds) { return static_cast<Element>(kinds >> 16 & 15); }
constexpr Format format_of(int32_t kinds) { return static_cast<Format>(kinds >> 20 & 15); }

}  // namespace metal_params
}  // namespace lowbit
