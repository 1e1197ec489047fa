#include "cuda/kernels/grad.cuh"

namespace lowbit::cuda {
LOWBIT_FOR_BYTES(LOWBIT_INSTANTIATE_GRAD)
LOWBIT_FOR_FP4_BOOKS(LOWBIT_INSTANTIATE_GRAD)
}  // namespace lowbit::cuda
