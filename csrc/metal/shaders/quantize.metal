// Round-to-nearest quantization (quantize.h): a kernel per encoder.

#include "metal/shaders/quantize.h"

#define LOWBIT_QUANTIZE(name, ...) \
  LOWBIT_KERNEL("quantize_" name, lowbit::RangeLanes, lowbit::quantize<__VA_ARGS__>)
LOWBIT_QUANTIZE("int", lowbit::Integers<lowbit::ZeroKind::kNone>)
LOWBIT_QUANTIZE("int_zeros", lowbit::Integers<lowbit::ZeroKind::kInt>)
LOWBIT_QUANTIZE("float_zeros", lowbit::Integers<lowbit::ZeroKind::kFloat>)
LOWBIT_QUANTIZE("offsets", lowbit::Integers<lowbit::ZeroKind::kOffset>)
LOWBIT_QUANTIZE("fp8_e4m3", lowbit::Floats<4, 3>)
LOWBIT_QUANTIZE("fp8_e5m2", lowbit::Floats<5, 2>)
LOWBIT_QUANTIZE("fp4_e2m1", lowbit::Floats<2, 1>)
LOWBIT_QUANTIZE("book", lowbit::Book)
#undef LOWBIT_QUANTIZE
