// The instantiation of prepare_rows (activation.h) for the element that the host has defined.

#include "metal/shaders/activation.h"

LOWBIT_KERNEL("prepare_rows_" LOWBIT_ELEMENT_NAME, lowbit::NoShared, lowbit::prepare_rows<LOWBIT_ELEMENT>)
