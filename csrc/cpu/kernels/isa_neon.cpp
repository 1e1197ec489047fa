// The CPU kernels, compiled for neon.
#if defined(__aarch64__)
#include <arm_neon.h>

#include <cstdint>

#include "cpu/kernels/job.h"

namespace lowbit {
namespace isa_neon {
#define LOWBIT_ISA_NAME "neon"
#include "cpu/kernels/simd_neon.h"
// clang-format off: V first, then what is written against it
#include "cpu/kernels/codec-inl.h"
#include "cpu/kernels/kernels-inl.h"
// clang-format on
}  // namespace isa_neon

const IsaKernels& kernels_neon() { return isa_neon::kKernels; }

}  // namespace lowbit
#endif
