// What `_C` shows of the library: formats, enumerations, shapes, build. Plain data across the library's boundary.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "common/check.h"

namespace lowbit {

struct FormatRow {
  int id;
  std::string name;
  int bits;
  bool is_integer;
  double max;
  std::vector<double> code;  // empty for integers
};
LOWBIT_API std::vector<FormatRow> list_formats();

struct ScaleRow {
  int id;
  std::string name;
  int bits;
  bool needs_super;
  std::vector<double> code;  // empty for float32, float16, bfloat16
};
LOWBIT_API std::vector<ScaleRow> list_scales();

using EnumValues = std::vector<std::pair<std::string, int64_t>>;
LOWBIT_API std::vector<std::pair<std::string, EnumValues>> list_enums();

struct CanonicalShapes {
  std::vector<int64_t> packed, scales, zeros, super_scales, super_zeros,
      perm;  // empty where absent
};
LOWBIT_API CanonicalShapes canonical_shapes(int64_t N, int64_t K, int64_t desc);

// Bytes of a weight in the kernel layout that desc names.
LOWBIT_API int64_t packed_size(int64_t N, int64_t K, int64_t desc);

LOWBIT_API int64_t preferred_layout(const std::string& device_type, int64_t desc);

LOWBIT_API std::vector<std::pair<std::string, std::string>> build_info();

}  // namespace lowbit
