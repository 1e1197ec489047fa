// The last rows of the kernel table: they take every format, block size and group size, in plain C++.
#pragma once

#include "cpu/kernels/job.h"

namespace lowbit {

void gemm_general_f32(const GemmJob& job, int64_t strip_begin, int64_t strip_end);
void gemm_general_i8(const GemmJob& job, int64_t strip_begin, int64_t strip_end);
void grad_input_general(const GradJob& job, int64_t piece_begin, int64_t piece_end);

// Row n of a packed weight in the form that dequantize_row takes: its codes, one per byte [K_padded], and the scale and the
// zero (or offset) of each of its groups.
void row_codes(const WeightView& w, int64_t n, uint8_t* codes);
void row_groups(const WeightView& w, int64_t n, float* scales, float* zeros);

}  // namespace lowbit
