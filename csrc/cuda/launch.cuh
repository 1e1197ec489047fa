// Starting a kernel: the one place that knows <<<>>>, and that the emulator replaces. Included by .cu files only.
#pragma once

#include <cstdint>

#include "cuda/device.cuh"
#include "cuda/runtime.h"

#if defined(LOWBIT_EMULATOR)
#include "emulator/launch.h"  // the same launch() and nothing else
#else

#include <cuda_runtime_api.h>

namespace lowbit::cuda {

// Runs `kernel(args...)` on `grid` blocks of `threads` threads with `shared` bytes of dynamic shared memory.
// Throws Error with the kernel's name when the driver refuses; nothing here waits for the device.
template <class... Args>
void launch(const char* name, void (*kernel)(Args...), Grid grid, int threads, int64_t shared,
            Stream stream, Args... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared > 48 * 1024) allow_shared(name, reinterpret_cast<const void*>(kernel), shared);
  void* pointers[] = {static_cast<void*>(&args)...};
  const cudaError_t status =
      cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(grid.x, grid.y, grid.z),
                       dim3(static_cast<unsigned>(threads)), pointers, static_cast<size_t>(shared),
                       static_cast<cudaStream_t>(stream));
  check_launch(name, static_cast<int>(status));
}

}  // namespace lowbit::cuda

#endif
