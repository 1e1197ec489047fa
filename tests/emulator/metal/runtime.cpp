// Threadgroups of Metal on the emulator's fibers: collectives, the registry of kernels, and launches.

#include "emulator/metal/runtime.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <mutex>

#include "common/check.h"
#include "emulator/metal/language_types.h"
#include "emulator/scheduler.h"

namespace metal {
namespace {

namespace emu = lowbit::emulator;
using Operands = void* const (&)[emu::kLanes];

emu::Site site_of(Site at) { return {at.file, at.line}; }

template <class T>
struct Reduce {
  T value, result;
};

// Pairs of lanes that are 16 apart, then 8, ...: some order that is always the same, as on a GPU.
template <class T, T (*kOf)(T, T)>
void run_reduce(Operands operands) {
  T values[emu::kLanes];
  for (int i = 0; i < emu::kLanes; ++i) values[i] = static_cast<Reduce<T>*>(operands[i])->value;
  for (int step = emu::kLanes / 2; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) values[i] = kOf(values[i], values[i + step]);
  }
  for (void* operand : operands) static_cast<Reduce<T>*>(operand)->result = values[0];
}

float sum_of(float a, float b) { return a + b; }
float least_of(float a, float b) { return std::fmin(a, b); }
float most_of(float a, float b) { return std::fmax(a, b); }
uint most_bits_of(uint a, uint b) { return std::max(a, b); }

constexpr emu::Collective kSum = {"simd_sum", run_reduce<float, sum_of>};
constexpr emu::Collective kMin = {"simd_min", run_reduce<float, least_of>};
constexpr emu::Collective kMax = {"simd_max", run_reduce<float, most_of>};
constexpr emu::Collective kMaxBits = {"simd_max", run_reduce<uint, most_bits_of>};
constexpr emu::Collective kBarrier = {"simdgroup_barrier", nullptr};

template <class T>
T reduce(const emu::Collective& collective, T value, Site at) {
  Reduce<T> lane{value, value};
  emu::meet(collective, &lane, site_of(at));
  return lane.result;
}

struct Multiply {
  float* d;
  const float *a, *b, *c;
};

__attribute__((no_sanitize("address", "undefined"), optimize("O3"))) void run_multiply(
    Operands operands) {
  float a[8][8], b[8][8], d[8][8];
  for (uint lane = 0; lane < emu::kLanes; ++lane) {
    const auto& m = *static_cast<Multiply*>(operands[lane]);
    const uint row = lane / 4, column = lane % 4 * 2;
    std::memcpy(&a[row][column], m.a, 8);
    std::memcpy(&b[row][column], m.b, 8);
    std::memcpy(&d[row][column], m.c, 8);
  }
  for (int row = 0; row < 8; ++row) {
    for (int k = 0; k < 8; ++k) {
      for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
    }
  }
  for (uint lane = 0; lane < emu::kLanes; ++lane) {
    std::memcpy(static_cast<Multiply*>(operands[lane])->d, &d[lane / 4][lane % 4 * 2], 8);
  }
}

constexpr emu::Collective kMultiply = {"simdgroup_multiply_accumulate", run_multiply};

}  // namespace

float simd_sum(float value, Site at) { return reduce(kSum, value, at); }
float simd_min(float value, Site at) { return reduce(kMin, value, at); }
float simd_max(float value, Site at) { return reduce(kMax, value, at); }
uint simd_max(uint value, Site at) { return reduce(kMaxBits, value, at); }

void threadgroup_barrier(mem_flags flags, Site at) {
  if (flags == mem_flags::mem_none) {
    emu::fail_here("a threadgroup_barrier that orders no memory", site_of(at));
  }
  emu::meet_block(site_of(at));
}
void simdgroup_barrier(mem_flags flags, Site at) {
  if (flags == mem_flags::mem_none) {
    emu::fail_here("a simdgroup_barrier that orders no memory", site_of(at));
  }
  emu::meet(kBarrier, nullptr, site_of(at));
}

uint lane_of_thread() { return static_cast<uint>(emu::this_thread().index % emu::kLanes); }

void multiply_matrices(float* d, const float* a, const float* b, const float* c, Site at) {
  Multiply operands{d, a, b, c};
  emu::meet(kMultiply, &operands, site_of(at));
}

}  // namespace metal

