// Launches of Metal kernels on the emulator: for shim.cpp and for tests.
#pragma once

#include <cstdint>
#include <string>

#include "emulator/metal/registry.h"

namespace lowbit::emulator::metal_kernels {

inline constexpr int kMaxArguments = 31;      // buffers 0 to 30
inline constexpr int kMaxShared = 32 * 1024;  // bytes of threadgroup memory

struct Given {
  bool set, is_tensor;
  const void* data;
  int64_t word;
};

struct Launch {
  const Kernel* kernel;
  Given given[kMaxArguments];
  uint32_t groups[3];
  int64_t threads;  // of a threadgroup
};

// Both throw Error.
const Kernel& find_kernel(const std::string& name);
void run(const Launch& launch);

// One line per kernel: launches since the last reset, bytes of threadgroup memory, name.
const char* describe_kernels();
void reset_launches();

}  // namespace lowbit::emulator::metal_kernels
