// Rows of x split into int8 planes: the buffers that gemm_planes reads, filled.
#pragma once

#include "cpu/kernels/job.h"
#include "cpu/scratch.h"
#include "packing/cpu_tile16.h"

namespace lowbit {

// Scratch for all buffers of a chunk of rows, fp32 rows included.
int64_t split_scratch_bytes(int64_t M, const CpuTile16& tile);

class SplitRows {
 public:
  SplitRows(const WeightView& w, Element dtype, int64_t M, Scratch& scratch);

  // Rows [m0, m0 + x.M) of the source, on as many threads as are worth it.
  void prepare(const IsaKernels& isa, const RowSource& from, int64_t m0, Activations& x);

 private:
  SplitJob job_;
  float* values_;
};

}  // namespace lowbit
