#include "formats/format_table.h"

#include "formats/codebooks.h"

namespace lowbit {

const std::vector<FormatInfo>& format_table() {
  // Integers: absmax maps to half a step beyond the largest positive code, so that both ends of the range are used
  // alike (absmax / 7.5 for four bits). So does that of iq4_nl, whose ends are -127 and 113.
  static const std::vector<FormatInfo> table = {
      {Format::kInt2, "int2", 2, true, 1.5f, nullptr, true},
      {Format::kInt3, "int3", 3, true, 3.5f, nullptr, true},
      {Format::kInt4, "int4", 4, true, 7.5f, nullptr, true},
      {Format::kInt5, "int5", 5, true, 15.5f, nullptr, true},
      {Format::kInt6, "int6", 6, true, 31.5f, nullptr, true},
      {Format::kInt8, "int8", 8, true, 127.5f, nullptr, true},
      {Format::kFp8E4m3, "fp8_e4m3", 8, false, 448.0f, fp8_e4m3_code().data(), true},
      {Format::kFp8E5m2, "fp8_e5m2", 8, false, 57344.0f, fp8_e5m2_code().data(), true},
      {Format::kFp4E2m1, "fp4_e2m1", 4, false, 6.0f, kFp4Code.data(), true},
      {Format::kNf4, "nf4", 4, false, 1.0f, kNf4Code.data(), false},
      {Format::kIq4Nl, "iq4_nl", 4, false, 120.0f, kIq4NlCode.data(), true},
      {Format::kBnbFp4, "bnb_fp4", 4, false, 1.0f, kBnbFp4Code.data(), false},
  };
  return table;
}

const FormatInfo& format_info(Format format) {
  const size_t row = static_cast<size_t>(format) - 1;  // ids start at 1 and are dense
  LOWBIT_CHECK(row < format_table().size(), "format=", static_cast<int>(format),
               " is not in the format table (1..", format_table().size(), ")");
  return format_table()[row];
}

}  // namespace lowbit
