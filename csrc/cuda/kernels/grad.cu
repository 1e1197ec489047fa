#include "cuda/kernels/grad.cuh"

namespace lowbit::cuda {

LOWBIT_FOR_INT34(LOWBIT_INSTANTIATE_GRAD)
LOWBIT_FOR_INT256(LOWBIT_INSTANTIATE_GRAD)

// The other formats are instantiated in grad_codes.cu.
void launch_grad(const GemmParams& p, int, Stream stream) {
  switch (p.w.format) {
#define LOWBIT_CASE(format) \
  case format:              \
    return run_grad<format>(p, stream);
    LOWBIT_FOR_EACH_FORMAT(LOWBIT_CASE)
#undef LOWBIT_CASE
    default:
      check_launch(kTiles[kGradTile].name, kNotCompiled);
  }
}

}  // namespace lowbit::cuda
