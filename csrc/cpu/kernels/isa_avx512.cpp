// The CPU kernels, compiled for avx512.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>

#include "cpu/kernels/job.h"

namespace lowbit {
namespace isa_avx512 {
#define LOWBIT_ISA_NAME "avx512"
#define LOWBIT_PLANES planes_avx512
#include "cpu/kernels/simd_avx512.h"
// clang-format off: V first, then what is written against it
#include "cpu/kernels/codec-inl.h"
#include "cpu/kernels/kernels-inl.h"
// clang-format on
}  // namespace isa_avx512

const IsaKernels& kernels_avx512() { return isa_avx512::kKernels; }

}  // namespace lowbit
#endif
