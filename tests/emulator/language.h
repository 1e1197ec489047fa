// The CUDA language on the CPU: what csrc/cuda/device.cuh says kernels may use, and nothing else, so that a kernel which
// reaches for more does not compile here.
//
// A thread of a block is a fiber (scheduler.h). The pseudo-variables read the fiber that runs.
#pragma once

#include <cstdint>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

namespace lowbit::emulator {

struct Dim {
  uint32_t x, y, z;
};

// What a thread may know of itself.
struct Place {
  Dim thread_index, block_index, block_dim, grid_dim;
  uint8_t* shared;
  int64_t shared_bytes;
};

// The thread that runs on this CPU thread. Initial-exec: one load, where the default is a call per access.
extern __thread Place* current __attribute__((tls_model("initial-exec")));

// Ends the launch with an error that names kernel, block and thread.
[[noreturn]] void trap();

}  // namespace lowbit::emulator

// Macros, because CUDA's own are no variables either: they have no address that outlives a switch.
#define threadIdx \
  (static_cast<const ::lowbit::emulator::Dim&>(::lowbit::emulator::current->thread_index))
#define blockIdx \
  (static_cast<const ::lowbit::emulator::Dim&>(::lowbit::emulator::current->block_index))
#define blockDim \
  (static_cast<const ::lowbit::emulator::Dim&>(::lowbit::emulator::current->block_dim))
#define gridDim (static_cast<const ::lowbit::emulator::Dim&>(::lowbit::emulator::current->grid_dim))

// Aligned as in CUDA, where a vector load of a misaligned address is a fault.
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
constexpr uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
constexpr uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
constexpr float2 make_float2(float x, float y) { return {x, y}; }
constexpr float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline void __trap() { ::lowbit::emulator::trap(); }

namespace lowbit::cuda {

// The block's dynamic shared memory, exactly as long as the launch asked for.
inline uint8_t* dynamic_shared() { return emulator::current->shared; }

}  // namespace lowbit::cuda
