// wgmma's operand in shared memory, as tensor copies leave it.
#pragma once

#include <cstdint>

#include "cuda/ptx.cuh"
#include "cuda/ptx_wgmma.cuh"

namespace lowbit::cuda {

// B in rows of 128 bytes, swizzled in patterns of eight rows that begin at multiples of 1024 bytes, as tensor copies write
// them (tensor_map.h): the matrix descriptor (9.7.15.5.1.2.2). `first` is the first row's address, plus 32 bytes for every
// kK within the row.
__device__ inline uint64_t wgmma_swizzled(const void* first) {
  constexpr uint64_t pattern = 1024 >> 4, swizzle_128 = 1;
  // The leading offset is not used where a row of the pattern is all there is.
  return (ptx::shared_address(first) & 0x3ffffu) >> 4 | uint64_t{1} << 16 | pattern << 32 |
         swizzle_128 << 62;
}

}  // namespace lowbit::cuda
