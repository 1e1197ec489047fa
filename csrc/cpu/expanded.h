// Kernels read scales that are floats, [groups][16] in each strip. Of any other kind they get the same view of the strip but
// for its scales and offsets, which stand beside it in fp32: some strips at a time, so that these stay in cache.
#pragma once

#include "cpu/kernels/job.h"

namespace lowbit {

using GemmKernel = void (*)(const GemmJob& job, int64_t strip_begin, int64_t strip_end);

// kernel(job, begin, end), whatever the scales.
void run_on_floats(const IsaKernels& isa, const GemmJob& job, int64_t begin, int64_t end,
                   GemmKernel kernel);

}  // namespace lowbit
