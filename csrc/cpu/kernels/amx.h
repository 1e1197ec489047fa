// What AMX adds to the kernels of an ISA: a table of functions beside IsaKernels. Plain data, as job.h is.
#pragma once

#include <cstdint>

#include "cpu/kernels/job.h"

namespace lowbit {

// Rows of x that one call of a tile kernel may be given, divided by the number of planes: it sizes their stack buffers.
enum : int64_t { kTilePassRows = 256 };

// One tile of x: 16 rows of 64 bytes.
enum : int64_t { kTileBytes = 1024 };

// Every function handles the whole range it is given on the calling thread, allocates nothing and throws nothing. Those
// that multiply load a tile configuration when they start and release it before they return.
struct AmxKernels {
  // The weight's codes, exact in bf16, times one to three bf16 planes of x; scales are applied to fp32 sums.
  void (*gemm_codes)(const GemmJob& job, int64_t strip_begin, int64_t strip_end);
  // Weights rounded once to bf16, times bf16 x.
  void (*gemm_weights)(const GemmJob& job, int64_t strip_begin, int64_t strip_end);
  // Integer codes times int8 x, exact in int32.
  void (*gemm_i8)(const GemmJob& job, int64_t strip_begin, int64_t strip_end);
  // Rows [row, row + rows) of `from`, at most 16, as tiles of bf16: planes x (K_padded / 32) of them, one behind the
  // other. x is the exact sum of its planes. Missing rows are zeros.
  void (*pack_floats)(const RowSource& from, int64_t row, int64_t rows, int planes,
                      int64_t K_padded, uint8_t* tiles);
  // The same for int8 codes [rows, x.stride], padded with zeros to 64 k at the end of every segment of w.
  void (*pack_codes)(const WeightView& w, const Activations& x, int64_t row, int64_t rows,
                     uint8_t* tiles);
};

#if defined(__x86_64__)
const AmxKernels& amx_kernels();
#endif

}  // namespace lowbit
