// Kernels with one mistake each, which the emulator has to find, beside the same kernel without it.
//
//   self_test planted NAME right|wrong    one line per order: "error TEXT", or "bits HASH nans COUNT"
//   self_test check NAME                  "ok", or "error TEXT"
//   self_test list                        the names of both

#include "emulator/self_test.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>

#include "emulator/settings.h"

namespace lowbit::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarpLanes = 32;

struct Params {
  const float* in;
  float* out;
  uint32_t* counter;
  int n;
  bool wrong;
};

// ---- barriers ----------------------------------------------------------------------------------------------------------

__global__ void barrier_kernel(const Params p) {
  auto* shared = reinterpret_cast<float*>(dynamic_shared());
  const int thread = static_cast<int>(threadIdx.x);
  shared[thread] = p.in[thread];
  if (!p.wrong) ptx::sync_block();
  p.out[thread] = shared[kThreads - 1 - thread];
}

// The right one waits before it writes what slower warps may still read.
__global__ void reuse_kernel(const Params p) {
  auto* shared = reinterpret_cast<float*>(dynamic_shared());
  const int thread = static_cast<int>(threadIdx.x);
  float sum = 0.0f;
  for (int round = 0; round < 3; ++round) {
    shared[thread] = p.in[thread] + static_cast<float>(round);
    ptx::sync_block();
    sum += shared[(thread + 40) % kThreads];
    if (!p.wrong) ptx::sync_block();
  }
  p.out[thread] = sum;
}

__global__ void warp_barrier_kernel(const Params p) {
  auto* shared = reinterpret_cast<float*>(dynamic_shared());
  const int thread = static_cast<int>(threadIdx.x);
  shared[thread] = p.in[thread];
  if (!p.wrong) ptx::sync_warp();
  p.out[thread] = shared[thread ^ 1];
}

__global__ void ldmatrix_barrier_kernel(const Params p) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpLanes;
  uint8_t* shared = dynamic_shared() + thread / kWarpLanes * 512;
  reinterpret_cast<float4*>(shared)[kWarpLanes - 1 - lane] =
      make_float4(p.in[thread], 1.0f, 2.0f, 3.0f);
  if (!p.wrong) ptx::sync_warp();
  uint32_t r[4];
  ptx::ldmatrix_x4(r, shared + 16 * lane);
  p.out[thread] = ptx::bits_as_float(r[0]);
}

__global__ void exit_kernel(const Params p) {
  const int thread = static_cast<int>(threadIdx.x);
  if (p.wrong && thread == 77) return;
  ptx::sync_block();
  p.out[thread] = p.in[thread];
}

__global__ void two_barriers_kernel(const Params p) {
  const int thread = static_cast<int>(threadIdx.x);
  if (p.wrong && thread >= 64) {
    ptx::sync_block();
  } else {
    ptx::sync_block();
  }
  p.out[thread] = p.in[thread];
}

__global__ void shuffle_kernel(const Params p) {
  const int thread = static_cast<int>(threadIdx.x);
  float value = p.in[thread];
  if (!p.wrong || thread % 2 == 0) value = ptx::shuffle_xor(value, 2);
  p.out[thread] = value;
}

__global__ void barrier_in_warp_kernel(const Params p) {
  const int thread = static_cast<int>(threadIdx.x);
  if (p.wrong && thread == 5) {
    ptx::sync_warp();
  } else {
    ptx::sync_block();
  }
  p.out[thread] = p.in[thread];
}

// ---- asynchronous copies -----------------------------------------------------------------------------------------------

enum class Skip { kNothing, kWait, kCommit, kRefillBarrier, kStable };

// Stages of 4 numbers per thread, which the neighbour reads: copy, commit, wait, barrier, read, barrier.
template <Skip kSkip>
__global__ void copy_kernel(const Params p) {
  uint8_t* shared = dynamic_shared();
  const int thread = static_cast<int>(threadIdx.x);
  float sum = 0.0f;
  for (int step = 0; step < 3; ++step) {
    const float* from = p.in + (step * kThreads + thread) * 4;
    ptx::cp_async_16(shared + 16 * thread, from, 16);
    if (kSkip != Skip::kCommit) ptx::cp_async_commit();
    if (kSkip == Skip::kStable) const_cast<float*>(from)[1] += 1.0f;
    if (kSkip != Skip::kWait) ptx::cp_async_wait<0>();
    ptx::sync_block();
    const auto* stage = reinterpret_cast<const float4*>(shared) + (thread + 33) % kThreads;
    sum += stage->x + stage->y + stage->z + stage->w;
    if (kSkip != Skip::kRefillBarrier) ptx::sync_block();
  }
  p.out[thread] = sum;
}

