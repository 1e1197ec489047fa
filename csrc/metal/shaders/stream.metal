// Instantiations of stream (stream.h) for the format and the element that the host has defined.

#include "metal/shaders/stream.h"

#define LOWBIT_STREAM(m, strips)                                                                 \
  LOWBIT_KERNEL("stream_m" #m "_" LOWBIT_FORMAT_NAME "_" LOWBIT_ELEMENT_NAME,                    \
                lowbit::StreamShared,                                                            \
                lowbit::stream<LOWBIT_FORMAT, LOWBIT_ELEMENT, m, strips, false>)
#define LOWBIT_STREAM_AFFINE(m, strips)                                                          \
  LOWBIT_KERNEL("stream_m" #m "_" LOWBIT_FORMAT_NAME "_affine_" LOWBIT_ELEMENT_NAME,             \
                lowbit::StreamShared,                                                            \
                lowbit::stream<LOWBIT_FORMAT, LOWBIT_ELEMENT, m, strips, true>)
LOWBIT_STREAM(1, 2)
LOWBIT_STREAM(2, 2)
LOWBIT_STREAM(4, 1)
LOWBIT_STREAM(8, 1)
#if LOWBIT_FORMAT_IS_INTEGER
LOWBIT_STREAM_AFFINE(1, 2)
LOWBIT_STREAM_AFFINE(2, 2)
LOWBIT_STREAM_AFFINE(4, 1)
LOWBIT_STREAM_AFFINE(8, 1)
#endif
#undef LOWBIT_STREAM
#undef LOWBIT_STREAM_AFFINE
