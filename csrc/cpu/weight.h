// Packed weights as the CPU kernels see them.
#pragma once

#include "common/tensor.h"
#include "cpu/kernels/job.h"
#include "packing/cpu_tile16.h"

namespace lowbit {

// A packed weight: geometry and view. The view points into the geometry, so the two stay together and are not copied.
struct PackedWeight {
  Desc desc;
  CpuTile16 tile;
  WeightView view;
  const int32_t* perm;  // or null

  // Checks `w` against (N, K, desc) and throws with both sides' values. Cost: some arithmetic, no allocation.
  PackedWeight(const char* op, const Tensor& w, int64_t N, int64_t K, int64_t desc_bits);
  PackedWeight(const PackedWeight&) = delete;
  PackedWeight& operator=(const PackedWeight&) = delete;
};

}  // namespace lowbit
