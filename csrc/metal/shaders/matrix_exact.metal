// The instantiation of matrix_exact (matrix.h) for the format that the host has defined.

#include "metal/shaders/matrix.h"

LOWBIT_KERNEL("matrix_exact_" LOWBIT_FORMAT_NAME, lowbit::ExactShared,
              lowbit::matrix_exact<LOWBIT_FORMAT>)
