// Shapes of the canonical tensors: what checkpoints and state_dict hold.
#pragma once

#include <cstdint>

#include "common/desc.h"
#include "formats/format_table.h"
#include "packing/bitstream.h"

namespace lowbit {

struct CanonicalShape {
  int64_t N, K;
  int bits;
  int64_t group_size;  // in elements of K, never -1
  int64_t groups;      // G = ceil(K / group_size)
  int64_t row_bytes;   // packed[N, row_bytes]
  int64_t scale_rows;  // N, or ceil(N / 128) with block scaling
  int scale_bytes;     // per scale
  int zero_bytes;      // per zero or offset; 0 when there are none
  bool has_perm;

  int64_t group_of(int64_t k) const { return k / group_size; }
  int64_t scale_row(int64_t n) const { return scale_rows == N ? n : n / 128; }
};

// Throws Error when N, K and the group size do not fit together.
LOWBIT_API CanonicalShape canonical_shape(int64_t N, int64_t K, const Desc& desc);

// Raw pointers to canonical tensors of such a shape; absent ones are null.
struct CanonicalConst {
  const uint8_t* packed;
  const uint8_t* scales;
  const uint8_t* zeros;
  const int32_t* perm;
};
struct CanonicalMutable {
  uint8_t* packed;
  uint8_t* scales;
  uint8_t* zeros;
  int32_t* perm;
};

}  // namespace lowbit
