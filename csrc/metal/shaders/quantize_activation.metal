// quantize_activation (activation.h) for short groups and for long ones.

#include "metal/shaders/activation.h"

LOWBIT_KERNEL("quantize_activation_1", lowbit::RangeShared, lowbit::quantize_activation<1>)
LOWBIT_KERNEL("quantize_activation_8", lowbit::RangeShared, lowbit::quantize_activation<8>)
