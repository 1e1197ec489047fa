#include "cuda/kernels/matrix.cuh"

namespace lowbit::cuda {

LOWBIT_FOR_INT34(LOWBIT_INSTANTIATE_MATRIX)

// The other formats are instantiated in matrix_*.cu.
void launch_matrix(const GemmParams& p, int tile, Stream stream) {
  switch (p.w.format) {
#define LOWBIT_CASE(format) \
  case format:              \
    return run_matrix<format>(p, tile, stream);
    LOWBIT_FOR_EACH_FORMAT(LOWBIT_CASE)
#undef LOWBIT_CASE
    default:
      check_launch(kTiles[tile].name, kNotCompiled);
  }
}

}  // namespace lowbit::cuda
