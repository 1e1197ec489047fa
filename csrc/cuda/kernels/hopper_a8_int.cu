#include "cuda/kernels/hopper_a8_int.cuh"

namespace lowbit::cuda {

LOWBIT_FOR_INT34(LOWBIT_INSTANTIATE_HOPPER_A8_INT)
#if !defined(LOWBIT_EMULATOR_ONE_FORMAT)
LOWBIT_INSTANTIATE_HOPPER_A8_INT(Format::kInt8)
#endif

// The other formats are instantiated in hopper_a8_int256.cu.
void launch_hopper_a8_int(const GemmParams& p, int tile, Stream stream) {
  switch (p.w.format) {
#define LOWBIT_CASE(format) \
  case format:              \
    return run_hopper_a8_int<format>(p, tile, stream);
    LOWBIT_FOR_INT34(LOWBIT_CASE)
    LOWBIT_FOR_INT256(LOWBIT_CASE)
#if !defined(LOWBIT_EMULATOR_ONE_FORMAT)
    LOWBIT_CASE(Format::kInt8)
#endif
#undef LOWBIT_CASE
    default:
      check_launch(kTiles[tile].name, kNotCompiled);
  }
}

}  // namespace lowbit::cuda
