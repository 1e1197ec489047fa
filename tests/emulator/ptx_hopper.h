// csrc/cuda/ptx_hopper.cuh on the CPU: the same functions. What they do is in mbarrier.cpp and cluster.cpp.
#pragma once

#include <cstdint>

#include "emulator/ptx.h"

namespace lowbit::cuda::ptx {

// ---- memory barriers ---------------------------------------------------------------------------------------------------

void mbarrier_init(uint64_t* barrier, uint32_t arrivals, Site at = Site::here());
void fence_mbarrier_init(Site at = Site::here());
void fence_proxy_async(Site at = Site::here());
void mbarrier_arrive(uint64_t* barrier, Site at = Site::here());
void mbarrier_expect_tx(uint64_t* barrier, uint32_t bytes, Site at = Site::here());
void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes, Site at = Site::here());
void cp_async_mbarrier_arrive(uint64_t* barrier, Site at = Site::here());
// In random order sometimes says no though nobody else could run.
bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity, Site at = Site::here());
void mbarrier_wait(uint64_t* barrier, uint32_t parity, Site at = Site::here());

// ---- bulk copies -------------------------------------------------------------------------------------------------------

void copy_bulk(void* to, const void* from, uint32_t bytes, uint64_t* barrier,
               Site at = Site::here());
void copy_bulk_once(void* to, const void* from, uint32_t bytes, uint64_t* barrier, uint64_t policy,
                    Site at = Site::here());
void copy_bulk_shared(void* to, const void* from, uint32_t bytes, uint64_t* barrier,
                      uint16_t blocks, Site at = Site::here());

// ---- clusters ----------------------------------------------------------------------------------------------------------

uint32_t cluster_rank();
uint32_t cluster_size();
void cluster_arrive(Site at = Site::here());
void cluster_arrive_relaxed(Site at = Site::here());
void cluster_wait(Site at = Site::here());
void sync_cluster(Site at = Site::here());
float2 load_cluster(const float2* own, uint32_t rank, Site at = Site::here());
void mbarrier_arrive_remote(uint64_t* own, uint32_t rank, Site at = Site::here());

// ---- programmatic dependent launch -------------------------------------------------------------------------------------

void grid_wait(Site at = Site::here());
void grid_launch_dependents(Site at = Site::here());

}  // namespace lowbit::cuda::ptx
