// Canonical tensors and packed weights as the CPU kernels see them.
#pragma once

#include "cpu/kernels/job.h"
#include "cpu/tensor.h"
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

struct CanonicalTensors {
  Desc desc;
  CanonicalShape shape;
  CanonicalConst data;

  CanonicalTensors(const char* op, const Tensor& packed, const Tensor& scales,
                   const OptionalTensor& zeros, const OptionalTensor& perm, int64_t N, int64_t K,
                   int64_t desc_bits);
};

// The dtype of the tensor beside the scales; only called when there is one.
ScalarType zeros_scalar_type(const Desc& desc);
std::vector<int64_t> scales_shape(const CanonicalShape& shape);

}  // namespace lowbit
