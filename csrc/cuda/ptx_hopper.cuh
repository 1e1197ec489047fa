// PTX that came with sm_90, in the manner of ptx.cuh: one function per instruction. Included by kernels that are compiled
// for 90a alone (hopper_*.cu).
//
// A memory barrier object is a uint64_t in shared memory. It counts phases; a phase ends when as many threads have arrived
// as it was initialised for, and as many bytes have come as were announced. Phases have parities 0, 1, 0, ...: waiting for
// parity p returns once the phase of that parity is over, and at once for parity 1 where no phase is over yet.
#pragma once

#include <cstdint>

#include "cuda/ptx.cuh"

#if defined(LOWBIT_EMULATOR)
#include "emulator/ptx_hopper.h"
#else

namespace lowbit::cuda::ptx {

// ---- memory barriers (9.7.13.15, mbarrier) -----------------------------------------------------------------------------

__device__ inline void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}
// By the thread that initialised, before others, and copies, meet the barriers (9.7.13.4, fence).
__device__ inline void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Between this thread's plain accesses of shared memory and the asynchronous ones of copies and wgmma (9.7.13.4, fence).
__device__ inline void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ inline void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
// Announces bytes that copies will bring in the current phase.
__device__ inline void mbarrier_expect_tx(uint64_t* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
__device__ inline void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
// Arrives once this thread's cp.async copies so far have landed; the arrival is one of those that the barrier was
// initialised for (9.7.13.15.15, cp.async.mbarrier.arrive).
__device__ inline void cp_async_mbarrier_arrive(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
// Whether the phase of this parity is over; may sleep a while before it says no.
__device__ inline bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t is_over;
  asm volatile(
      "{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
      : "=r"(is_over)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return is_over != 0;
}
__device__ inline void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  while (!mbarrier_try_wait(barrier, parity)) {
  }
}

// ---- bulk copies (9.7.9.25.4, cp.async.bulk) ---------------------------------------------------------------------------

// `bytes` from global to shared memory, completing as many on the barrier. Addresses and bytes are multiples of 16.
__device__ inline void copy_bulk(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}
// The same, marked by a policy of policy_evict_first() to leave the L2 first.
__device__ inline void copy_bulk_once(void* to, const void* from, uint32_t bytes, uint64_t* barrier,
                                      uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1], "
      "%2, [%3], %4;" ::"r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}

// The same, to every block of the cluster whose bit is set in `blocks`: the bytes to where `to` stands in it, and as many
// completed on its barrier, where `barrier` stands. Each of them announces them itself.
__device__ inline void copy_bulk_shared(void* to, const void* from, uint32_t bytes,
                                        uint64_t* barrier, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1], %2, [%3], %4;" ::"r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier)), "h"(blocks)
      : "memory");
}

// ---- clusters: blocks that run together and read each other's shared memory --------------------------------------------

__device__ inline uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ inline uint32_t cluster_size() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}
// Whole warps; what a thread wrote before it arrived is visible to those that have waited (9.7.13.3, barrier.cluster).
__device__ inline void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
// The same without a promise about writes: for a block that must not end while others read from it.
__device__ inline void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ inline void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ inline void sync_cluster() {
  cluster_arrive();
  cluster_wait();
}
// What stands in block `rank` where `own` stands in this one (9.7.9.23, mapa; ld.shared::cluster).
__device__ inline float2 load_cluster(const float2* own, uint32_t rank) {
  float2 value;
  asm volatile(
      "{.reg .b32 a; mapa.shared::cluster.u32 a, %2, %3; ld.shared::cluster.v2.f32 {%0, %1}, [a];}"
      : "=f"(value.x), "=f"(value.y)
      : "r"(shared_address(own)), "r"(rank)
      : "memory");
  return value;
}
// An arrival at the barrier of block `rank` that stands where `own` stands in this one.
__device__ inline void mbarrier_arrive_remote(uint64_t* own, uint32_t rank) {
  asm volatile(
      "{.reg .b32 a; mapa.shared::cluster.u32 a, %0, %1; "
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [a];}" ::"r"(shared_address(own)),
      "r"(rank)
      : "memory");
}

// ---- programmatic dependent launch (9.7.13.14, griddepcontrol) ---------------------------------------------------------

// Waits until the kernels that this launch depends on are done and what they wrote is visible.
__device__ inline void grid_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
// Lets a kernel that was launched to depend on this one start, once every block has said so or ended.
__device__ inline void grid_launch_dependents() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

}  // namespace lowbit::cuda::ptx

#endif  // LOWBIT_EMULATOR
