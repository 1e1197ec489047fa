#include "cuda/kernels/matrix.cuh"

namespace lowbit::cuda {
LOWBIT_FOR_FP4_BOOKS(LOWBIT_INSTANTIATE_MATRIX)
}  // namespace lowbit::cuda