// Two groups in flight; waiting for all but two leaves the one that is read.
template <int kPending>
__global__ void pending_kernel(const Params p) {
  uint8_t* shared = dynamic_shared();
  const int thread = static_cast<int>(threadIdx.x);
  for (int stage = 0; stage < 2; ++stage) {
    ptx::cp_async_16(shared + 16 * (2 * thread + stage), p.in + 8 * thread + 4 * stage, 16);
    ptx::cp_async_commit();
  }
  ptx::cp_async_wait<kPending>();
  p.out[thread] = reinterpret_cast<const float*>(shared)[8 * thread];
}

// A stage becomes something else's while a copy that nobody reads is on its way to it.
__global__ void undrained_kernel(const Params p) {
  uint8_t* shared = dynamic_shared() + 16 * threadIdx.x;
  ptx::cp_async_16(shared, p.in + 4 * threadIdx.x, 16);
  ptx::cp_async_commit();
  if (!p.wrong) ptx::cp_async_wait<0>();
  auto* number = reinterpret_cast<float*>(shared);
  *number = p.in[threadIdx.x];
  p.out[threadIdx.x] = *number;
}

__global__ void misaligned_copy_kernel(const Params p) {
  const int thread = static_cast<int>(threadIdx.x);
  ptx::cp_async_16(dynamic_shared() + 16 * thread, p.in + 4 * thread + (p.wrong ? 1 : 0), 16);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  p.out[thread] = reinterpret_cast<const float*>(dynamic_shared())[4 * thread];
}

__global__ void misaligned_vector_kernel(const Params p) {
  const int thread = static_cast<int>(threadIdx.x);
  const auto* from = reinterpret_cast<const float4*>(p.in + 4 * thread + (p.wrong ? 2 : 0));
  p.out[thread] = from->w;
}

__global__ void misaligned_ldmatrix_kernel(const Params p) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpLanes;
  reinterpret_cast<float4*>(dynamic_shared())[thread] = make_float4(1.0f, 2.0f, 3.0f, 4.0f);
  ptx::sync_block();
  uint32_t r[4];
  ptx::ldmatrix_x4(r, dynamic_shared() + 16 * lane + (p.wrong && lane == 9 ? 8 : 0));
  p.out[thread] = ptx::bits_as_float(r[0]);
}

// ---- out of bounds -----------------------------------------------------------------------------------------------------

__global__ void shared_read_kernel(const Params p) {
  auto* shared = reinterpret_cast<float*>(dynamic_shared());
  const int thread = static_cast<int>(threadIdx.x);
  shared[thread] = p.in[thread];
  ptx::sync_block();
  p.out[thread] = shared[thread + 1 < kThreads || p.wrong ? thread + 1 : 0];
}

__global__ void shared_write_kernel(const Params p) {
  auto* shared = reinterpret_cast<float*>(dynamic_shared());
  const int thread = static_cast<int>(threadIdx.x);
  shared[thread + (p.wrong ? 1 : 0)] = p.in[thread];
  p.out[thread] = p.in[thread];
}

__global__ void shared_copy_kernel(const Params p) {
  const int thread = static_cast<int>(threadIdx.x);
  ptx::cp_async_16(dynamic_shared() + 16 * (thread + (p.wrong ? 1 : 0)), p.in + 4 * thread, 16);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  p.out[thread] = p.in[thread];
}

__global__ void unwritten_kernel(const Params p) {
  auto* shared = reinterpret_cast<float*>(dynamic_shared());
  const int thread = static_cast<int>(threadIdx.x);
  if (!p.wrong || thread != 3) shared[thread] = p.in[thread];
  p.out[thread] = shared[thread];
}

__global__ void global_read_kernel(const Params p) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (inside(i, p.n)) p.out[i] = p.in[i + (p.wrong ? 1 : 0)];
}

__global__ void global_write_kernel(const Params p) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (p.wrong || inside(i, p.n)) p.out[i] = p.in[inside(i, p.n) ? i : 0];
}

__global__ void global_copy_kernel(const Params p) {
  const int thread = static_cast<int>(threadIdx.x);
  const int left = p.n - 4 * thread;
  const int bytes = p.wrong ? 16 : left >= 4 ? 16 : left > 0 ? 4 * left : 0;
  ptx::cp_async_16(dynamic_shared() + 16 * thread, bytes > 0 ? p.in + 4 * thread : p.in, bytes);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  p.out[thread] = reinterpret_cast<const float*>(dynamic_shared())[4 * thread];
}

// ---- between blocks ----------------------------------------------------------------------------------------------------

__global__ void race_kernel(const Params p) {
  const int thread = static_cast<int>(threadIdx.x);
  p.out[p.wrong ? thread % 3 : thread] = p.in[thread];
}

