// The CPU kernels, compiled for portable.
#include <cstdint>

#include "cpu/kernels/job.h"

namespace lowbit {
namespace isa_portable {
#define LOWBIT_ISA_NAME "portable"
#include "cpu/kernels/simd_portable.h"
// clang-format off: V first, then what is written against it
#include "cpu/kernels/codec-inl.h"
#include "cpu/kernels/kernels-inl.h"
// clang-format on
}  // namespace isa_portable

const IsaKernels& kernels_portable() { return isa_portable::kKernels; }

}  // namespace lowbit
