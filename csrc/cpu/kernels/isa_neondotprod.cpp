// neon's kernels, and integer products on dot products of signed bytes.
#if defined(__aarch64__)
#include <arm_neon.h>

#include <cstdint>

#include "cpu/kernels/job.h"

namespace lowbit {
namespace isa_neondotprod {
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
  table.isa = "neondotprod";
  table.gemm_dot = gemm_dot;
  table.planes = planes_neondotprod();
  return table;
}
}  // namespace isa_neondotprod

const IsaKernels& kernels_neondotprod() {
  static const IsaKernels table = isa_neondotprod::extended();
  return table;
}

}  // namespace lowbit
#endif
