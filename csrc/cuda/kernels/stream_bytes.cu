#include "cuda/kernels/stream.cuh"

namespace lowbit::cuda {
LOWBIT_FOR_BYTES(LOWBIT_INSTANTIATE_STREAM)
}  // namespace lowbit::cuda
