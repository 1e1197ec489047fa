// The few things the host side needs of the CUDA runtime, without its headers: op boundary and kernels' launchers share
// it, and the emulator implements the same functions on the CPU.
#pragma once

#include <cstdint>
#include <string>

namespace lowbit::cuda {

using Stream = void*;  // a cudaStream_t

struct Grid {
  uint32_t x = 1, y = 1, z = 1;
};

// What a launch may ask of sm_90 and later.
struct LaunchOptions {
  uint32_t cluster = 1;  // blocks along x that run together; the grid is a multiple of it
  // Starts while the kernel before it on the stream ends: every block must execute ptx::grid_wait() before it reads what
  // that one wrote, and before anything that it read is written. No kernel before may write what is read earlier.
  bool dependent = false;
  // What the kernel before may write; only the emulator looks at it.
  const void* depends = nullptr;
  int64_t depends_bytes = 0;
};

// Whether launches may be dependent: LOWBIT_DEPENDENT_LAUNCH=0 says no.
bool dependent_launches();

// What selection must know of a device; asked once per device and kept.
struct DeviceInfo {
  int capability;  // 80, 86, 89, 90, 120, ...
  int sm_count;
  int64_t shared_per_block;  // the most that a block may opt in to
  int64_t shared_per_sm;
  bool hopper;  // runs code for sm_90a, and this build has some
};
const DeviceInfo& device_info(int device);

// Versions as CUDA numbers them (13000 = 13.0); 0 where there is no driver.
int driver_version();
int runtime_version();

// Zero-fills on the stream; capturable.
void fill_zero(void* data, int64_t bytes, Stream stream);

// Lets a kernel use more than 48 KB of dynamic shared memory, once per kernel and device.
void allow_shared(const char* name, const void* kernel, int64_t bytes);
// Throws Error with the kernel's name and the driver's words when status is not success.
void check_launch(const char* name, int status);

}  // namespace lowbit::cuda
