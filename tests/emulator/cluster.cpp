// Clusters, whose blocks take turns, and launches that depend on the one before.

#include <cstdlib>
#include <cstring>

#include "common/check.h"
#include "emulator/ptx_hopper.h"
#include "emulator/scheduler.h"

namespace lowbit::emulator {
namespace {

// The first that waits: for a memory barrier, rather than for those that wait for one.
const Thread* first_waiting(const std::vector<Block*>& blocks) {
  for (const State state : {State::kWaiting, State::kAtCollective, State::kAtBarrier}) {
    for (const bool cluster : {false, true}) {
      for (const Block* block : blocks) {
        for (const Thread& thread : block->threads) {
          if (thread.state == state &&
              (state != State::kWaiting || (thread.waits_for == nullptr) == cluster))
            return &thread;
        }
      }
    }
  }
  return nullptr;
}

bool is_awaited(const Block& block, const uint64_t* barrier) {
  for (const Thread& thread : block.threads) {
    if (thread.state == State::kWaiting && thread.waits_for == barrier) return true;
  }
  return false;
}

void arrive_at_cluster(const Collective& collective, Site at) {
  check_hopper(collective.name, at);
  meet(collective, nullptr, at);
  Thread& thread = this_thread();
  Cluster& cluster = *thread.block->cluster;
  if (thread.at_cluster != AtCluster::kElsewhere)
    fail_here("a second cluster_arrive before the cluster_wait", at);
  thread.at_cluster = AtCluster::kArrived;
  ++cluster.arrived;
  size_t all = 0;
  for (const Block* block : cluster.blocks) all += block->threads.size();
  if (static_cast<size_t>(cluster.arrived) != all) return;
  cluster.arrived = 0;
  ++cluster.barriers;
  for (Block* block : cluster.blocks) {
    block->async.forget_readers();
    for (Thread& other : block->threads) {
      other.at_cluster = AtCluster::kReleased;
      if (other.state == State::kWaiting && other.waits_for == nullptr) wake_thread(other);
    }
  }
}

}  // namespace

Block& other_block(const void* own, int64_t bytes, uint32_t rank, const char* what, Site at) {
  check_hopper(what, at);
  Block& block = *this_thread().block;
  const Cluster& cluster = *block.cluster;
  if (!is_shared(own, bytes)) fail_here(concat(what, ": not an address of shared memory"), at);
  if (rank >= cluster.blocks.size()) {
    fail_here(concat(what, ": rank ", rank, " of a cluster of ", cluster.blocks.size()), at);
  }
  Block& other = *cluster.blocks[rank];
  if (&other == &block) return other;
  if (cluster.barriers == 0) {
    fail_here(concat(what, ": no barrier of the cluster before it, block ", rank,
                     " may not have started"),
              at);
  }
  if (other.ended) fail_here(concat(what, ": block ", rank, " of the cluster has ended"), at);
  return other;
}

// ---- Cluster -----------------------------------------------------------------------------------------------------------

void Cluster::run(const std::vector<Dim>& indices) {
  error.clear();
  arrived = 0;
  barriers = 0;
  for (size_t i = 0; i < blocks.size(); ++i) {
    blocks[i]->cluster = this;
    blocks[i]->rank = static_cast<uint32_t>(i);
    blocks[i]->start(indices[i]);
  }
  random.state = blocks[0]->random.state ^ 0x5bd1e995u;
  hide_dependence();
  while (turn()) {
  }
  show_dependence();
}

// Every block runs as far as it can. False when all have ended, or something is wrong.
bool Cluster::turn() {
  const Order order = blocks[0]->settings.blocks;
  const auto count = static_cast<uint32_t>(blocks.size());
  const uint32_t first = order == Order::kRandom ? random.below(count) : 0;
  bool moved = false, left = false;
  for (uint32_t i = 0; i < count; ++i) {
    const uint32_t at = (first + i) % count;
    Block& block = *blocks[order == Order::kReverse ? count - 1 - at : at];
    if (block.ended) continue;
    moved = block.advance() || moved;
    left = left || !block.ended;
    if (!block.error.empty()) {
      error = block.error;
      return false;
    }
  }
  if (!left) return false;
  if (moved || land_one()) return error.empty();
  const Thread& waiting = *first_waiting(blocks);
  error = concat(describe(waiting), ": deadlock: ", describe_wait(waiting));
  return false;
}

// Lands a copy, if possible one that somebody waits for. False when none is in flight.
bool Cluster::land_one() {
  struct Choice {
    Block* block;
    size_t flight;
  };
  std::vector<Choice> awaited, others;
  for (Block* block : blocks) {
    for (size_t i = 0; i < block->async.flights.size(); ++i) {
      (is_awaited(*block, block->async.flights[i].barrier) ? awaited : others)
          .push_back({block, i});
    }
  }
  const std::vector<Choice>& choices = awaited.empty() ? others : awaited;
  if (choices.empty()) return false;
  const Order order = blocks[0]->settings.threads;
  const size_t at = order == Order::kForward ? 0
                    : order == Order::kReverse
                        ? choices.size() - 1
                        : random.below(static_cast<uint32_t>(choices.size()));
  Block& block = *choices[at].block;
  const int thread = block.async.flights[choices[at].flight].thread;
  const std::string wrong = block.async.land(choices[at].flight);
  if (!wrong.empty()) {
    block.error = error = concat(describe(block.threads[static_cast<size_t>(thread)]), ": ", wrong);
  }
  return true;
}

// ---- dependent launches ------------------------------------------------------------------------------------------------

// What the launch before may still write is poison until the first grid_wait. Only where blocks run one after the other:
// they share it.
void Cluster::hide_dependence() {
  const cuda::LaunchOptions& options = blocks[0]->call->options;
  const Settings& settings = blocks[0]->settings;
  if (!options.dependent || options.depends_bytes == 0 || settings.workers != 1) return;
  const auto bytes = static_cast<size_t>(options.depends_bytes);
  dependence = static_cast<uint8_t*>(std::malloc(bytes));
  std::memcpy(dependence, options.depends, bytes);
  std::memset(const_cast<void*>(options.depends), settings.poison, bytes);
}

void Cluster::show_dependence() {
  if (dependence == nullptr) return;
  const cuda::LaunchOptions& options = blocks[0]->call->options;
  std::memcpy(const_cast<void*>(options.depends), dependence,
              static_cast<size_t>(options.depends_bytes));
  std::free(dependence);
  dependence = nullptr;
}

void check_dependence(const void* from, int64_t bytes, Site at) {
  const Thread& thread = this_thread();
  const cuda::LaunchOptions& options = thread.block->call->options;
  if (!options.dependent || thread.waited_for_grid) return;
  const auto* begin = static_cast<const uint8_t*>(options.depends);
  const auto* source = static_cast<const uint8_t*>(from);
  if (source < begin + options.depends_bytes && begin < source + bytes) {
    fail_here("a copy of what this launch depends on, before the thread's grid_wait", at);
  }
}

}  // namespace lowbit::emulator

