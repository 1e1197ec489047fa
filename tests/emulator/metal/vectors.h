// Vectors of 2, 3 and 4, aligned as Metal aligns them, with the operations that shaders use.
#pragma once

#include "emulator/metal/numbers.h"

namespace metal {

template <class T, int kCount>
struct vec;

template <class T>
struct alignas(2 * sizeof(T)) vec<T, 2> {
  T x, y;
  vec() = default;
  explicit vec(T all) : x(all), y(all) {}
  vec(T x0, T y0) : x(x0), y(y0) {}
  template <class U>
  explicit vec(const vec<U, 2>& v) : x(T(v.x)), y(T(v.y)) {}
  T& operator[](int i) { return (&x)[i]; }
  const T& operator[](int i) const { return (&x)[i]; }
};
template <class T>
struct alignas(4 * sizeof(T)) vec<T, 3> {
  T x, y, z;
};
template <class T>
struct alignas(4 * sizeof(T)) vec<T, 4> {
  T x, y, z, w;
  vec() = default;
  explicit vec(T all) : x(all), y(all), z(all), w(all) {}
  vec(T x0, T y0, T z0, T w0) : x(x0), y(y0), z(z0), w(w0) {}
  template <class U>
  explicit vec(const vec<U, 4>& v) : x(T(v.x)), y(T(v.y)), z(T(v.z)), w(T(v.w)) {}
  T& operator[](int i) { return (&x)[i]; }
  const T& operator[](int i) const { return (&x)[i]; }
};

#define LOWBIT_VECTOR_OPERATOR(op)                                        \
  template <class T, int kCount>                                          \
  vec<T, kCount> operator op(vec<T, kCount> a, const vec<T, kCount>& b) { \
    for (int i = 0; i < kCount; ++i) a[i] = a[i] op b[i];                 \
    return a;                                                             \
  }                                                                       \
  template <class T, int kCount>                                          \
  vec<T, kCount> operator op(vec<T, kCount> a, T b) {                     \
    for (int i = 0; i < kCount; ++i) a[i] = a[i] op b;                    \
    return a;                                                             \
  }
LOWBIT_VECTOR_OPERATOR(+)
LOWBIT_VECTOR_OPERATOR(-)
LOWBIT_VECTOR_OPERATOR(*)
LOWBIT_VECTOR_OPERATOR(<<)
LOWBIT_VECTOR_OPERATOR(>>)
#undef LOWBIT_VECTOR_OPERATOR
template <class T, int kCount>
vec<T, kCount>& operator*=(vec<T, kCount>& a, T b) {
  return a = a * b;
}

using uchar4 = vec<uchar, 4>;
using ushort2 = vec<ushort, 2>;
using ushort4 = vec<ushort, 4>;
using uint2 = vec<uint, 2>;
using uint3 = vec<uint, 3>;
using uint4 = vec<uint, 4>;
using int2 = vec<int, 2>;
using ulong2 = vec<ulong, 2>;
using half2 = vec<half, 2>;
using half4 = vec<half, 4>;
using bfloat4 = vec<bfloat, 4>;
using float2 = vec<float, 2>;
using float4 = vec<float, 4>;

template <class To, class From>
To as_type(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "as_type keeps the size");
  To to;
  std::memcpy(static_cast<void*>(&to), &from, sizeof to);
  return to;
}

inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float fabs(float a) { return __builtin_fabsf(a); }
inline float rint(float a) {
  return __builtin_rintf(a);
}  // ties to even: the mode is never changed
inline uint clz(uint a) { return a == 0u ? 32u : uint(__builtin_clz(a)); }
inline int min(int a, int b) { return a < b ? a : b; }
inline uint min(uint a, uint b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline uint max(uint a, uint b) { return a > b ? a : b; }

}  // namespace metal
