#include "cuda/kernels/hopper_stream.cuh"

namespace lowbit::cuda {
LOWBIT_FOR_INT256(LOWBIT_INSTANTIATE_HOPPER_STREAM)
}  // namespace lowbit::cuda
