// Mistakes with copies to several blocks of a cluster, each beside the same kernel without it.
//
// Two blocks go around rings of two stages in step. A stage is a box of a matrix, of which each block copies one half, and a
// table, which they copy in turns; all of it to both. Both add up all of it.

#include <memory>

#include "cuda/ptx_hopper.cuh"
#include "cuda/ptx_wgmma.cuh"
#include "emulator/self_test.h"

namespace lowbit::cuda {
namespace {

enum class Mistake {
  kNone,
  kOwnBytesOnly,  // announced, though the other block brings the rest
  kNoExpect,
  kOneBlock,        // gets what both want
  kFarBlock,        // is not in the cluster
  kNoBlock,         // gets it
  kOwnArriveOnly,   // the other block waits for ever
  kOwnReadersOnly,  // a block refills what the other one's readers have not read
  kNoFirstBarrier,
  kNoLastBarrier,
};

struct Params {
  const uint8_t* table;
  float* out;
  Mistake mistake;
  __device__ bool has(Mistake m) const { return mistake == m; }
};

constexpr int kBlocks = 2, kReaders = 64, kThreads = kReaders + 32;
constexpr int kSteps = 5, kStages = 2, kRows = 16;
constexpr int kBox = kRows * kBoxBytes, kTable = 256, kStage = 3 * 1024;
constexpr int kShared = kStages * kStage + 64;
static_assert(kBox + kTable <= kStage, "patterns of 1024 bytes");

__device__ void produce(const Params& p, const TensorMap& x, uint64_t* full, uint64_t* empty) {
  const auto rank = static_cast<int>(ptx::cluster_rank());
  uint16_t both = 3;
  if (p.has(Mistake::kOneBlock)) both = static_cast<uint16_t>(1 << rank);
  if (p.has(Mistake::kFarBlock)) both = 7;
  if (p.has(Mistake::kNoBlock)) both = 0;
  ptx::prefetch_map(x);
  for (int step = 0; step < kSteps; ++step) {
    const int s = step % kStages;
    uint8_t* const to = dynamic_shared() + s * kStage;
    if (step >= kStages)
      ptx::mbarrier_wait(empty + s, static_cast<uint32_t>(step / kStages - 1) % 2);
    if (p.has(Mistake::kNoExpect)) {
      ptx::mbarrier_arrive(full + s);
    } else {
      ptx::mbarrier_arrive_expect_tx(full + s,
                                     p.has(Mistake::kOwnBytesOnly) ? kBox / 2 : kBox + kTable);
    }
    const int half = kRows / kBlocks * rank;
    ptx::copy_box_shared(to + half * kBoxBytes, x, half, 64 * step, full + s, both);
    if (step % kBlocks == rank)
      ptx::copy_bulk_shared(to + kBox, p.table + step * kTable, kTable, full + s, both);
  }
}

__device__ float consume(const Params& p, uint64_t* full, uint64_t* empty) {
  const int thread = static_cast<int>(threadIdx.x);
  float sum = 0.0f;
  for (int step = 0; step < kSteps; ++step) {
    const int s = step % kStages;
    ptx::mbarrier_wait(full + s, static_cast<uint32_t>(step / kStages) % 2);
    const uint8_t* const bytes = dynamic_shared() + s * kStage;
    for (int i = thread; i < kBox + kTable; i += kReaders)
      sum += static_cast<float>(bytes[i]) * static_cast<float>(1 + i % 5 + step);
    ptx::sync_warp();
    if (thread % 32 == 0) ptx::mbarrier_arrive(empty + s);
    if (thread % 32 == 1 && !p.has(Mistake::kOwnArriveOnly) && !p.has(Mistake::kOwnReadersOnly))
      ptx::mbarrier_arrive_remote(empty + s, 1 - ptx::cluster_rank());
  }
  return sum;
}

__global__ void shared_kernel(const Params p, const __grid_constant__ TensorMap x) {
  const int thread = static_cast<int>(threadIdx.x);
  auto* const full = reinterpret_cast<uint64_t*>(dynamic_shared() + kStages * kStage);
  uint64_t* const empty = full + kStages;
  if (thread == 0) {
    for (int s = 0; s < kStages; ++s) {
      ptx::mbarrier_init(full + s, 1);
      ptx::mbarrier_init(empty + s, kReaders / 32 * (p.has(Mistake::kOwnReadersOnly) ? 1 : 2));
    }
    ptx::fence_mbarrier_init();
  }
  if (p.has(Mistake::kNoFirstBarrier)) {
    ptx::sync_block();
  } else {
    ptx::sync_cluster();
  }
  if (thread == kReaders) produce(p, x, full, empty);
  float sum = 0.0f;
  if (thread < kReaders) sum = consume(p, full, empty);
  p.out[static_cast<int>(blockIdx.x) * kThreads + thread] = sum;
  ptx::sync_warp();
  if (!p.has(Mistake::kNoLastBarrier)) ptx::sync_cluster();
}

template <Mistake kMistake>
void shared(bool wrong, std::vector<float>& out) {
  constexpr int columns = 64 * kSteps;
  struct alignas(16) Row {
    uint16_t element[columns];
  };
  const auto x = std::make_unique<Row[]>(kRows);
  for (int r = 0; r < kRows; ++r) {
    for (int k = 0; k < columns; ++k)
      x[static_cast<size_t>(r)].element[k] = static_cast<uint16_t>(31 * r + 7 * k);
  }
  struct alignas(16) Table {
    uint8_t bytes[kSteps * kTable];
  };
  const auto table = std::make_unique<Table>();
  for (int i = 0; i < kSteps * kTable; ++i) table->bytes[i] = static_cast<uint8_t>(i * 11);
  out.assign(4 * kThreads, 0.0f);
  const TensorMap map =
      make_tensor_map("shared", {x.get(), kRows, columns, sizeof(Row), 2, kRows / kBlocks});
  LaunchOptions options;
  options.cluster = kBlocks;
  launch_with(options, "planted", shared_kernel, Grid{4}, kThreads, kShared, nullptr,
              Params{table->bytes, out.data(), wrong ? kMistake : Mistake::kNone}, map);
}

}  // namespace

const std::vector<Planted> kSharedPlanted = {
    {"expect_of_own_copies_only", shared<Mistake::kOwnBytesOnly>},
    {"missing_expect_of_the_others", shared<Mistake::kNoExpect>},
    {"copy_to_one_block", shared<Mistake::kOneBlock>},
    {"copy_past_the_cluster", shared<Mistake::kFarBlock>},
    {"copy_to_no_block", shared<Mistake::kNoBlock>},
    {"arrive_at_own_block_only", shared<Mistake::kOwnArriveOnly>},
    {"count_of_own_readers_only", shared<Mistake::kOwnReadersOnly>},
    {"copy_before_cluster_barrier", shared<Mistake::kNoFirstBarrier>},
    {"arrive_after_the_others_end", shared<Mistake::kNoLastBarrier>},
};

}  // namespace lowbit::cuda
