// `desc`: what a packed weight is, in one int64 that travels through every op.
//
//   bit   0        8       12       16       20      24       32                  56
//         | format | zeros | scales | scaling | perm | layout |    group_size     | 0
//
// group_size 0 stands for -1 (one group spans all of K).
#pragma once

#include <cstdint>
#include <string>

#include "common/check.h"
#include "common/enums.h"

namespace lowbit {

struct Desc {
  Format format = Format::kInt4;
  ZeroKind zero_kind = ZeroKind::kNone;
  ScaleDtype scale_dtype = ScaleDtype::kFloat32;
  Scaling scaling = Scaling::kGroup;
  bool has_perm = false;
  Layout layout = Layout::kCanonical;
  int64_t group_size = -1;
};

// Throws Error with the offending value when a field or a combination is not one that exists.
LOWBIT_API int64_t encode_desc(const Desc& desc);
LOWBIT_API Desc decode_desc(int64_t desc);

LOWBIT_API const char* name_of(ZeroKind kind);
LOWBIT_API const char* name_of(ScaleDtype dtype);
LOWBIT_API const char* name_of(Scaling scaling);
LOWBIT_API const char* name_of(Layout layout);
LOWBIT_API std::string to_string(const Desc& desc);

}  // namespace lowbit
