// The CPU kernels, compiled for avx2.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>

#include "cpu/kernels/job.h"

namespace lowbit {
namespace isa_avx2 {
#define LOWBIT_ISA_NAME "avx2"
#define LOWBIT_PLANES planes_avx2
#include "cpu/kernels/simd_avx2.h"
// clang-format off: V first, then what is written against it
#include "cpu/kernels/codec-inl.h"
#include "cpu/kernels/kernels-inl.h"
// clang-format on
}  // namespace isa_avx2

const IsaKernels& kernels_avx2() { return isa_avx2::kKernels; }

}  // namespace lowbit
#endif
