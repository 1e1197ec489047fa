// From a packed weight's geometry to what kernels read. No torch.
#pragma once

#include "cpu/kernels/job.h"
#include "packing/cpu_tile16.h"

namespace lowbit {

// The view points to `tile` and `data`, which must outlive it.
LOWBIT_API WeightView weight_view(const CpuTile16& tile, const Desc& desc, const uint8_t* data);

}  // namespace lowbit
