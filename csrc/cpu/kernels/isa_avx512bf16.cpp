// avx512vnni's kernels, and those on bf16 dot products.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>

#include "cpu/kernels/job.h"

namespace lowbit {
namespace isa_avx512bf16 {
// clang-format off: V first, then what is written against it
#include "cpu/kernels/simd_avx512.h"
#include "cpu/kernels/codec-inl.h"
#include "cpu/kernels/decode_bf16-inl.h"
#include "cpu/kernels/epilogue-inl.h"
#include "cpu/kernels/gemm_panel_bf16-inl.h"
#include "cpu/kernels/pairs-inl.h"
#include "cpu/kernels/prefetch-inl.h"
#include "cpu/kernels/gemm_stream_bf16-inl.h"
// clang-format on

static IsaKernels extended() {
  IsaKernels table = kernels_avx512vnni();
  table.isa = "avx512bf16";
  table.gemm_panel_bf16 = gemm_panel_bf16;
  table.gemm_stream_bf16 = gemm_stream_bf16;
  return table;
}
}  // namespace isa_avx512bf16

const IsaKernels& kernels_avx512bf16() {
  static const IsaKernels table = isa_avx512bf16::extended();
  return table;
}

}  // namespace lowbit
#endif
