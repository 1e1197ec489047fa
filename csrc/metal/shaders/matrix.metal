// Instantiations of matrix (matrix.h) for the format and the element that the host has defined.

#include "metal/shaders/matrix.h"

#define LOWBIT_MATRIX(m)                                                              \
  LOWBIT_KERNEL("matrix_m" #m "_" LOWBIT_FORMAT_NAME "_" LOWBIT_ELEMENT_NAME,         \
                lowbit::MatrixShared<lowbit::GemmTile<LOWBIT_ELEMENT LOWBIT_COMMA m>>, \
                lowbit::matrix<LOWBIT_FORMAT, LOWBIT_ELEMENT, m>)
LOWBIT_MATRIX(32)
LOWBIT_MATRIX(64)
#undef LOWBIT_MATRIX
