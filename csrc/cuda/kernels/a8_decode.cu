#include "cuda/kernels/a8_decode.cuh"

// Of the code books only iq4_nl is exact in bf16; selection asks.
#if defined(LOWBIT_EMULATOR_ONE_FORMAT)
#define LOWBIT_FOR_DECODE_REST(X)
#else
#define LOWBIT_FOR_DECODE_REST(X) X(Format::kFp4E2m1) X(kBookCodec)
#endif

namespace lowbit::cuda {

LOWBIT_FOR_INT34(LOWBIT_INSTANTIATE_A8_DECODE)
LOWBIT_FOR_INT256(LOWBIT_INSTANTIATE_A8_DECODE)
LOWBIT_FOR_BYTES(LOWBIT_INSTANTIATE_A8_DECODE)
LOWBIT_FOR_DECODE_REST(LOWBIT_INSTANTIATE_A8_DECODE)

void launch_a8_decode(const GemmParams& p, int tile, Stream stream) {
  switch (codec_of(p.w.format)) {
#define LOWBIT_CASE(format) \
  case format:              \
    return run_a8_decode<format>(p, stream);
    LOWBIT_FOR_INT34(LOWBIT_CASE)
    LOWBIT_FOR_INT256(LOWBIT_CASE)
    LOWBIT_FOR_BYTES(LOWBIT_CASE)
    LOWBIT_FOR_DECODE_REST(LOWBIT_CASE)
#undef LOWBIT_CASE
    default:
      check_launch(kTiles[tile].name, kNotCompiled);
  }
}

}  // namespace lowbit::cuda
