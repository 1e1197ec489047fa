#include "cuda/kernels/matrix.cuh"

namespace lowbit::cuda {
LOWBIT_FOR_BYTES(LOWBIT_INSTANTIATE_MATRIX)
}  // namespace lowbit::cuda
