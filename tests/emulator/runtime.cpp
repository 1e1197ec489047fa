// csrc/cuda/runtime.h on the CPU, the settings, and how a grid is dealt to CPU threads.

#include "cuda/runtime.h"

#include <dlfcn.h>

#include <algorithm>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "common/check.h"
#include "cuda/select.h"
#include "emulator/faults.h"
#include "emulator/scheduler.h"

namespace lowbit::emulator {
namespace {

constexpr uint32_t kMostCluster = 8;

// ---- a grid ------------------------------------------------------------------------------------------------------------

// The clusters of one launch, in the order in which they start. Mostly a cluster is one block.
class Work {
 public:
  Work(const Call& call, cuda::Grid grid, int threads, int64_t shared)
      : call_(call),
        settings_(settings()),
        grid_(grid),
        threads_(threads),
        shared_(shared),
        order_(size_t{grid.x} * grid.y * grid.z / call.options.cluster) {
    std::iota(order_.begin(), order_.end(), 0u);
    if (settings_.blocks == Order::kReverse) {
      std::iota(order_.rbegin(), order_.rend(), 0u);
    } else if (settings_.blocks == Order::kRandom) {
      Random random{settings_.seed + 1};
      for (size_t i = order_.size() - 1; i > 0; --i) {
        std::swap(order_[i], order_[random.below(static_cast<uint32_t>(i) + 1)]);
      }
    }
  }

  // Runs clusters until none is left. Any number of CPU threads call this at once. Fibers stay with the CPU thread that
  // made them, so each keeps its own places to run blocks.
  void run() {
    static thread_local std::vector<std::unique_ptr<Block>> blocks;
    const uint32_t size = call_.options.cluster, wide = grid_.x / size;
    Cluster cluster{};
    watch_faults();
    for (uint32_t linear; take(linear);) {
      while (blocks.size() < size) blocks.push_back(std::make_unique<Block>());
      if (cluster.blocks.empty()) {
        for (uint32_t i = 0; i < size; ++i) {
          blocks[i]->prepare(call_, settings_, grid_, threads_, shared_);
          cluster.blocks.push_back(blocks[i].get());
        }
      }
      std::vector<Dim> indices;
      for (uint32_t i = 0; i < size; ++i) {
        indices.push_back(
            {linear % wide * size + i, linear / wide % grid_.y, linear / wide / grid_.y});
      }
      cluster.run(indices);
      if (!cluster.error.empty()) {
        // Fibers of the other blocks stay in the middle of the kernel, too.
        for (Block* block : cluster.blocks) block->error = cluster.error;
        fail(cluster.error);
        return;
      }
    }
  }

  size_t clusters() const { return order_.size(); }
  const std::string& error() const { return error_; }

 private:
  bool take(uint32_t& linear) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!error_.empty() || taken_ == order_.size()) return false;
    linear = order_[taken_++];
    return true;
  }
  void fail(const std::string& error) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (error_.empty()) error_ = error;
  }

  const Call& call_;
  const Settings settings_;
  const cuda::Grid grid_;
  const int threads_;
  const int64_t shared_;
  std::vector<uint32_t> order_;
  std::mutex mutex_;
  size_t taken_ = 0;
  std::string error_;
};

// CPU threads that wait for work. They live as long as the process.
class Pool {
 public:
  static Pool& instance() {
    static Pool* pool = new Pool;
    return *pool;
  }

  // The caller works too.
  void run(Work& work, int helpers) {
    std::lock_guard<std::mutex> one_at_a_time(launch_);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (; threads_ < helpers; ++threads_) std::thread(&Pool::serve, this).detach();
      work_ = &work;
      wanted_ = helpers;
    }
    wake_.notify_all();
    work.run();
    std::unique_lock<std::mutex> lock(mutex_);
    wanted_ = 0;  // whoever has not come by now finds nothing left
    idle_.wait(lock, [this] { return busy_ == 0; });
  }

 private:
  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return wanted_ > 0; });
      --wanted_;
      ++busy_;
      Work* work = work_;
      lock.unlock();
      work->run();
      lock.lock();
      if (--busy_ == 0) idle_.notify_all();
    }
  }

  std::mutex launch_, mutex_;
  std::condition_variable wake_, idle_;
  Work* work_ = nullptr;
  int threads_ = 0, wanted_ = 0, busy_ = 0;
};

// ---- what ran ----------------------------------------------------------------------------------------------------------

struct Launches {
  std::mutex mutex;
  std::map<std::pair<const void*, std::string>, uint64_t> counts;
  std::string text;
};
Launches& launches() {
  static Launches all;
  return all;
}

void count_launch(const char* name, const void* kernel) {
  std::lock_guard<std::mutex> lock(launches().mutex);
  ++launches().counts[{kernel, name}];
}

}  // namespace

Settings& settings() {
  static Settings all;
  return all;
}

