#include "cuda/kernels/hopper_matrix.cuh"

namespace lowbit::cuda {
LOWBIT_FOR_FP4_BOOKS(LOWBIT_INSTANTIATE_HOPPER_MATRIX)
}  // namespace lowbit::cuda
