#include "cuda/kernels/hopper_matrix.cuh"

namespace lowbit::cuda {

LOWBIT_FOR_INT34(LOWBIT_INSTANTIATE_HOPPER_MATRIX)

// The other formats are instantiated in hopper_matrix_*.cu.
void launch_hopper_matrix(const GemmParams& p, int tile, Stream stream) {
  with_format(kTiles[tile].name, p.w.format,
              [&](auto format) { run_hopper_matrix<format()>(p, tile, stream); });
}

}  // namespace lowbit::cuda
