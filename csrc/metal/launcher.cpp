#include "metal/launcher.h"

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <atomic>

namespace lowbit::metal {
namespace {

std::atomic<const Launcher*> chosen{nullptr};

// The library that has torch's C functions, however it was loaded: RTLD_DEFAULT would not see all of them.
void* open_torch() {
  Dl_info found;
  if (dladdr(reinterpret_cast<void*>(&aoti_torch_get_storage_offset), &found) == 0) return nullptr;
  return dlopen(found.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
}

}  // namespace

void set_launcher(const Launcher& launcher) {
  // Kept for good: another thread may be about to call it.
  const bool is_null = launcher.compile == nullptr || launcher.launch == nullptr;
  chosen.store(is_null ? nullptr : new Launcher(launcher), std::memory_order_release);
}

const Launcher* launcher() { return chosen.load(std::memory_order_acquire); }

void* torch_function(const char* name) {
  static void* const torch = open_torch();
  return torch == nullptr ? nullptr : dlsym(torch, name);
}

bool has_metal_interface() {
#define LOWBIT_HAS(name) torch_function("aoti_torch_mps_" #name) != nullptr&&
  return LOWBIT_METAL_INTERFACE(LOWBIT_HAS) true;
#undef LOWBIT_HAS
}

}  // namespace lowbit::metal
