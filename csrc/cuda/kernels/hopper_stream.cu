#include "cuda/kernels/hopper_stream.cuh"

namespace lowbit::cuda {

LOWBIT_FOR_INT34(LOWBIT_INSTANTIATE_HOPPER_STREAM)

// The other formats are instantiated in hopper_stream_*.cu.
void launch_hopper_stream(const GemmParams& p, int tile, Stream stream) {
  with_format(kTiles[tile].name, p.w.format,
              [&](auto format) { run_hopper_stream<format()>(p, tile, stream); });
}

}  // namespace lowbit::cuda
