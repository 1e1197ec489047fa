// Kernels by name, and what they take.
#pragma once

#include <cstdint>

namespace lowbit {
namespace emulator {
namespace metal_kernels {

enum class Argument : char { kTensor, kWord, kGroup, kThread, kLane, kSimd };

struct Kernel {
  const char* name;
  const char* file;
  int shared_bytes;
  int count;                  // of arguments
  const Argument* arguments;  // [count]
  const void* function;
  void (*run)(const void* function, const void* const* values);
};
bool add_kernel(const Kernel& kernel);

// Threadgroup memory of the running threadgroup; ends the launch where the kernel was registered with another type.
void* shared_memory(uint64_t bytes);

}  // namespace metal_kernels
}  // namespace emulator
}  // namespace lowbit
