// Every operation of csrc/metal/shaders/ieee.h on pairs of numbers, for tests/test_metal_emulator.py.

#include "metal/shaders/ieee.h"

namespace lowbit {

// A thread per pair; results of an operation stand `count` apart.
template <class Bits>
[[kernel]] void planted_ieee(constant long& count [[buffer(0)]], device const Bits* a [[buffer(1)]],
                             device const Bits* b [[buffer(2)]], device Bits* to [[buffer(3)]],
                             LOWBIT_POSITION) {
  const long i = long(group.x) * 256l + long(thread_index);
  if (!inside(i, long(count))) return;
  to[i] = sum_of(a[i], b[i]);
  to[i + count] = sum_of(a[i], negative_of(b[i]));
  to[i + 2 * count] = product_of(a[i], b[i]);
  to[i + 3 * count] = quotient_of(a[i], b[i]);
  to[i + 4 * count] = (less_of(a[i], b[i]) ? 1 : 0) + (equal_of(a[i], b[i]) ? 2 : 0);
}

template <int kOnly>
[[kernel]] void planted_widened(constant long& count [[buffer(0)]],
                                device const uint* a [[buffer(1)]], device ulong* to [[buffer(2)]],
                                LOWBIT_POSITION) {
  const long i = long(group.x) * 256l + long(thread_index);
  if (inside(i, long(count))) to[i] = widened(a[i]);
}
template <int kOnly>
[[kernel]] void planted_narrowed(constant long& count [[buffer(0)]],
                                 device const ulong* a [[buffer(1)]], device uint* to [[buffer(2)]],
                                 LOWBIT_POSITION) {
  const long i = long(group.x) * 256l + long(thread_index);
  if (inside(i, long(count))) to[i] = narrowed(a[i]);
}

}  // namespace lowbit

LOWBIT_KERNEL("planted_ieee_32", lowbit::NoShared, lowbit::planted_ieee<uint>)
LOWBIT_KERNEL("planted_ieee_64", lowbit::NoShared, lowbit::planted_ieee<ulong>)
LOWBIT_KERNEL("planted_widened", lowbit::NoShared, lowbit::planted_widened<0>)
LOWBIT_KERNEL("planted_narrowed", lowbit::NoShared, lowbit::planted_narrowed<0>)
