// Mistakes with memory barriers, bulk copies, clusters and dependent launches, each beside the same kernel without it.

#include "cuda/ptx_hopper.cuh"
#include "emulator/self_test.h"
#include "emulator/settings.h"

namespace lowbit::cuda {
namespace {

enum class Mistake {
  kNone,
  kNoFullWait,
  kNoEmptyWait,
  kOwnWait,       // for its copy to have landed, not for its readers
  kOwnWaitAlone,  // and nobody else does
  kNoArrive,
  kNoExpect,
  kExpectMore,
  kExpectTooMuch,
  kExtraArrive,
  kNoFence,
  kNoInitBarrier,
  kNoInit,
  kTwoInits,
  kOverwrite,
  kCopyOntoBarrier,
  kMisaligned,
  kOddSize,
  kPastEnd,
  kNoDrain,
  kSourceChanges,
  kTargetWritten,
  kNoAsyncArrive,
  kNoClusterBarrier,
  kNoSecondBarrier,
  kNoLastBarrier,
  kHalfArrives,
  kWaitOnly,
  kFarRank,
  kNoGridWait,
  kEarlyRead,
  kEarlyCopy,
};

struct Params {
  const float* in;
  float* out;
  Mistake mistake;
  __device__ bool has(Mistake m) const { return mistake == m; }
};

constexpr int kThreads = 128, kReaders = 96, kSteps = 5, kStages = 2;
constexpr int kStageBytes = kReaders * 16;
constexpr int kInPlace = 64;  // bytes of barriers in front of the stages

// ---- a ring ------------------------------------------------------------------------------------------------------------

// The last warp fills two stages in turn, three warps read them: lane l of warp w adds what the neighbour's 16 bytes hold.
__device__ void fill(const Params& p, uint64_t* full, uint64_t* empty, uint8_t* stages) {
  for (int step = 0; step < kSteps; ++step) {
    const int s = step % kStages;
    uint8_t* to = stages + s * kStageBytes;
    const auto* from = reinterpret_cast<const uint8_t*>(p.in) + step * kStageBytes;
    if (step >= kStages && !p.has(Mistake::kNoEmptyWait)) {
      const bool of_itself = p.has(Mistake::kOwnWait) || p.has(Mistake::kOwnWaitAlone);
      ptx::mbarrier_wait((of_itself ? full : empty) + s,
                         static_cast<uint32_t>(step / kStages - 1) % 2);
    }
    if (p.has(Mistake::kNoExpect)) {
      ptx::mbarrier_arrive(full + s);
    } else {
      uint32_t bytes = kStageBytes;
      if (p.has(Mistake::kExpectMore) && step == 3) bytes += 16;
      if (p.has(Mistake::kExpectTooMuch)) bytes = 1 << 20;
      ptx::mbarrier_arrive_expect_tx(full + s, bytes);
    }
    if (p.has(Mistake::kExtraArrive) && step == 1) ptx::mbarrier_arrive(full + s);
    if (p.has(Mistake::kMisaligned)) from += 4;
    if (p.has(Mistake::kPastEnd) && step == 3) to += kStages * kStageBytes;
    if (p.has(Mistake::kCopyOntoBarrier)) to = reinterpret_cast<uint8_t*>(full);
    const uint32_t part = p.has(Mistake::kOddSize) ? 24 : 64;
    ptx::copy_bulk_once(to, from, part, full + s, ptx::policy_evict_first());
    ptx::copy_bulk(to + part, from + part, kStageBytes - part, full + s);
    if (p.has(Mistake::kSourceChanges)) const_cast<uint8_t*>(from)[9] ^= 1;
    if (p.has(Mistake::kTargetWritten)) to[9] = 1;
  }
}

__global__ void ring_kernel(const Params p) {
  auto* full = reinterpret_cast<uint64_t*>(dynamic_shared());
  uint64_t* empty = full + kStages;
  uint8_t* stages = dynamic_shared() + kInPlace;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    for (int s = 0; s < kStages && !p.has(Mistake::kNoInit); ++s) {
      ptx::mbarrier_init(full + s, 1);
      ptx::mbarrier_init(empty + s, kReaders / 32);
    }
    if (p.has(Mistake::kTwoInits)) ptx::mbarrier_init(empty, 1);
    if (!p.has(Mistake::kNoFence)) ptx::fence_mbarrier_init();
    if (p.has(Mistake::kOverwrite)) *empty = 0;
  }
  if (!p.has(Mistake::kNoInitBarrier)) ptx::sync_block();
  p.out[thread] = 0.0f;
  if (thread == kReaders) fill(p, full, empty, stages);
  if (thread >= kReaders) return;
  float sum = 0.0f;
  const int last = p.has(Mistake::kNoDrain) ? kSteps - 1 : kSteps;
  for (int step = 0; step < last; ++step) {
    const int s = step % kStages;
    if (!p.has(Mistake::kNoFullWait) && !p.has(Mistake::kOwnWaitAlone))
      ptx::mbarrier_wait(full + s, static_cast<uint32_t>(step / kStages) % 2);
    const auto* four =
        reinterpret_cast<const float4*>(stages + s * kStageBytes) + (thread + 40) % kReaders;
    sum += four->x + four->y * 2.0f + four->z + four->w;
    ptx::sync_warp();
    if (thread % 32 == 0 && !(p.has(Mistake::kNoArrive) && thread == 64))
      ptx::mbarrier_arrive(empty + s);
  }
  p.out[thread] = sum;
}

// Every thread copies 16 bytes with cp.async and arrives at the barrier when they are there.
__global__ void async_arrive_kernel(const Params p) {
  auto* full = reinterpret_cast<uint64_t*>(dynamic_shared());
  uint8_t* stage = dynamic_shared() + kInPlace;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    ptx::mbarrier_init(full, kThreads);
    ptx::fence_mbarrier_init();
  }
  ptx::sync_block();
  ptx::cp_async_16(stage + 16 * thread, p.in + 4 * thread, 16);
  if (!p.has(Mistake::kNoAsyncArrive) || thread != 3) ptx::cp_async_mbarrier_arrive(full);
  if (p.has(Mistake::kNoFullWait)) {
    ptx::sync_block();
  } else {
    ptx::mbarrier_wait(full, 0);
  }
  p.out[thread] = reinterpret_cast<const float*>(stage)[4 * ((thread + 50) % kThreads)];
  ptx::sync_block();
}

