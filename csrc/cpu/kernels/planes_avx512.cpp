// gemm on int8 planes, compiled for avx512: a file of its own because it takes as long as all the others.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>

#include "cpu/kernels/job.h"

namespace lowbit {
namespace planes_avx512_ {
// clang-format off: V first, then what is written against it
#include "cpu/kernels/simd_avx512.h"
#include "cpu/kernels/codec-inl.h"
#include "cpu/kernels/epilogue-inl.h"
#include "cpu/kernels/zeros-inl.h"
#include "cpu/kernels/split_rows-inl.h"
#include "cpu/kernels/prefetch-inl.h"
#include "cpu/kernels/gemm_planes-inl.h"
// clang-format on
}  // namespace planes_avx512_

PlaneKernels planes_avx512() { return planes_avx512_::kPlanes; }

}  // namespace lowbit
#endif
