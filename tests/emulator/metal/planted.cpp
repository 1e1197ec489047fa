// Shaders with mistakes, for tests/test_metal_emulator.py: what the emulator must find.

#include "metal/shaders/language.h"

namespace lowbit {

struct PlantedShared {
  float values[64];
};

// Each thread's value to its neighbour in the other SIMD-group, as it should be.
template <int kOnly>
[[kernel]] void planted_right(device const float* x [[buffer(0)]], device float* y [[buffer(1)]],
                              LOWBIT_POSITION) {
  LOWBIT_SHARED(PlantedShared, shared);
  shared.values[thread_index] = x[thread_index];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  y[thread_index] = shared.values[(thread_index + 32u) % 64u];
}

template <int kOnly>
[[kernel]] void planted_no_barrier(device const float* x [[buffer(0)]],
                                   device float* y [[buffer(1)]], LOWBIT_POSITION) {
  LOWBIT_SHARED(PlantedShared, shared);
  shared.values[thread_index] = x[thread_index];
  y[thread_index] = shared.values[(thread_index + 32u) % 64u];
}

template <int kOnly>
[[kernel]] void planted_weak_barrier(device const float* x [[buffer(0)]],
                                     device float* y [[buffer(1)]], LOWBIT_POSITION) {
  LOWBIT_SHARED(PlantedShared, shared);
  shared.values[thread_index] = x[thread_index];
  threadgroup_barrier(mem_flags::mem_none);
  y[thread_index] = shared.values[(thread_index + 32u) % 64u];
}

template <int kOnly>
[[kernel]] void planted_divergent_barrier(device const float* x [[buffer(0)]],
                                          device float* y [[buffer(1)]], LOWBIT_POSITION) {
  if (thread_index < 32u) threadgroup_barrier(mem_flags::mem_threadgroup);
  y[thread_index] = x[thread_index];
}

template <int kOnly>
[[kernel]] void planted_divergent_sum(device const float* x [[buffer(0)]],
                                      device float* y [[buffer(1)]], LOWBIT_POSITION) {
  if (lane != 3u) y[thread_index] = simd_sum(x[thread_index]);
}

template <int kOnly>
[[kernel]] void planted_out_of_shared(device const float* x [[buffer(0)]],
                                      device float* y [[buffer(1)]], LOWBIT_POSITION) {
  LOWBIT_SHARED(PlantedShared, shared);
  shared.values[thread_index + 1u] = x[thread_index];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  y[thread_index] = shared.values[thread_index + 1u];
}

template <int kOnly>
[[kernel]] void planted_unwritten(device float* y [[buffer(0)]], LOWBIT_POSITION) {
  LOWBIT_SHARED(PlantedShared, shared);
  y[thread_index] = shared.values[thread_index];
}

template <int kOnly>
[[kernel]] void planted_misaligned(device const float* x [[buffer(0)]],
                                   device float* y [[buffer(1)]], LOWBIT_POSITION) {
  const float4 v = *(device const float4*)(x + 1);
  y[thread_index] = v.x;
}

// A matrix of another SIMD-group's lanes, without a barrier between.
struct PlantedMatrix {
  half values[64];
};
template <int kOnly>
[[kernel]] void planted_matrix(device const float* x [[buffer(0)]], device float* y [[buffer(1)]],
                               LOWBIT_POSITION) {
  LOWBIT_SHARED(PlantedMatrix, shared);
  shared.values[thread_index] = half(x[thread_index]);
  if (simd != 0u) return;
  simdgroup_matrix<half, 8, 8> a;
  simdgroup_load(a, shared.values, 8);
  simdgroup_matrix<float, 8, 8> d = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  simdgroup_multiply_accumulate(d, a, a, d);
  simdgroup_store(d, y, 8);
}

struct PlantedLarge {
  float values[8200];
};
template <int kOnly>
[[kernel]] void planted_large(device float* y [[buffer(0)]], LOWBIT_POSITION) {
  LOWBIT_SHARED(PlantedLarge, shared);
  shared.values[thread_index] = 0.0f;
  y[thread_index] = shared.values[thread_index];
}

}  // namespace lowbit

#define LOWBIT_PLANTED(name, Type) LOWBIT_KERNEL(#name, Type, lowbit::name<0>)
LOWBIT_PLANTED(planted_right, lowbit::PlantedShared)
LOWBIT_PLANTED(planted_no_barrier, lowbit::PlantedShared)
LOWBIT_PLANTED(planted_weak_barrier, lowbit::PlantedShared)
LOWBIT_PLANTED(planted_divergent_barrier, lowbit::NoShared)
LOWBIT_PLANTED(planted_divergent_sum, lowbit::NoShared)
LOWBIT_PLANTED(planted_out_of_shared, lowbit::PlantedShared)
LOWBIT_PLANTED(planted_unwritten, lowbit::PlantedShared)
LOWBIT_PLANTED(planted_misaligned, lowbit::NoShared)
LOWBIT_PLANTED(planted_matrix, lowbit::PlantedMatrix)
LOWBIT_PLANTED(planted_large, lowbit::PlantedLarge)

// Two of the real shaders, without their barriers and under other names.
#define threadgroup_barrier(flags) ((void)0)
#define stream stream_without_barriers
#define matrix matrix_without_barriers
#define LOWBIT_FORMAT ::lowbit::Format::kInt4
#define LOWBIT_FORMAT_NAME "int4"
#define LOWBIT_FORMAT_IS_INTEGER 0
#define LOWBIT_ELEMENT float
#define LOWBIT_ELEMENT_NAME "planted"
#include "metal/shaders/matrix.metal"
#include "metal/shaders/stream.metal"
