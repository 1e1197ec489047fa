// int8 activations times integers by wgmma: what hopper_a8_int*.cu instantiate.
#pragma once

#include "cuda/kernels/hopper_a8.cuh"

namespace lowbit::cuda {

inline constexpr int kHopperIntM64 = tile_index("hopper_a8_int_m64"),
                     kHopperIntM128 = tile_index("hopper_a8_int_m128");

// A few formats in each file.
template <Format kFormat>
void run_hopper_a8_int(const GemmParams& p, int tile, Stream stream);

#define LOWBIT_INSTANTIATE_HOPPER_A8_INT(format)                                 \
  template <>                                                                    \
  void run_hopper_a8_int<format>(const GemmParams& p, int tile, Stream stream) { \
    if (tile == kHopperIntM64) {                                                 \
      start_hopper_a8<HopperIntMath, format, kHopperIntM64>(p, stream);          \
    } else {                                                                     \
      start_hopper_a8<HopperIntMath, format, kHopperIntM128>(p, stream);         \
    }                                                                            \
  }

}  // namespace lowbit::cuda
