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
void launch_with(const LaunchOptions& options, const char* name, void (*kernel)(Args...), Grid grid,
                 int threads, int64_t shared, Stream stream, Args... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared > 48 * 1024) allow_shared(name, reinterpret_cast<const void*>(kernel), shared);
  void* pointers[] = {static_cast<void*>(&args)...};
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = options.cluster;
  attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid.x, grid.y, grid.z);
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = static_cast<cudaStream_t>(stream);
  // Devices below 9.0 know neither.
  config.attrs = options.cluster > 1 ? attributes : attributes + 1;
  config.numAttrs =
      (options.cluster > 1 ? 1u : 0u) + (options.dependent && dependent_launches() ? 1u : 0u);
  const cudaError_t status =
      cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), pointers);
  check_launch(name, static_cast<int>(status));
}

template <class... Args>
void launch(const char* name, void (*kernel)(Args...), Grid grid, int threads, int64_t shared,
            Stream stream, Args... args) {
  launch_with(LaunchOptions{}, name, kernel, grid, threads, shared, stream, args...);
}

}  // namespace lowbit::cuda

#endif
