#include "cuda/kernels/stream.cuh"

namespace lowbit::cuda {
LOWBIT_FOR_FP4_BOOKS(LOWBIT_INSTANTIATE_STREAM)
}  // namespace lowbit::cuda