// ---- clusters ----------------------------------------------------------------------------------------------------------

// Every block adds, in the order of ranks, what all blocks of its cluster have stored, twice.
__global__ void cluster_kernel(const Params p) {
  auto* shared = reinterpret_cast<float2*>(dynamic_shared());
  const int thread = static_cast<int>(threadIdx.x);
  const uint32_t rank = ptx::cluster_rank(), size = ptx::cluster_size();
  float sum = 0.0f;
  for (int round = 0; round < 2; ++round) {
    shared[thread] = make_float2(p.in[thread] * static_cast<float>(rank + 1), p.in[thread + 7]);
    if (p.has(Mistake::kWaitOnly)) {
      ptx::cluster_wait();
    } else if (p.has(Mistake::kHalfArrives)) {
      if (thread < 64) ptx::sync_cluster();
    } else if (!p.has(Mistake::kNoClusterBarrier)) {
      ptx::sync_cluster();
    }
    for (uint32_t r = 0; r < size + (p.has(Mistake::kFarRank) ? 1 : 0); ++r) {
      const float2 part = ptx::load_cluster(shared + (thread + 1) % kThreads, r);
      sum = sum * 1.25f + part.x - part.y;
    }
    if (round == 1 && p.has(Mistake::kNoLastBarrier)) break;
    if (!p.has(Mistake::kNoSecondBarrier)) {
      ptx::cluster_arrive_relaxed();
      ptx::cluster_wait();
    }
    shared[thread] = make_float2(static_cast<float>(round), 3.0f);
  }
  p.out[blockIdx.x * kThreads + threadIdx.x] = sum;
}

// The neighbour's warp tells this block's barrier that it is ready.
__global__ void remote_arrive_kernel(const Params p) {
  auto* barrier = reinterpret_cast<uint64_t*>(dynamic_shared());
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    ptx::mbarrier_init(barrier, kThreads);
    ptx::fence_mbarrier_init();
  }
  ptx::sync_cluster();
  if (!p.has(Mistake::kNoArrive) || thread != 17)
    ptx::mbarrier_arrive_remote(barrier, (ptx::cluster_rank() + 1) % ptx::cluster_size());
  ptx::mbarrier_wait(barrier, 0);
  p.out[blockIdx.x * kThreads + threadIdx.x] = p.in[thread];
  ptx::sync_cluster();
}

// ---- dependent launches ------------------------------------------------------------------------------------------------

__global__ void dependent_kernel(const Params p) {
  const int thread = static_cast<int>(threadIdx.x);
  const float early = p.in[thread];
  ptx::grid_launch_dependents();
  if (p.has(Mistake::kEarlyCopy)) {
    ptx::cp_async_16(dynamic_shared() + 16 * thread, p.in, 16);
    ptx::cp_async_wait<0>();
  }
  if (!p.has(Mistake::kNoGridWait)) ptx::grid_wait();
  p.out[thread] = p.has(Mistake::kEarlyRead) ? early : p.in[thread];
}

__global__ void sm_90_kernel(const Params p) {
  ptx::grid_wait();
  p.out[threadIdx.x] = p.in[threadIdx.x];
}

// ---- running them ------------------------------------------------------------------------------------------------------

using Kernel = void (*)(Params);