void set_device(int capability, int sm_count) {
  Settings& all = settings();
  // What no kernel runs on has an A100's memory: there the op boundary refuses.
  const cuda::DeviceInfo info =
      cuda::device_model(concat("sm_", std::max(capability, 80), ":", sm_count));
  all.capability = capability;
  all.sm_count = info.sm_count;
  all.shared_per_block = info.shared_per_block;
  all.shared_per_sm = info.shared_per_sm;
}

void run_grid(const Call& call, cuda::Grid grid, int threads, int64_t shared) {
  const Settings& all = settings();
  LOWBIT_CHECK(threads >= 1 && threads <= kMaxThreads, call.name, ": ", threads,
               " threads per block, CUDA takes 1 to ", kMaxThreads);
  LOWBIT_CHECK(grid.x <= 0x7fffffffu && grid.y <= 65535 && grid.z <= 65535, call.name,
               ": a grid of ", grid.x, " x ", grid.y, " x ", grid.z,
               " blocks, CUDA takes 2147483647 x 65535 x 65535");
  LOWBIT_CHECK(shared >= 0 && shared <= all.shared_per_block, call.name, ": ", shared,
               " bytes of shared memory per block, the device has ", all.shared_per_block);
  const uint32_t cluster = call.options.cluster;
  LOWBIT_CHECK(cluster == 1 || all.capability >= 90, call.name,
               ": clusters need sm_90, this is sm_", all.capability);
  LOWBIT_CHECK(cluster >= 1 && cluster <= kMostCluster && grid.x % cluster == 0, call.name,
               ": clusters of ", cluster, " in a grid of ", grid.x, " blocks; at most ",
               kMostCluster, " are portable");
  count_launch(call.name, call.kernel);
  Work work(call, grid, threads, shared);
  const int helpers =
      static_cast<int>(std::min<size_t>(static_cast<size_t>(all.workers), work.clusters())) - 1;
  if (helpers > 0) {
    Pool::instance().run(work, helpers);
  } else {
    work.run();
  }
  if (!work.error().empty()) fail(work.error());
}

}  // namespace lowbit::emulator

// ---- csrc/cuda/runtime.h -----------------------------------------------------------------------------------------------

namespace lowbit::cuda {

const DeviceInfo& device_info(int device) {
  LOWBIT_CHECK(device == 0 || device == -1, "the emulator has one device, asked for ", device);
  static thread_local DeviceInfo info;
  const emulator::Settings& all = emulator::settings();
  info = {all.capability, all.sm_count, all.shared_per_block, all.shared_per_sm,
          all.capability == 90};
  return info;
}

int driver_version() { return 0; }
int runtime_version() { return 0; }

void fill_zero(void* data, int64_t bytes, Stream) {
  std::memset(data, 0, static_cast<size_t>(bytes));
}

void allow_shared(const char* name, const void*, int64_t bytes) {
  const int64_t most = emulator::settings().shared_per_block;
  LOWBIT_CHECK(bytes <= most, name, ": ", bytes,
               " bytes of shared memory per block, the device has ", most);
}

void check_launch(const char* name, int status) {
  LOWBIT_CHECK(status == 0, name, ": status ", status);
}

}  // namespace lowbit::cuda

// ---- for ctypes --------------------------------------------------------------------------------------------------------

using lowbit::emulator::Order;
using lowbit::emulator::settings;

void lowbit_emulator_set_orders(int threads, int blocks, uint64_t seed) {
  settings().threads = static_cast<Order>(threads);
  settings().blocks = static_cast<Order>(blocks);
  settings().seed = seed;
}
void lowbit_emulator_set_order(const char* order) {
  const std::string name = order;
  const Order both = name == "forward"   ? Order::kForward
                     : name == "reverse" ? Order::kReverse
                                         : Order::kRandom;
  settings().threads = settings().blocks = both;
}
void lowbit_emulator_set_workers(int workers) { settings().workers = workers; }
void lowbit_emulator_set_poison(int byte) { settings().poison = static_cast<uint8_t>(byte); }
void lowbit_emulator_set_device(int capability, int sm_count) {
  lowbit::emulator::set_device(capability, sm_count);
}
void lowbit_emulator_set_shared(int64_t per_block) { settings().shared_per_block = per_block; }

const char* lowbit_emulator_launches() {
  auto& all = lowbit::emulator::launches();
  std::lock_guard<std::mutex> lock(all.mutex);
  all.text.clear();
  for (const auto& [key, count] : all.counts) {
    Dl_info where{};
    dladdr(key.first, &where);
    char line[64];
    const auto offset =
        static_cast<const char*>(key.first) - static_cast<const char*>(where.dli_fbase);
    std::snprintf(line, sizeof line, "%llu %llx ", static_cast<unsigned long long>(count),
                  static_cast<unsigned long long>(offset));
    all.text += line + key.second + "\n";
  }
  return all.text.c_str();
}
void lowbit_emulator_reset_launches() {
  auto& all = lowbit::emulator::launches();
  std::lock_guard<std::mutex> lock(all.mutex);
  all.counts.clear();
}
