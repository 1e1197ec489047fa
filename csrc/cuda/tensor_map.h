// A matrix in global memory as the tensor copy engine of sm_90 wants it described, to be cut into boxes.
//
// A box is copied into shared memory row by row, 128 bytes each, whose 16-byte pieces are swizzled: piece p of row r stands
// at p ^ (r % 8). That is what wgmma reads (ptx_wgmma.cuh), and keeps eight rows of a column of pieces in all banks.
#pragma once

#include <cstdint>

namespace lowbit::cuda {

inline constexpr int kBoxBytes = 128;  // of a row of a box

// Opaque; passed to kernels by value, as a __grid_constant__ parameter.
struct alignas(64) TensorMap {
  uint64_t words[16];
};

struct Matrix {
  const void* data;       // 16-byte aligned
  int64_t rows, columns;  // in elements
  int64_t row_bytes;      // from one row to the next, a multiple of 16
  int element_bytes;      // 1 or 2
  int box_rows;           // at most 256; a box has kBoxBytes / element_bytes columns
};

// Throws Error with the kernel's name and the numbers where the driver, or its lack of the function, refuses.
TensorMap make_tensor_map(const char* name, const Matrix& matrix);

}  // namespace lowbit::cuda
