// How rows of x are cut into int8 planes. No torch.
#pragma once

#include <algorithm>

#include "common/enums.h"
#include "common/round_up.h"
#include "cpu/kernels/job.h"

namespace lowbit {

// Digits that hold most elements of a dtype exactly (kernels/split_rows-inl.h).
constexpr int kMostPlanes = 4;
inline int plane_count(Element dtype) { return dtype == Element::kBFloat16 ? 2 : kMostPlanes; }

// Segments end with their group or a whole block: a group that holds all of K need not end with one.
struct PlaneSegments {
  int64_t length, per_group;

  explicit PlaneSegments(int64_t group_size)
      : length(std::min<int64_t>(round_up(group_size, 32), kSplitSegment)),
        per_group(div_up(group_size, length)) {}
};

}  // namespace lowbit
