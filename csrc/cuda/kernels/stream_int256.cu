#include "cuda/kernels/stream.cuh"

namespace lowbit::cuda {
LOWBIT_FOR_INT256(LOWBIT_INSTANTIATE_STREAM)
}  // namespace lowbit::cuda
