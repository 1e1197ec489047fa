#include "cuda/kernels/matrix.cuh"

namespace lowbit::cuda {
LOWBIT_FOR_INT256(LOWBIT_INSTANTIATE_MATRIX)
}  // namespace lowbit::cuda