namespace lowbit::emulator::metal_kernels {
namespace {

struct Registered {
  Kernel kernel;
  int64_t launches = 0;
};

struct Registry {
  std::mutex mutex;
  std::map<std::string, Registered> kernels;
  std::string error;  // of a registration, which cannot throw
  std::string text;
};
// Not destroyed: kernels register themselves before main, and may be asked for until the end.
Registry& registry() {
  static Registry* all = new Registry;
  return *all;
}

struct Running {
  const Launch* launch;
  const void* values[kMaxArguments];  // of tensors and words: the same for all threads
};

void run_thread(const void*, const void* given) {
  const Running& running = *static_cast<const Running*>(given);
  const Kernel& kernel = *running.launch->kernel;
  const Place& place = *current;
  const ::metal::GroupPosition group{
      {place.block_index.x, place.block_index.y, place.block_index.z}};
  const ::metal::ThreadIndex thread{place.thread_index.x};
  const ::metal::LaneIndex lane{place.thread_index.x % kLanes};
  const ::metal::SimdIndex simd{place.thread_index.x / kLanes};
  const void* values[kMaxArguments + 4];
  for (int i = 0; i < kernel.count; ++i) {
    switch (kernel.arguments[i]) {
      case Argument::kGroup:
        values[i] = &group;
        break;
      case Argument::kThread:
        values[i] = &thread;
        break;
      case Argument::kLane:
        values[i] = &lane;
        break;
      case Argument::kSimd:
        values[i] = &simd;
        break;
      default:
        values[i] = running.values[i];
    }
  }
  kernel.run(kernel.function, values);
}

void check_launch(const Launch& launch) {
  const Kernel& kernel = *launch.kernel;
  LOWBIT_CHECK(launch.threads >= 1 && launch.threads <= 1024, kernel.name, ": ", launch.threads,
               " threads in a threadgroup, Metal takes 1 to 1024");
  LOWBIT_CHECK(launch.threads % kLanes == 0, kernel.name, ": ", launch.threads,
               " threads in a threadgroup are no whole SIMD-groups");
  LOWBIT_CHECK(kernel.shared_bytes <= kMaxShared, kernel.name, ": ", kernel.shared_bytes,
               " bytes of threadgroup memory, Metal has ", kMaxShared);
  for (int i = 0; i < kernel.count; ++i) {
    const Argument argument = kernel.arguments[i];
    if (argument != Argument::kTensor && argument != Argument::kWord) continue;
    LOWBIT_CHECK(i < kMaxArguments, kernel.name, ": argument ", i, ", Metal has buffers 0 to ",
                 kMaxArguments - 1);
    const Given& given = launch.given[i];
    LOWBIT_CHECK(given.set, kernel.name, ": argument ", i, " is not set");
    LOWBIT_CHECK(given.is_tensor == (argument == Argument::kTensor), kernel.name, ": argument ", i,
                 " is ", given.is_tensor ? "a tensor" : "an integer", ", the kernel takes ",
                 given.is_tensor ? "an integer" : "a tensor");
  }
  for (int i = 0; i < kMaxArguments; ++i) {
    LOWBIT_CHECK(!launch.given[i].set || i < kernel.count, kernel.name, ": argument ", i,
                 " is set, the kernel has fewer");
  }
}

}  // namespace

bool add_kernel(const Kernel& kernel) {
  Registry& all = registry();
  std::lock_guard<std::mutex> lock(all.mutex);
  if (!all.kernels.insert({kernel.name, {kernel}}).second) {
    all.error = concat("two kernels are called ", kernel.name);
  }
  return true;
}

const Kernel& find_kernel(const std::string& name) {
  Registry& all = registry();
  std::lock_guard<std::mutex> lock(all.mutex);
  LOWBIT_CHECK(all.error.empty(), all.error);
  const auto found = all.kernels.find(name);
  LOWBIT_CHECK(found != all.kernels.end(), "no kernel is called ", name);
  return found->second.kernel;
}

void run(const Launch& launch) {
  check_launch(launch);
  const Kernel& kernel = *launch.kernel;
  {
    Registry& all = registry();
    std::lock_guard<std::mutex> lock(all.mutex);
    ++all.kernels.at(kernel.name).launches;
  }
  Running running{&launch, {}};
  for (int i = 0; i < kernel.count && i < kMaxArguments; ++i) {
    running.values[i] = launch.given[i].is_tensor ? launch.given[i].data : &launch.given[i].word;
  }
  run_grid({kernel.name, kernel.function, run_thread, &running},
           {launch.groups[0], launch.groups[1], launch.groups[2]}, static_cast<int>(launch.threads),
           kernel.shared_bytes);
}

void* shared_memory(uint64_t bytes) {
  if (static_cast<int64_t>(bytes) != current->shared_bytes) {
    fail_here(concat("threadgroup memory of ", bytes, " bytes in a kernel that was given ",
                     current->shared_bytes),
              {nullptr, 0});
  }
  return current->shared;
}

const char* describe_kernels() {
  Registry& all = registry();
  std::lock_guard<std::mutex> lock(all.mutex);
  all.text.clear();
  for (const auto& [name, registered] : all.kernels) {
    all.text += concat(registered.launches, " ", registered.kernel.shared_bytes, " ", name, "\n");
  }
  return all.text.c_str();
}

void reset_launches() {
  Registry& all = registry();
  std::lock_guard<std::mutex> lock(all.mutex);
  for (auto& [name, registered] : all.kernels) registered.launches = 0;
}

}  // namespace lowbit::emulator::metal_kernels
