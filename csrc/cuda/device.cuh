// What device code starts from: the CUDA language under nvcc, its emulation on the CPU otherwise (tests/emulator).
//
// Kernel files include this, ptx.cuh, headers of csrc/{common/enums.h, packing, cuda} and <cstdint>: no torch, no CUDA
// library headers. The emulator supplies __global__, __device__, __host__, __launch_bounds__, __grid_constant__, threadIdx, blockIdx,
// blockDim, gridDim, uint2, uint4, float2, float4 and make_*; dynamic shared memory comes from dynamic_shared().
#pragma once

#include <cstdint>
#include <type_traits>

#if defined(LOWBIT_EMULATOR)
#include "emulator/language.h"
#else

namespace lowbit::cuda {

// The block's dynamic shared memory, aligned to 1024 bytes: as the patterns of swizzled tiles are.
__device__ inline uint8_t* dynamic_shared() {
  extern __shared__ __align__(1024) uint8_t lowbit_dynamic_shared[];
  return lowbit_dynamic_shared;
}

}  // namespace lowbit::cuda

#endif

namespace lowbit::cuda {

// Every comparison that keeps an access inside its array is written with this, so that the mutation tests can find and
// remove them one at a time.
template <class Index, class Size>
__host__ __device__ constexpr bool inside(Index index, Size size) {
  return index < size;
}

// Calls run(std::integral_constant<int, index>{}), 0 <= index < kCount, by a branch. For arrays that are registers, in loops
// whose bodies are long: only what names a register is there kCount times.
template <int kCount, int kIndex = 0, class Run>
__device__ inline void at_index(int index, Run run) {
  if constexpr (kIndex + 1 < kCount) {
    if (index != kIndex) return at_index<kCount, kIndex + 1>(index, run);
  }
  run(std::integral_constant<int, kIndex>{});
}

}  // namespace lowbit::cuda
