#include "formats/scale_table.h"

#include <cstring>

#include "common/check.h"
#include "common/half.h"
#include "formats/codebooks.h"

namespace lowbit {

const std::vector<ScaleInfo>& scale_table() {
  constexpr bool kAlone = false, kNeedsSuper = true;
  static const std::vector<ScaleInfo> table = {
      {ScaleDtype::kFloat32, "float32", 32, kAlone, nullptr},
      {ScaleDtype::kFloat16, "float16", 16, kAlone, nullptr},
      {ScaleDtype::kBFloat16, "bfloat16", 16, kAlone, nullptr},
      {ScaleDtype::kE8m0, "e8m0", 8, kAlone, e8m0_code().data()},
      {ScaleDtype::kE4m3, "e4m3", 8, kAlone, fp8_e4m3_code().data()},
      {ScaleDtype::kUInt4, "uint4", 4, kNeedsSuper, integer_code<16, 0>()},
      {ScaleDtype::kUInt6, "uint6", 6, kNeedsSuper, integer_code<64, 0>()},
      {ScaleDtype::kInt6, "int6", 6, kNeedsSuper, integer_code<64, -32>()},
      {ScaleDtype::kInt8, "int8", 8, kNeedsSuper, integer_code<256, -128>()},
      {ScaleDtype::kDynamic8, "dynamic8", 8, kNeedsSuper, dynamic8_code().data()},
  };
  return table;
}

const ScaleInfo& scale_info(ScaleDtype dtype) {
  const size_t row = static_cast<size_t>(dtype);  // ids start at 0 and are dense
  LOWBIT_CHECK(row < scale_table().size(), "scale_dtype=", static_cast<int>(dtype),
               " is not one of 0..", scale_table().size() - 1);
  return scale_table()[row];
}

float scale_value(ScaleDtype dtype, const uint8_t* stored) {
  if (const float* code = scale_info(dtype).code) return code[*stored];
  if (dtype == ScaleDtype::kFloat32) {
    float value;
    std::memcpy(&value, stored, 4);
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, stored, 2);
  return dtype == ScaleDtype::kFloat16 ? to_float(Half{bits}) : to_float(BFloat16{bits});
}

}  // namespace lowbit
