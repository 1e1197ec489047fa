// The instantiation of dequantize (canonical.h) for the element that the host has defined.

#include "metal/shaders/canonical.h"

LOWBIT_KERNEL("dequantize_" LOWBIT_ELEMENT_NAME, lowbit::NoShared, lowbit::dequantize<LOWBIT_ELEMENT>)
