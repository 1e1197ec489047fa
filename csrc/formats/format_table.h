// What an element is: one row per format. Everything that must know how wide a code is or what it means reads this
// table: packing, quantizer, kernels' selection, tests, benches and the docs' support matrix.
#pragma once

#include <cstdint>
#include <vector>

#include "common/desc.h"
#include "common/round_up.h"

namespace lowbit {

struct FormatInfo {
  Format format;
  const char* name;
  int bits;
  bool is_integer;  // w = (q - zero) * scale; otherwise w = code[q] * scale
  float max;  // the magnitude that round-to-nearest maps a group's absmax to (scale = absmax / max)
  const float* code;  // [2^bits] decoded values; nullptr for integers
  bool exact16;       // fp16 and bf16 hold what a code stands for: its value, or q - zero
};

const std::vector<FormatInfo>& format_table();

// Throws Error when there is no such row.
LOWBIT_API const FormatInfo& format_info(Format format);

}  // namespace lowbit
