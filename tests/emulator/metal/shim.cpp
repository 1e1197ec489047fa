// torch's C interface to Metal (aoti_torch/c/shim_mps.h) on the emulator: the few functions that csrc/metal/library.cpp calls. The
// CPU build of torch does not have them. As there, a failure is a code, and its words are on stderr.

#include <torch/csrc/inductor/aoti_torch/c/shim_mps.h>

#include <cstdio>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "common/check.h"
#include "emulator/metal/runtime.h"
#include "emulator/settings.h"

using namespace lowbit;
using namespace lowbit::emulator::metal_kernels;

struct AOTIMetalShaderLibraryOpaque {
  std::string source;
};
struct AOTIMetalKernelFunctionOpaque {
  Launch launch;
  bool in_block = false, encoding = false;
};

namespace {

thread_local std::string last_error;

template <class Body>
AOTITorchError guarded(Body body) {
  try {
    body();
    return AOTI_TORCH_SUCCESS;
  } catch (const std::exception& error) {
    last_error = error.what();
    std::fprintf(stderr, "%s\n", error.what());
    return AOTI_TORCH_FAILURE;
  }
}

// What Metal's compiler would stumble over first: there is no file to include at run time.
void check_source(const std::string& source) {
  LOWBIT_CHECK(source.find("#include \"") == std::string::npos,
               "the source includes a file that is not there at run time");
  LOWBIT_CHECK(source.find("[[host_name(name)]]") != std::string::npos,
               "the source names no kernel for the host");
}

Given& argument(AOTIMetalKernelFunctionHandle function, unsigned index) {
  LOWBIT_CHECK(function->encoding, function->launch.kernel->name,
               ": an argument is set before start_encoding");
  LOWBIT_CHECK(index < kMaxArguments, function->launch.kernel->name, ": argument ", index,
               ", Metal has buffers 0 to ", kMaxArguments - 1);
  return function->launch.given[index];
}

std::mutex encoding_mutex;  // torch's queue: one command block at a time

}  // namespace

AOTITorchError aoti_torch_mps_create_shader_library(const char* source,
                                                    AOTIMetalShaderLibraryHandle* library) {
  return guarded([&] {
    check_source(source);
    *library = new AOTIMetalShaderLibraryOpaque{source};
  });
}

AOTITorchError aoti_torch_mps_get_kernel_function(AOTIMetalShaderLibraryHandle library,
                                                  const char* name,
                                                  AOTIMetalKernelFunctionHandle* function) {
  return guarded([&] {
    // As torch does it: the same function object whenever it is asked for.
    static std::mutex mutex;
    static auto* functions = new std::map<std::pair<AOTIMetalShaderLibraryHandle, std::string>,
                                          std::unique_ptr<AOTIMetalKernelFunctionOpaque>>;
    std::lock_guard<std::mutex> lock(mutex);
    auto& slot = (*functions)[{library, name}];
    if (!slot) {
      const Kernel& kernel = find_kernel(name);
      slot.reset(new AOTIMetalKernelFunctionOpaque{{&kernel, {}, {}, 0}});
    }
    *function = slot.get();
  });
}

AOTITorchError aoti_torch_mps_run_command_block(AOTIMetalKernelFunctionHandle function,
                                                aoti_torch_mps_command_block_callback_t callback,
                                                void* user_data) {
  return guarded([&] {
    std::lock_guard<std::mutex> lock(encoding_mutex);
    function->in_block = true;
    callback(function, user_data);
    function->in_block = function->encoding = false;
  });
}

AOTITorchError aoti_torch_mps_start_encoding(AOTIMetalKernelFunctionHandle function) {
  return guarded([&] {
    LOWBIT_CHECK(function->in_block, function->launch.kernel->name,
                 ": start_encoding outside of a command block");
    function->encoding = true;
    for (Given& given : function->launch.given) given = {};
  });
}

AOTITorchError aoti_torch_mps_set_arg_tensor(AOTIMetalKernelFunctionHandle function, unsigned index,
                                             AtenTensorHandle tensor) {
  return guarded([&] {
    void* data = nullptr;
    LOWBIT_CHECK(aoti_torch_get_data_ptr(tensor, &data) == AOTI_TORCH_SUCCESS, "no tensor");
    argument(function, index) = {true, true, data, 0};
  });
}

AOTITorchError aoti_torch_mps_set_arg_int(AOTIMetalKernelFunctionHandle function, unsigned index,
                                          int64_t value) {
  return guarded([&] { argument(function, index) = {true, false, nullptr, value}; });
}

AOTITorchError aoti_torch_mps_dispatch_array_with_group_size(AOTIMetalKernelFunctionHandle function,
                                                             const uint64_t* length,
                                                             size_t length_size,
                                                             const uint64_t* group,
                                                             size_t group_size) {
  return guarded([&] {
    Launch& launch = function->launch;
    LOWBIT_CHECK(function->encoding, launch.kernel->name, ": dispatched before start_encoding");
    LOWBIT_CHECK(length_size == 3 && group_size == 3, launch.kernel->name,
                 ": sizes of other than three dimensions");
    for (int i = 0; i < 3; ++i) {
      LOWBIT_CHECK(group[i] >= 1 && length[i] >= 1 && length[i] % group[i] == 0,
                   launch.kernel->name, ": ", length[i], " threads are no whole threadgroups of ",
                   group[i]);
      LOWBIT_CHECK(i == 0 || group[i] == 1, launch.kernel->name,
                   ": threadgroups of more than one dimension");
      launch.groups[i] = static_cast<uint32_t>(length[i] / group[i]);
    }
    launch.threads = static_cast<int64_t>(group[0]);
    run(launch);
  });
}

// For tests, through ctypes.

// A launch without torch and without csrc/metal's host: words, then tensors, as kernels have them. 0 where it went well.
LOWBIT_EMULATOR_API int lowbit_metal_run(const char* name, const int64_t* words, int word_count,
                                         void* const* tensors, int tensor_count, uint32_t groups_x,
                                         uint32_t groups_y, int threads) {
  return guarded([&] {
    Launch launch{&find_kernel(name), {}, {groups_x, groups_y, 1}, threads};
    for (int i = 0; i < word_count; ++i) launch.given[i] = {true, false, nullptr, words[i]};
    for (int i = 0; i < tensor_count; ++i)
      launch.given[word_count + i] = {true, true, tensors[i], 0};
    run(launch);
  });
}
LOWBIT_EMULATOR_API const char* lowbit_metal_last_error() { return last_error.c_str(); }
LOWBIT_EMULATOR_API const char* lowbit_metal_kernels() { return describe_kernels(); }
LOWBIT_EMULATOR_API void lowbit_metal_reset_launches() { reset_launches(); }
