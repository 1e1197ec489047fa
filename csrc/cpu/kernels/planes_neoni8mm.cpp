// gemm on int8 planes, compiled for neoni8mm: a file of its own because it takes as long as all the others.
#if defined(__aarch64__)
#include <arm_neon.h>

#include <cstdint>

#include "cpu/kernels/job.h"

namespace lowbit {
namespace planes_neoni8mm_ {
// clang-format off: V first, then what is written against it
#include "cpu/kernels/simd_neon.h"
#include "cpu/kernels/codec-inl.h"
#include "cpu/kernels/epilogue-inl.h"
#include "cpu/kernels/zeros-inl.h"
#include "cpu/kernels/split_rows-inl.h"
#include "cpu/kernels/prefetch-inl.h"
#include "cpu/kernels/gemm_planes-inl.h"
// clang-format on
}  // namespace planes_neoni8mm_

PlaneKernels planes_neoni8mm() { return planes_neoni8mm_::kPlanes; }

}  // namespace lowbit
#endif