void start(Kernel kernel, Mistake mistake, LaunchOptions options, uint32_t blocks,
           std::vector<float>& out) {
  alignas(16) static float in[kSteps * kReaders * 4];
  for (size_t i = 0; i < std::size(in); ++i)
    in[i] = static_cast<float>((i * 37 + 11) % 101) * 0.37f;
  out.assign(blocks * kThreads, 0.0f);
  if (options.dependent) {
    options.depends = in;
    options.depends_bytes = sizeof in;
  }
  launch_with(options, "planted", kernel, Grid{blocks}, kThreads, kInPlace + kStages * kStageBytes,
              nullptr, Params{in, out.data(), mistake});
}

template <Mistake kMistake>
void ring(bool wrong, std::vector<float>& out) {
  start(ring_kernel, wrong ? kMistake : Mistake::kNone, {}, 2, out);
}
template <Mistake kMistake>
void async_arrive(bool wrong, std::vector<float>& out) {
  start(async_arrive_kernel, wrong ? kMistake : Mistake::kNone, {}, 2, out);
}
template <Mistake kMistake>
void cluster(bool wrong, std::vector<float>& out) {
  start(cluster_kernel, wrong ? kMistake : Mistake::kNone, {4}, 8, out);
}
void remote_arrive(bool wrong, std::vector<float>& out) {
  start(remote_arrive_kernel, wrong ? Mistake::kNoArrive : Mistake::kNone, {2}, 4, out);
}
template <Mistake kMistake>
void dependent(bool wrong, std::vector<float>& out) {
  start(dependent_kernel, wrong ? kMistake : Mistake::kNone, {1, true}, 1, out);
}
void below_sm_90(bool wrong, std::vector<float>& out) {
  if (wrong) lowbit_emulator_set_device(89, 4);
  start(sm_90_kernel, Mistake::kNone, {}, 1, out);
}
void ragged_clusters(bool wrong, std::vector<float>& out) {
  start(cluster_kernel, Mistake::kNone, {4}, wrong ? 6 : 8, out);
}

}  // namespace

const std::vector<Planted> kHopperPlanted = {
    {"missing_full_wait", ring<Mistake::kNoFullWait>},
    {"missing_empty_wait", ring<Mistake::kNoEmptyWait>},
    {"refill_of_what_is_read", ring<Mistake::kOwnWait>},
    {"refill_of_what_nobody_read", ring<Mistake::kOwnWaitAlone>},
    {"missing_arrive", ring<Mistake::kNoArrive>},
    {"missing_expect_tx", ring<Mistake::kNoExpect>},
    {"too_many_bytes_expected", ring<Mistake::kExpectMore>},
    {"more_bytes_than_a_barrier_counts", ring<Mistake::kExpectTooMuch>},
    {"extra_arrive", ring<Mistake::kExtraArrive>},
    {"missing_init_fence", ring<Mistake::kNoFence>},
    {"missing_barrier_after_init", ring<Mistake::kNoInitBarrier>},
    {"missing_init", ring<Mistake::kNoInit>},
    {"two_inits", ring<Mistake::kTwoInits>},
    {"barrier_overwritten", ring<Mistake::kOverwrite>},
    {"copy_onto_barrier", ring<Mistake::kCopyOntoBarrier>},
    {"misaligned_bulk_copy", ring<Mistake::kMisaligned>},
    {"odd_bulk_copy", ring<Mistake::kOddSize>},
    {"bulk_copy_past_the_end", ring<Mistake::kPastEnd>},
    {"undrained_bulk_copy", ring<Mistake::kNoDrain>},
    {"bulk_source_changes", ring<Mistake::kSourceChanges>},
    {"bulk_destination_written", ring<Mistake::kTargetWritten>},
    {"missing_async_arrive", async_arrive<Mistake::kNoAsyncArrive>},
    {"missing_async_wait", async_arrive<Mistake::kNoFullWait>},
    {"missing_cluster_barrier", cluster<Mistake::kNoClusterBarrier>},
    {"missing_second_cluster_barrier", cluster<Mistake::kNoSecondBarrier>},
    {"missing_last_cluster_barrier", cluster<Mistake::kNoLastBarrier>},
    {"half_of_a_block_arrives", cluster<Mistake::kHalfArrives>},
    {"cluster_wait_alone", cluster<Mistake::kWaitOnly>},
    {"rank_outside_the_cluster", cluster<Mistake::kFarRank>},
    {"missing_remote_arrive", remote_arrive},
    {"missing_grid_wait", dependent<Mistake::kNoGridWait>},
    {"read_before_grid_wait", dependent<Mistake::kEarlyRead>},
    {"copy_before_grid_wait", dependent<Mistake::kEarlyCopy>},
    {"grid_wait_below_sm_90", below_sm_90},
    {"ragged_clusters", ragged_clusters},
};

}  // namespace lowbit::cuda