__global__ void block_race_kernel(const Params p) {
  if (threadIdx.x == 0) p.out[p.wrong ? 0 : blockIdx.x] += p.in[blockIdx.x] * 1.1f;
}

// The last block to arrive adds what the others have written.
template <bool kFence>
__global__ void counter_kernel(const Params p) {
  const int thread = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
  auto* shared = reinterpret_cast<uint32_t*>(dynamic_shared());
  p.out[1 + block * kThreads + thread] = p.in[thread] + static_cast<float>(block);
  if (!p.wrong || !kFence) ptx::fence_device();
  if (!p.wrong || kFence) ptx::sync_block();
  if (thread == 0) shared[0] = ptx::atomic_increment(p.counter);
  ptx::sync_block();
  if (shared[0] + 1 != gridDim.x) return;
  ptx::fence_device();
  if (thread != 0) return;
  float sum = 0.0f;
  for (int i = 0; i < static_cast<int>(gridDim.x) * kThreads; ++i) sum += p.out[1 + i];
  p.out[0] = sum;
}

// ---- what a device refuses ---------------------------------------------------------------------------------------------

__global__ void fp8_kernel(const Params p) {
  float d[4] = {};
  const uint32_t a[4] = {};
  if (p.wrong) ptx::mma_e4m3(d, a, 0, 0);
  p.out[threadIdx.x] = d[0];
}

__global__ void trap_kernel(const Params p) {
  if (p.wrong && threadIdx.x == 12) __trap();
  p.out[threadIdx.x] = 0.0f;
}

__global__ void copy_out_kernel(const Params p) { p.out[threadIdx.x] = p.in[threadIdx.x]; }

// ---- running them ------------------------------------------------------------------------------------------------------

using Kernel = void (*)(Params);

struct Shape {
  int blocks = 1;
  int in = kThreads, out = kThreads;  // numbers
  int64_t shared = kThreads * 4;
  int threads = kThreads;
};

void run_kernel(Kernel kernel, bool wrong, const Shape& shape, std::vector<float>& out) {
  // Exactly as large as said and aligned to 16: a vector may have room to spare behind its last element.
  auto* in = static_cast<float*>(
      std::aligned_alloc(16, (static_cast<size_t>(shape.in) * 4 + 15) / 16 * 16));
  std::unique_ptr<float, void (*)(void*)> free_later(in, std::free);
  for (int i = 0; i < shape.in; ++i) in[i] = static_cast<float>((i * 37 + 11) % 101) * 0.37f;
  out.assign(static_cast<size_t>(shape.out), 0.0f);
  out.shrink_to_fit();
  uint32_t counter = 0;
  launch("planted", kernel, Grid{static_cast<uint32_t>(shape.blocks)}, shape.threads, shape.shared,
         nullptr, Params{in, out.data(), &counter, shape.in, wrong});
}

template <Kernel kKernel, int kBlocks = 1, int kIn = kThreads, int kOut = kThreads,
          int kShared = kThreads * 4>
void run(bool wrong, std::vector<float>& out) {
  run_kernel(kKernel, wrong, {kBlocks, kIn, kOut, kShared}, out);
}

template <Kernel kRight, Kernel kWrong, int kIn, int kShared>
void run_either(bool wrong, std::vector<float>& out) {
  run_kernel(wrong ? kWrong : kRight, wrong, {1, kIn, kThreads, kShared}, out);
}

template <Skip kSkip>
constexpr auto run_copy =
    run_either<copy_kernel<Skip::kNothing>, copy_kernel<kSkip>, 12 * kThreads, 16 * kThreads>;

void run_fp8(bool wrong, std::vector<float>& out) {
  lowbit_emulator_set_device(wrong ? 86 : 89, 4);
  run<fp8_kernel>(true, out);
}
void run_shared_size(bool wrong, std::vector<float>& out) {
  lowbit_emulator_set_device(86, 4);
  run_kernel(copy_out_kernel, wrong, {1, kThreads, kThreads, (99 << 10) + (wrong ? 1 : 0)}, out);
}
void run_thread_count(bool wrong, std::vector<float>& out) {
  run_kernel(copy_out_kernel, wrong, {1, 2048, 2048, 0, wrong ? 1025 : 1024}, out);
}
// A warp that is not full cannot multiply matrices.
void run_part_warp(bool wrong, std::vector<float>& out) {
  run_kernel(shuffle_kernel, false, {1, kThreads, kThreads, 0, wrong ? 48 : 64}, out);
}

}  // namespace

