// `desc`: what a packed weight is, in one int64 that travels through every op.
//
//   bit   0        8       12       16       20     21      23  24       32                  56      60
//         | format | zeros | scales | scaling | perm | supers | 0 | layout |    group_size     | every |  0
//
// group_size 0 stands for -1 (one group spans all of K). `supers` and `every` are the dtype of the second level of scales and
// how many scales share one: 2^(every - 1), or all of them for 15; 0 where there is no second level.
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
  ScaleDtype super_dtype = ScaleDtype::kFloat32;  // one of the three float dtypes
  int64_t super_groups = 0;  // scales that share a super scale: a power of two, -1 for all, 0: none

  bool two_levels() const { return super_groups != 0; }
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
