#include "cuda/kernels/grad.cuh"

namespace lowbit::cuda {

LOWBIT_FOR_INT34(LOWBIT_INSTANTIATE_GRAD)
LOWBIT_FOR_INT256(LOWBIT_INSTANTIATE_GRAD)

// The other formats are instantiated in grad_codes.cu.
void launch_grad(const GemmParams& p, int, Stream stream) {
  with_format(kTiles[kGradTile].name, p.w.format,
              [&](auto format) { run_grad<format()>(p, stream); });
}

}  // namespace lowbit::cuda
