#include "cuda/kernels/matrix.cuh"

namespace lowbit::cuda {

LOWBIT_FOR_INT34(LOWBIT_INSTANTIATE_MATRIX)

// The other formats are instantiated in matrix_*.cu.
void launch_matrix(const GemmParams& p, int tile, Stream stream) {
  with_format(kTiles[tile].name, p.w.format,
              [&](auto format) { run_matrix<format()>(p, tile, stream); });
}

}  // namespace lowbit::cuda
