// gemm on int8 planes, compiled for avx2: a file of its own because it takes as long as all the others.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>

#include "cpu/kernels/job.h"

namespace lowbit {
namespace planes_avx2_ {
// clang-format off: V first, then what is written against it
#include "cpu/kernels/simd_avx2.h"
#include "cpu/kernels/codec-inl.h"
#include "cpu/kernels/epilogue-inl.h"
#include "cpu/kernels/zeros-inl.h"
#include "cpu/kernels/split_rows-inl.h"
#include "cpu/kernels/prefetch-inl.h"
#include "cpu/kernels/gemm_planes-inl.h"
// clang-format on
}  // namespace planes_avx2_

PlaneKernels planes_avx2() { return planes_avx2_::kPlanes; }

}  // namespace lowbit
#endif
