#include "cuda/kernels/hopper_a8_int.cuh"

namespace lowbit::cuda {
LOWBIT_FOR_INT256(LOWBIT_INSTANTIATE_HOPPER_A8_INT)
}  // namespace lowbit::cuda
