#include "cuda/kernels/stream.cuh"

namespace lowbit::cuda {

LOWBIT_FOR_INT34(LOWBIT_INSTANTIATE_STREAM)

// The other formats are instantiated in stream_*.cu.
void launch_stream(const GemmParams& p, int tile, Stream stream) {
  switch (p.w.format) {
#define LOWBIT_CASE(format) \
  case format:              \
    return run_stream<format>(p, tile, stream);
    LOWBIT_FOR_EACH_FORMAT(LOWBIT_CASE)
#undef LOWBIT_CASE
    default:
      check_launch(kTiles[tile].name, kNotCompiled);
  }
}

}  // namespace lowbit::cuda
