// Code books of sixteen levels that follow no rule. They are one codec with one instantiation of each kernel: which book it is, a
// launch says (WeightParams). No torch, no CUDA headers.
#pragma once

#include <cstdint>

#include "common/enums.h"

namespace lowbit::cuda {

// The format whose name the codec has.
inline constexpr Format kBookCodec = Format::kNf4;
inline constexpr Format kBooks[] = {kBookCodec, Format::kIq4Nl, Format::kBnbFp4};

// In kBooks; -1: the format has a codec of its own.
constexpr int index_of_book(Format format) {
  for (int i = 0; i < 3; ++i) {
    if (kBooks[i] == format) return i;
  }
  return -1;
}
constexpr bool has_book(Format format) { return index_of_book(format) >= 0; }
// What a kernel for a format is instantiated for.
constexpr Format codec_of(Format format) { return has_book(format) ? kBookCodec : format; }

// A book as codec/book.cuh looks it up: bytes of its levels as x's 16-bit type has them, and of what is lost when they are
// rounded to it. [low, high byte][four levels in a word].
struct BookBytes {
  uint32_t nearest[2][4], rest[2][4];
};

}  // namespace lowbit::cuda
