// Quantization with a search for scales (quantize_search.h): a kernel per encoder.

#include "metal/shaders/quantize_search.h"

#define LOWBIT_QUANTIZE_SEARCH(name, ...) \
  LOWBIT_KERNEL("quantize_search_" name, lowbit::SearchShared, lowbit::quantize_search<__VA_ARGS__>)
LOWBIT_QUANTIZE_SEARCH("int", lowbit::Integers<lowbit::ZeroKind::kNone>)
LOWBIT_QUANTIZE_SEARCH("int_zeros", lowbit::Integers<lowbit::ZeroKind::kInt>)
LOWBIT_QUANTIZE_SEARCH("float_zeros", lowbit::Integers<lowbit::ZeroKind::kFloat>)
LOWBIT_QUANTIZE_SEARCH("offsets", lowbit::Integers<lowbit::ZeroKind::kOffset>)
LOWBIT_QUANTIZE_SEARCH("fp8_e4m3", lowbit::Floats<4, 3>)
LOWBIT_QUANTIZE_SEARCH("fp8_e5m2", lowbit::Floats<5, 2>)
LOWBIT_QUANTIZE_SEARCH("fp4_e2m1", lowbit::Floats<2, 1>)
LOWBIT_QUANTIZE_SEARCH("book", lowbit::Book)
#undef LOWBIT_QUANTIZE_SEARCH
