// How shaders get to the GPU: torch's C interface to Metal (aoti_torch/c/shim_mps.h), or functions that somebody provides in its
// place. Python's torch.mps.compile_shader is such a one (python/lowbit/_compile_shader.py). Part of liblowbit_ops everywhere.
#pragma once

#include <cstdint>

#include "common/check.h"

namespace lowbit::metal {

struct Launcher {
  // Compiles a source; returns a number above 0 that stands for it, or 0.
  int64_t (*compile)(const char* source, const char** error);

  // Starts a kernel of such a source, on torch's current stream. Argument i is the tensor tensors[i], an AtenTensorHandle that
  // is the callee's from then on, or, where that is null, words[i]. Returns 0, or not.
  int (*launch)(int64_t source, const char* kernel, int32_t count, void* const* tensors,
                const int64_t* words, const uint64_t* threads, const uint64_t* group,
                const char** error);

  // Both: where they fail, *error says why, and stays readable until the next call.
};

// Null pointers: back to torch's C interface. What was compiled is compiled again for another launcher.
LOWBIT_API void set_launcher(const Launcher& launcher);
// Null where torch's C interface is to be used. Lives until the process ends.
LOWBIT_API const Launcher* launcher();

// A function of the library that torch's C interface is in; null where it has none of that name.
LOWBIT_API void* torch_function(const char* name);
// Whether that library has all that csrc/metal/library.cpp calls.
LOWBIT_API bool has_metal_interface();

// Name and place in the interface. By name and not by reference: a libtorch without them must not keep the CPU's ops from
// loading.
#define LOWBIT_METAL_INTERFACE(X) \
  X(create_shader_library)        \
  X(get_kernel_function)          \
  X(run_command_block)            \
  X(start_encoding)               \
  X(set_arg_tensor)               \
  X(set_arg_int)                  \
  X(dispatch_array_with_group_size)

}  // namespace lowbit::metal
