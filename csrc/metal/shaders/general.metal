// What takes every format and dtype (general.h).

#include "metal/shaders/general.h"

LOWBIT_KERNEL("general", lowbit::NoShared, lowbit::general<0>)
LOWBIT_KERNEL("general_grad", lowbit::NoShared, lowbit::general_grad<0>)
