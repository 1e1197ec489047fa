// Parameters from the words that they travel in (metal/params.h).
#pragma once

#include "metal/params.h"
#include "metal/shaders/language.h"

namespace lowbit {

using metal_params::bias_type_of;
using metal_params::format_of;
using metal_params::scale_dtype_of;
using metal_params::x_type_of;
using metal_params::y_type_of;
using metal_params::zero_kind_of;

inline int low(constant long& word) { return int(word); }
inline int high(constant long& word) { return int(word >> 32); }

// The first parameters of kernels, and what they say.
#define LOWBIT_GEMM_ARGUMENTS                                                 \
  constant long &word0 [[buffer(0)]], constant long &word1 [[buffer(1)]],     \
      constant long &word2 [[buffer(2)]], constant long &word3 [[buffer(3)]], \
      constant long &word4 [[buffer(4)]], constant long &word5 [[buffer(5)]], \
      constant long &word6 [[buffer(6)]], constant long &word7 [[buffer(7)]], \
      constant long &word8 [[buffer(8)]], constant long &word9 [[buffer(9)]], \
      constant long &word10 [[buffer(10)]]
#define LOWBIT_GEMM_PARAMS \
  lowbit::gemm_params(word0, word1, word2, word3, word4, word5, word6, word7, word8, word9, word10)

inline metal_params::Gemm gemm_params(constant long& a, constant long& b, constant long& c,
                                      constant long& d, constant long& e, constant long& f,
                                      constant long& g, constant long& h, constant long& i,
                                      constant long& j, constant long& k) {
  return {low(a),       high(a),       low(b),       high(b),       low(c),       high(c),
          uint(low(d)), uint(high(d)), uint(low(e)), uint(high(e)), low(f),       high(f),
          low(g),       high(g),       low(h),       high(h),       uint(low(i)), uint(high(i)),
          uint(low(j)), uint(high(j)), low(k),       high(k)};
}

// Every other params struct: eight ints and two unsigned ones.
#define LOWBIT_PARAMS_ARGUMENTS                                               \
  constant long &word0 [[buffer(0)]], constant long &word1 [[buffer(1)]],     \
      constant long &word2 [[buffer(2)]], constant long &word3 [[buffer(3)]], \
      constant long &word4 [[buffer(4)]]
#define LOWBIT_PARAMS(Type) \
  lowbit::params_of<lowbit::metal_params::Type>(word0, word1, word2, word3, word4)

template <class Params>
inline Params params_of(constant long& a, constant long& b, constant long& c, constant long& d,
                        constant long& e) {
  return {low(a),  high(a), low(b),  high(b),      low(c),
          high(c), low(d),  high(d), uint(low(e)), uint(high(e))};
}

}  // namespace lowbit
