// Memory of packed weights.
#pragma once

#include "common/tensor.h"

namespace lowbit {

// Bytes of one huge page on the CPUs this is built for.
inline constexpr int64_t kHugePage = int64_t{2} << 20;

// Uninitialised, uint8 [bytes]. Large ones start on a huge page and, on Linux, ask the kernel for such pages: with pages of
// 4 KiB one core reads half as fast, because hardware prefetching ends with a page and each needs an address translated.
Tensor empty_weight(int64_t bytes);

}  // namespace lowbit
