#include "cuda/kernels/hopper_a8.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kM64 = tile_index("hopper_a8_fp8_m64"), kM128 = tile_index("hopper_a8_fp8_m128");

template <Format kFormat>
void run(const GemmParams& p, int tile, Stream stream) {
  if (tile == kM64) {
    start_hopper_a8<HopperFp8Math, kFormat, kM64>(p, stream);
  } else {
    start_hopper_a8<HopperFp8Math, kFormat, kM128>(p, stream);
  }
}

}  // namespace

void launch_hopper_a8_fp8(const GemmParams& p, int tile, Stream stream) {
  switch (p.w.format) {
    case Format::kFp8E4m3:
      return run<Format::kFp8E4m3>(p, tile, stream);
    case Format::kInt4:
      return run<Format::kInt4>(p, tile, stream);
#if !defined(LOWBIT_EMULATOR_ONE_FORMAT)
    case Format::kFp8E5m2:
      return run<Format::kFp8E5m2>(p, tile, stream);
    case Format::kFp4E2m1:
      return run<Format::kFp4E2m1>(p, tile, stream);
#endif
    default:
      check_launch(kTiles[tile].name, kNotCompiled);
  }
}

}  // namespace lowbit::cuda
