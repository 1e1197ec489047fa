// launch() of csrc/cuda/launch.cuh: runs the kernel's blocks here and now, on the CPU, and throws what went wrong in them.
#pragma once

#include <cstdint>
#include <tuple>

#include "cuda/runtime.h"
#include "emulator/language.h"

namespace lowbit::emulator {

// A kernel and its arguments without their types.
struct Call {
  const char* name;                                        // as the launcher calls it
  const void* kernel;                                      // its address: which instantiation
  void (*run)(const void* kernel, const void* arguments);  // one thread, start to end
  const void* arguments;
  cuda::LaunchOptions options;
};
void run_grid(const Call& call, cuda::Grid grid, int threads, int64_t shared);

}  // namespace lowbit::emulator

namespace lowbit::cuda {

template <class... Args>
void launch_with(const LaunchOptions& options, const char* name, void (*kernel)(Args...), Grid grid,
                 int threads, int64_t shared, Stream stream, Args... args) {
  static_assert((sizeof(Args) + ... + 0) <= 4096, "CUDA takes at most 4 KB of kernel arguments");
  (void)stream;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared > 48 * 1024) allow_shared(name, reinterpret_cast<const void*>(kernel), shared);
  using Arguments = std::tuple<Args...>;
  const Arguments arguments(args...);
  const auto run = [](const void* address, const void* given) {
    std::apply(reinterpret_cast<void (*)(Args...)>(const_cast<void*>(address)),
               *static_cast<const Arguments*>(given));
  };
  emulator::run_grid({name, reinterpret_cast<const void*>(kernel), run, &arguments, options}, grid,
                     threads, shared);
}

template <class... Args>
void launch(const char* name, void (*kernel)(Args...), Grid grid, int threads, int64_t shared,
            Stream stream, Args... args) {
  launch_with(LaunchOptions{}, name, kernel, grid, threads, shared, stream, args...);
}

}  // namespace lowbit::cuda
