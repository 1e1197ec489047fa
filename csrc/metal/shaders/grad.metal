// The instantiation of grad (grad.h) for the format and the element that the host has defined.

#include "metal/shaders/grad.h"

LOWBIT_KERNEL("grad_" LOWBIT_FORMAT_NAME "_" LOWBIT_ELEMENT_NAME,
              lowbit::MatrixShared<lowbit::GemmTile<LOWBIT_ELEMENT LOWBIT_COMMA 64>>,
              lowbit::grad<LOWBIT_FORMAT, LOWBIT_ELEMENT>)
