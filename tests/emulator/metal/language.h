// The Metal shading language on the CPU: what csrc/metal/shaders may use, and nothing else, so that a shader which reaches for
// more does not compile here. C++14, as Metal's own compiler takes it; the sources are the same, byte for byte.
//
// A thread of a threadgroup is a fiber (../scheduler.h). Address spaces are words without a meaning here.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulator/metal/language_types.h"
#include "emulator/metal/registry.h"

#define LOWBIT_POSITION                                                        \
  const ::metal::GroupPosition group, const ::metal::ThreadIndex thread_index, \
      const ::metal::LaneIndex lane, const ::metal::SimdIndex simd

namespace metal {

// ---- matrices ----------------------------------------------------------------------------------------------------------

// Lane l holds two elements of a row. Which they are is Apple's secret, and shaders must not depend on it.
template <class T, int kRows, int kColumns>
struct simdgroup_matrix {
  static_assert(kRows == 8 && kColumns == 8, "Metal has 8x8 matrices");
  T element[2];
};

inline uint matrix_row(uint lane) { return lane / 4; }
inline uint matrix_column(uint lane) { return lane % 4 * 2; }

template <class T, int kRows, int kColumns>
simdgroup_matrix<T, kRows, kColumns> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, kRows, kColumns> m;
  m.element[0] = m.element[1] = value;
  return m;
}

// Elements are read when a lane arrives and not when the last one does: what other lanes have yet to write is then missing,
// as it may be on a GPU when no barrier stands between.
template <class T>
void simdgroup_load(simdgroup_matrix<T, 8, 8>& m, const T* from, ulong stride,
                    ulong2 origin = ulong2(0), bool transpose = false) {
  const uint row = matrix_row(lane_of_thread()), column = matrix_column(lane_of_thread());
  from += origin.y * stride + origin.x;
  for (uint i = 0; i < 2; ++i) {
    m.element[i] = transpose ? from[(column + i) * stride + row] : from[row * stride + column + i];
  }
}
template <class T>
void simdgroup_store(const simdgroup_matrix<T, 8, 8>& m, T* to, ulong stride,
                     ulong2 origin = ulong2(0), bool transpose = false) {
  const uint row = matrix_row(lane_of_thread()), column = matrix_column(lane_of_thread());
  to += origin.y * stride + origin.x;
  for (uint i = 0; i < 2; ++i) {
    (transpose ? to[(column + i) * stride + row] : to[row * stride + column + i]) = m.element[i];
  }
}

template <class T>
void simdgroup_multiply_accumulate(simdgroup_matrix<float, 8, 8>& d,
                                   const simdgroup_matrix<T, 8, 8>& a,
                                   const simdgroup_matrix<T, 8, 8>& b,
                                   const simdgroup_matrix<float, 8, 8>& c, Site at = Site::here()) {
  const float wide_a[2] = {float(a.element[0]), float(a.element[1])};
  const float wide_b[2] = {float(b.element[0]), float(b.element[1])};
  multiply_matrices(d.element, wide_a, wide_b, c.element, at);
}

}  // namespace metal

// ---- registration ------------------------------------------------------------------------------------------------------

namespace lowbit {
namespace emulator {
namespace metal_kernels {

// A kernel's parameters, one by one.
template <class T>
struct Take;  // no other parameters exist
template <class T>
struct Take<T*> {
  static constexpr Argument kind = Argument::kTensor;
  static T* from(const void* value) { return static_cast<T*>(const_cast<void*>(value)); }
};
template <>
struct Take<const long&> {
  static constexpr Argument kind = Argument::kWord;
  static const long& from(const void* value) { return *static_cast<const long*>(value); }
};
#define LOWBIT_TAKE(type, which)                                                     \
  template <>                                                                        \
  struct Take<type> {                                                                \
    static constexpr Argument kind = which;                                          \
    static type from(const void* value) { return *static_cast<const type*>(value); } \
  };
LOWBIT_TAKE(::metal::GroupPosition, Argument::kGroup)
LOWBIT_TAKE(::metal::ThreadIndex, Argument::kThread)
LOWBIT_TAKE(::metal::LaneIndex, Argument::kLane)
LOWBIT_TAKE(::metal::SimdIndex, Argument::kSimd)
#undef LOWBIT_TAKE

template <int... kIndex>
struct Sequence {};
template <int kCount, int... kIndex>
struct Count : Count<kCount - 1, kCount - 1, kIndex...> {};
template <int... kIndex>
struct Count<0, kIndex...> {
  using Indices = Sequence<kIndex...>;
};

template <class... Args, int... kIndex>
void run_kernel(void (*function)(Args...), const void* const* values, Sequence<kIndex...>) {
  function(Take<Args>::from(values[kIndex])...);
}

template <class Shared, class... Args>
bool add_kernel(const char* name, const char* file, void (*function)(Args...)) {
  static const Argument arguments[] = {Take<Args>::kind...};
  return add_kernel({name, file, Shared::kEmulatedBytes, int(sizeof...(Args)), arguments,
                     reinterpret_cast<const void*>(function),
                     [](const void* address, const void* const* values) {
                       run_kernel(reinterpret_cast<void (*)(Args...)>(const_cast<void*>(address)),
                                  values, typename Count<sizeof...(Args)>::Indices());
                     }});
}

template <class T>
struct SharedBytes {
  static constexpr int kEmulatedBytes = sizeof(T);
};

}  // namespace metal_kernels
}  // namespace emulator
struct NoShared;
namespace emulator {
namespace metal_kernels {
template <>
struct SharedBytes<NoShared> {
  static constexpr int kEmulatedBytes = 0;
};
}  // namespace metal_kernels
}  // namespace emulator
}  // namespace lowbit

#define LOWBIT_GLUE_(a, b) a##b
#define LOWBIT_GLUE(a, b) LOWBIT_GLUE_(a, b)
#define LOWBIT_SHARED(Type, name) \
  Type& name = *static_cast<Type*>(::lowbit::emulator::metal_kernels::shared_memory(sizeof(Type)))
#define LOWBIT_KERNEL(name, Type, ...)                         \
  static const bool LOWBIT_GLUE(lowbit_kernel_, __COUNTER__) = \
      ::lowbit::emulator::metal_kernels::add_kernel<           \
          ::lowbit::emulator::metal_kernels::SharedBytes<Type>>(name, __FILE__, __VA_ARGS__);
#define LOWBIT_EXACT
#define LOWBIT_UNROLL

// ---- words of the language ---------------------------------------------------------------------------------------------

// Last, because the standard library uses some of them as names.
#define device
#define thread
#define threadgroup
#define constant const

using namespace metal;
