// The enumerations that travel inside `desc` and `flags`. Values are append-only: they are stored in artifacts and baked
// into compiled graphs. No code here: kernels compiled for every ISA include it.
#pragma once

#include <cstdint>

namespace lowbit {

enum class Format : int {
  kInt2 = 1,
  kInt3 = 2,
  kInt4 = 3,
  kInt5 = 4,
  kInt6 = 5,
  kInt8 = 6,
  kFp8E4m3 = 7,
  kFp8E5m2 = 8,
  kFp4E2m1 = 9,
  kNf4 = 10,
  kIq4Nl = 11,
  kBnbFp4 = 12,
};

// What the third tensor beside codes and scales holds.
enum class ZeroKind : int {
  kNone = 0,    // integer formats are symmetric: zero = 2^(bits-1)
  kInt = 1,     // uint8 zeros:  w = (q - zero) * scale
  kFloat = 2,   // fractional zeros in the scales' dtype, same formula
  kOffset = 3,  // offsets in the scales' dtype:  w = q * scale + offset
};

// How a scale is stored: a row of the scale table each (formats/scale_table.h).
enum class ScaleDtype : int {
  kFloat32 = 0,
  kFloat16 = 1,
  kBFloat16 = 2,
  kE8m0 = 3,  // a power of two (OCP MX)
  kE4m3 = 4,
  // Codes, which a second scale gives their size:
  kUInt4 = 5,
  kUInt6 = 6,
  kInt6 = 7,      // code - 32
  kInt8 = 8,      // code - 128
  kDynamic8 = 9,  // a code book of 256 numbers
};

enum class Scaling : int {
  kGroup = 0,     // scales[N, ceil(K / group_size)]
  kBlock128 = 1,  // scales[ceil(N / 128), ceil(K / 128)]
  kTwoLevel = 2,  // scales[N, ceil(K / group_size)] * super_scales
  kFlat = 3,      // groups that run across rows: scales[ceil(N * K / group_size)] (* super_scales)
};

enum class Layout : int { kCanonical = 0, kCpuTile16 = 1, kCudaTile64 = 2, kMetalTile4 = 3 };

enum Flags : int64_t { kBatchInvariant = 1 };

// Element types of activations and outputs. Never stored, so free to change.
enum class Element : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kInt8 = 3, kFp8E4m3 = 4 };

}  // namespace lowbit
