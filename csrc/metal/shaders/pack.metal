// Canonical tensors to the kernel layout and back (canonical.h).

#include "metal/shaders/canonical.h"

LOWBIT_KERNEL("pack_codes", lowbit::NoShared, lowbit::pack_codes<0>)
LOWBIT_KERNEL("pack_table", lowbit::NoShared, lowbit::pack_table<0>)
LOWBIT_KERNEL("unpack_codes", lowbit::NoShared, lowbit::unpack_codes<0>)
LOWBIT_KERNEL("unpack_table", lowbit::NoShared, lowbit::unpack_table<0>)
LOWBIT_KERNEL("clear_ends", lowbit::NoShared, lowbit::clear_ends<0>)
LOWBIT_KERNEL("copy_ints", lowbit::NoShared, lowbit::copy_ints<0>)
