// How many columns a wgmma can have, and which of them one kernel's instructions have: host and device.
//
// A kernel whose sums have room for `most` columns multiplies tiles of fewer, too: it holds an instruction for each number
// from half of `most` on (from 8, up to 64; 256 stands alone), and takes the narrowest that holds the tile's tokens. The
// sums of a narrow one are the first registers of a wide one's.
#pragma once

#include <cstdint>

namespace lowbit::cuda {

// Multiples of 8; of integers above 32, of 16 (PTX 9.7.15.5.1.1).
constexpr int next_columns(bool integers, int columns) {
  return columns + (integers && columns >= 32 ? 16 : 8);
}
constexpr int fewest_columns(bool integers, int most) {
  return most == 256 ? 256 : most == 64 ? 8 : next_columns(integers, most / 2);
}
// The narrowest of the kernel's that holds so many tokens.
constexpr int columns_for(bool integers, int most, int tokens) {
  int columns = fewest_columns(integers, most);
  while (columns < tokens) columns = next_columns(integers, columns);
  return columns;
}
// Its number among them, and back.
constexpr int columns_number(bool integers, int most, int columns) {
  int number = 0;
  for (int c = fewest_columns(integers, most); c < columns; c = next_columns(integers, c)) ++number;
  return number;
}
constexpr int numbered_columns(bool integers, int most, int number) {
  int columns = fewest_columns(integers, most);
  for (; number > 0; --number) columns = next_columns(integers, columns);
  return columns;
}

}  // namespace lowbit::cuda
