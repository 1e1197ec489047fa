// Codecs: one lane's words of a cell -> its part of mma's A operand, as 16-bit pairs. GEMM bodies see nothing else of a
// format, and none of them branches on bits.
//
//   Codec<format>::kInteger                    whether codes are integers, with zeros
//   Codec<format>::kExact                      whether both 16-bit types hold every decoded value
//   Codec<format>::zero<T>(z)                  integers: what a row's zero is to decode()
//   Codec<format>::decode<T>(w, words, i, zero_g, zero_g8, a)
//                                              fragment i: q - zero, or the code's value
//   Codec<format>::decode_rest<T>(w, words, i, a)
//                                              where not exact: what decode() rounded away
//
// T is Float16 or BFloat16. Rows g and g + 8 of a fragment have their own zeros; registers 0 and 2 of A are row g.
//
// Lane instructions per weight, counted in the source (a decoded pair is two weights; the shift that a compiler may fold
// into another is not counted twice). Integer ones go to a pipe of half the issue rate, "f" is fma on 16-bit pairs:
//
//   format        Float16           BFloat16
//   int4          0.88 + 0.5 f      0.88 + 0.5 f
//   int2          0.94 + 0.5 f      0.94 + 0.5 f
//   int3, 5, 6    1.8 + 0.5 f       1.8 + 0.5 f
//   int8          0.75 + 0.5 f      1.25 + 1 f
//   fp8_e4m3      1.75 + 1.5 f      1.75 + 1.5 f
//   fp8_e5m2      0.75              0.75, and 1.5 conversions
//   fp4_e2m1      1.9 + 0.5 f       1.9 + 0.5 f
//   nf4 and others 2.75             2.75
#pragma once

#include "cuda/codec/planes.cuh"
#include "cuda/params.h"

namespace lowbit::cuda {

template <Format kFormat>
struct Codec;

}  // namespace lowbit::cuda

#include "cuda/codec/book.cuh"
#include "cuda/codec/fp.cuh"
#include "cuda/codec/integer.cuh"
