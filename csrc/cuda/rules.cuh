// The quantizer's rules (quantize/rules-inl.h) for device code. Files that include this are compiled with -fmad=false.
#pragma once

#include <cstdint>

#include "common/enums.h"
#include "cuda/device.cuh"

#define LOWBIT_HD __host__ __device__
#if defined(__CUDA_ARCH__)
#define LOWBIT_UNROLL _Pragma("unroll")
#elif defined(__CUDACC__)
#define LOWBIT_UNROLL  // nvcc's pass for the host, which never runs them
#else
#define LOWBIT_UNROLL _Pragma("GCC unroll 16")
#endif

namespace lowbit::cuda::rules {
#include "quantize/native-inl.h"
#include "quantize/rules-inl.h"
#include "quantize/search-inl.h"
}  // namespace lowbit::cuda::rules

#undef LOWBIT_HD
#undef LOWBIT_UNROLL
