// What shaders start from: the Metal shading language 3.1 on a GPU, its emulation on the CPU otherwise (tests/emulator/metal).
//
// Shaders include headers of csrc/metal/shaders, metal/params.h, common/enums.h and tables of csrc/formats, which embed_shaders.py puts in front of
// them: sources are compiled at run time, where there is no include path. Written in C++14, as Metal's compiler is: no lambda,
// no `if constexpr`, no double; every pointer and reference names its address space.
//
//   LOWBIT_SHARED(Type, name)            threadgroup memory of a kernel, at the top of its body, at most once
//   LOWBIT_KERNEL(name, Type, function)  an instantiation under the name that the host asks for; Type is what the kernel
//                                        has in threadgroup memory, or NoShared
//   LOWBIT_POSITION                      the last parameters of every kernel: group (uint3), thread_index, lane, simd
//   LOWBIT_EXACT                         first in a function whose products must be rounded before they are added
#pragma once

#if defined(LOWBIT_EMULATOR)

#include "emulator/metal/language.h"

#else

#include <metal_simdgroup_matrix>
#include <metal_stdlib>

using namespace metal;

#define LOWBIT_SHARED(Type, name) threadgroup Type name
#define LOWBIT_KERNEL(name, Type, ...) \
  template [[host_name(name)]] [[kernel]] decltype(__VA_ARGS__) __VA_ARGS__;
#define LOWBIT_POSITION                                                                            \
  uint3 group [[threadgroup_position_in_grid]], uint thread_index [[thread_index_in_threadgroup]], \
      uint lane [[thread_index_in_simdgroup]], uint simd [[simdgroup_index_in_threadgroup]]
#define LOWBIT_EXACT _Pragma("clang fp contract(off)")
#define LOWBIT_UNROLL _Pragma("clang loop unroll(full)")

#endif

namespace lowbit {

struct NoShared {};

// Every comparison that keeps an access inside its array is written with this, so that the mutation tests can find and
// remove them one at a time.
template <class Index, class Size>
constexpr bool inside(Index index, Size size) {
  return index < size;
}

}  // namespace lowbit

// In a macro's argument.
#define LOWBIT_COMMA ,
// Two levels, so that macros are replaced before they are glued.
#define LOWBIT_TEXT_(...) #__VA_ARGS__
#define LOWBIT_TEXT(...) LOWBIT_TEXT_(__VA_ARGS__)