// ---- csrc/cuda/ptx_hopper.cuh ------------------------------------------------------------------------------------------

namespace lowbit::cuda::ptx {

using namespace emulator;

uint32_t cluster_rank() { return this_thread().block->rank; }
uint32_t cluster_size() {
  return static_cast<uint32_t>(this_thread().block->cluster->blocks.size());
}

void cluster_arrive(Site at) {
  static constexpr Collective collective{"cluster_arrive", nullptr};
  arrive_at_cluster(collective, at);
}

void cluster_arrive_relaxed(Site at) {
  static constexpr Collective collective{"cluster_arrive_relaxed", nullptr};
  arrive_at_cluster(collective, at);
}

void cluster_wait(Site at) {
  static constexpr Collective collective{"cluster_wait", nullptr};
  check_hopper(collective.name, at);
  meet(collective, nullptr, at);
  Thread& thread = this_thread();
  if (thread.at_cluster == AtCluster::kElsewhere)
    fail_here("a cluster_wait without a cluster_arrive", at);
  if (thread.at_cluster == AtCluster::kArrived) {
    thread.waits_for = nullptr;
    sleep_thread(at);
  }
  thread.at_cluster = AtCluster::kElsewhere;
}

void sync_cluster(Site at) {
  cluster_arrive(at);
  cluster_wait(at);
}

float2 load_cluster(const float2* own, uint32_t rank, Site at) {
  const Block& other = other_block(own, sizeof(float2), rank, "load_cluster", at);
  if (reinterpret_cast<uintptr_t>(own) % sizeof(float2) != 0)
    fail_here("load_cluster: a misaligned address", at);
  return *reinterpret_cast<const float2*>(other.shared + this_thread().block->offset(own));
}

void grid_wait(Site at) {
  check_hopper("grid_wait", at);
  Thread& thread = this_thread();
  thread.waited_for_grid = true;
  thread.block->cluster->show_dependence();
}

void grid_launch_dependents(Site at) { check_hopper("grid_launch_dependents", at); }

}  // namespace lowbit::cuda::ptx
