#include "cuda/kernels/stream.cuh"

namespace lowbit::cuda {

LOWBIT_FOR_INT34(LOWBIT_INSTANTIATE_STREAM)

// The other formats are instantiated in stream_*.cu.
void launch_stream(const GemmParams& p, int tile, Stream stream) {
  with_format(kTiles[tile].name, p.w.format,
              [&](auto format) { run_stream<format()>(p, tile, stream); });
}

}  // namespace lowbit::cuda
