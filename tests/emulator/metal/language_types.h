// What Metal threads know of themselves and do together: for shaders (language.h) and for those who run them (runtime.cpp).
#pragma once

#include "emulator/metal/vectors.h"

namespace metal {

// Where in the source threads meet.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

// ---- what a thread is --------------------------------------------------------------------------------------------------

// Distinct types, so that the launcher can tell a kernel's parameters apart.
struct GroupPosition : uint3 {};
template <int kWhich>
struct Index {
  uint value;
  operator uint() const { return value; }
};
using ThreadIndex = Index<0>;
using LaneIndex = Index<1>;
using SimdIndex = Index<2>;

// ---- threads together --------------------------------------------------------------------------------------------------

enum class mem_flags { mem_none, mem_device, mem_threadgroup };
void threadgroup_barrier(mem_flags flags, Site at = Site::here());
void simdgroup_barrier(mem_flags flags, Site at = Site::here());

float simd_sum(float value, Site at = Site::here());
float simd_min(float value, Site at = Site::here());
float simd_max(float value, Site at = Site::here());
uint simd_max(uint value, Site at = Site::here());

// ---- matrices ----------------------------------------------------------------------------------------------------------

uint lane_of_thread();

// d = a b + c, in fp32. A lane's two elements are those of row lane / 4 and columns lane % 4 * 2 and the next.
void multiply_matrices(float* d, const float* a, const float* b, const float* c, Site at);

}  // namespace metal
