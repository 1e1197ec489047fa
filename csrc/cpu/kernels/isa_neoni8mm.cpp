// neon's kernels, and integer products on dot and matrix products of bytes.
#if defined(__aarch64__)
#include <arm_neon.h>

#include <cstdint>

#include "cpu/kernels/job.h"

namespace lowbit {
namespace isa_neoni8mm {
// clang-format off: V first, then what is written against it
#include "cpu/kernels/simd_neon.h"
#include "cpu/kernels/codec-inl.h"
#include "cpu/kernels/epilogue-inl.h"
#include "cpu/kernels/zeros-inl.h"
#include "cpu/kernels/segment-inl.h"
#include "cpu/kernels/prefetch-inl.h"
#include "cpu/kernels/gemm_dot-inl.h"
// clang-format on

static IsaKernels extended() {
  IsaKernels table = kernels_neon();
  table.isa = "neoni8mm";
  table.gemm_dot = gemm_dot;
  table.planes = planes_neoni8mm();
  return table;
}
}  // namespace isa_neoni8mm

const IsaKernels& kernels_neoni8mm() {
  static const IsaKernels table = isa_neoni8mm::extended();
  return table;
}

}  // namespace lowbit
#endif
