// The CPU kernels, compiled for avx512vnni.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>

#include "cpu/kernels/job.h"

namespace lowbit {
namespace isa_avx512vnni {
#define LOWBIT_ISA_NAME "avx512vnni"
#define LOWBIT_PLANES planes_avx512vnni
#include "cpu/kernels/simd_avx512.h"
// clang-format off: V first, then what is written against it
#include "cpu/kernels/codec-inl.h"
#include "cpu/kernels/kernels-inl.h"
// clang-format on
}  // namespace isa_avx512vnni

const IsaKernels& kernels_avx512vnni() { return isa_avx512vnni::kKernels; }

}  // namespace lowbit
#endif
