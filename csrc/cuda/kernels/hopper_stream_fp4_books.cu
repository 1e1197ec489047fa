#include "cuda/kernels/hopper_stream.cuh"

namespace lowbit::cuda {
LOWBIT_FOR_FP4_BOOKS(LOWBIT_INSTANTIATE_HOPPER_STREAM)
}  // namespace lowbit::cuda
