#include "cuda/kernels/a8_fp8.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kFp8M16 = tile_index("a8_fp8_m16"), kFp8M64 = tile_index("a8_fp8_m64");

template <Format kFormat>
void run(const GemmParams& p, int tile, Stream stream) {
  if (tile == kFp8M16) {
    start_a8<Fp8Math, kFormat, kFp8M16>(p, stream);
  } else {
    start_a8<Fp8Math, kFormat, kFp8M64>(p, stream);
  }
}

}  // namespace

void launch_a8_fp8(const GemmParams& p, int tile, Stream stream) {
  switch (p.w.format) {
    case Format::kFp8E4m3:
      return run<Format::kFp8E4m3>(p, tile, stream);
#if !defined(LOWBIT_EMULATOR_ONE_FORMAT)
    case Format::kFp8E5m2:
      return run<Format::kFp8E5m2>(p, tile, stream);
#endif
    default:
      check_launch(kTiles[tile].name, kNotCompiled);
  }
}

}  // namespace lowbit::cuda