const std::vector<Planted> kPlanted = {
    {"missing_barrier", run<barrier_kernel>},
    {"missing_second_barrier", run<reuse_kernel>},
    {"missing_sync_warp", run<warp_barrier_kernel>},
    {"missing_sync_warp_before_ldmatrix",
     run<ldmatrix_barrier_kernel, 1, kThreads, kThreads, kThreads * 16>},
    {"exit_before_barrier", run<exit_kernel>},
    {"two_barriers", run<two_barriers_kernel>},
    {"divergent_shuffle", run<shuffle_kernel>},
    {"barrier_beside_sync_warp", run<barrier_in_warp_kernel>},
    {"missing_wait", run_copy<Skip::kWait>},
    {"missing_commit", run_copy<Skip::kCommit>},
    {"refill_without_barrier", run_copy<Skip::kRefillBarrier>},
    {"source_changes", run_copy<Skip::kStable>},
    {"wait_for_too_few",
     run_either<pending_kernel<1>, pending_kernel<2>, 8 * kThreads, 32 * kThreads>},
    {"undrained_copy", run<undrained_kernel, 1, 4 * kThreads, kThreads, 16 * kThreads>},
    {"misaligned_copy", run<misaligned_copy_kernel, 1, 4 * kThreads + 4, kThreads, 16 * kThreads>},
    {"misaligned_vector", run<misaligned_vector_kernel, 1, 4 * kThreads + 4, kThreads, 0>},
    {"misaligned_ldmatrix", run<misaligned_ldmatrix_kernel, 1, kThreads, kThreads, 16 * kThreads>},
    {"shared_read", run<shared_read_kernel>},
    {"shared_write", run<shared_write_kernel>},
    {"shared_copy", run<shared_copy_kernel, 1, 4 * kThreads, kThreads, 16 * kThreads>},
    {"unwritten_shared", run<unwritten_kernel>},
    {"global_read", run<global_read_kernel, 2, 200, 200>},
    {"global_write", run<global_write_kernel, 2, 200, 200>},
    {"global_copy", run<global_copy_kernel, 1, 420, kThreads, 16 * kThreads>},
    {"race", run<race_kernel>},
    {"block_race", run<block_race_kernel, 40>},
    {"missing_fence", run<counter_kernel<true>, 6, kThreads, 1 + 6 * kThreads>},
    {"missing_barrier_before_count", run<counter_kernel<false>, 6, kThreads, 1 + 6 * kThreads>},
    {"fp8_below_sm_89", run_fp8},
    {"too_much_shared_memory", run_shared_size},
    {"too_many_threads", run_thread_count},
    {"part_of_a_warp", run_part_warp},
    {"trap", run<trap_kernel>},
};

}  // namespace lowbit::cuda

// ---- main --------------------------------------------------------------------------------------------------------------

using namespace lowbit::cuda;

static void print_outcome(const std::vector<float>& out) {
  uint64_t hash = 14695981039346656037u;  // (FNV-1a)
  int nans = 0;
  for (const float value : out) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    hash = (hash ^ bits) * 1099511628211u;
    nans += std::isnan(value) ? 1 : 0;
  }
  std::printf("bits %016llx nans %d\n", static_cast<unsigned long long>(hash), nans);
}

static void run_orders(const Planted& planted, bool wrong) {
  for (int i = 0; i < 5; ++i) {
    const int order = i < 2 ? i : 2;
    lowbit_emulator_set_device(90, 4);
    lowbit_emulator_set_orders(order, order, static_cast<uint64_t>(i));
    try {
      std::vector<float> out;
      planted.run(wrong, out);
      print_outcome(out);
    } catch (const lowbit::Error& error) {
      std::printf("error %s\n", error.what());
    }
    std::fflush(stdout);
  }
}

static void run_check(const Check& check) {
  try {
    check.run();
    std::printf("ok\n");
  } catch (const lowbit::Error& error) {
    std::printf("error %s\n", error.what());
  }
}

int main(int count, char** words) {
  const std::string what = count > 1 ? words[1] : "", name = count > 2 ? words[2] : "";
  for (const auto* mistakes : {&kPlanted, &kHopperPlanted, &kWgmmaPlanted, &kSharedPlanted}) {
    for (const Planted& planted : *mistakes) {
      if (what == "list") std::printf("planted %s\n", planted.name);
      if (what == "planted" && name == planted.name) {
        run_orders(planted, count > 3 && std::string(words[3]) == "wrong");
        return 0;
      }
    }
  }
  for (const auto* checks : {&kExchangeChecks, &kMatrixChecks, &kNumberChecks, &kWgmmaChecks}) {
    for (const Check& check : *checks) {
      if (what == "list") std::printf("check %s\n", check.name);
      if (what == "check" && name == check.name) {
        run_check(check);
        return 0;
      }
    }
  }
  return what == "list" ? 0 : 2;
}
