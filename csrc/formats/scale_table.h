// What a scale is stored as: one row per dtype. Like the format table, the one place that knows.
#pragma once

#include <cstdint>
#include <vector>

#include "common/check.h"
#include "common/enums.h"

namespace lowbit {

struct ScaleInfo {
  ScaleDtype dtype;
  const char* name;
  int bits;           // of one scale in the canonical tensor: 4 and 6 as a bit stream, like codes
  bool needs_super;   // a code that means nothing without a second scale
  const float* code;  // [2^bits] decoded values; nullptr for float32, float16, bfloat16

  bool is_float() const { return code == nullptr; }
  bool is_integer() const { return needs_super && dtype != ScaleDtype::kDynamic8; }
  int bytes() const { return (bits + 7) / 8; }  // in a kernel layout
};

const std::vector<ScaleInfo>& scale_table();

// Throws Error when there is no such row.
LOWBIT_API const ScaleInfo& scale_info(ScaleDtype dtype);

// The value of a scale as a kernel layout holds it, in scale_info(dtype).bytes() bytes.
float scale_value(ScaleDtype dtype, const uint8_t* stored);

}  // namespace lowbit
