// Threads, warps and blocks: who runs, who waits where, and what it means when they wait in different places.
//
// A block is run by one CPU thread, and each of its threads is a fiber that runs until it reaches a point at which it must
// wait: a collective of its warp, a barrier of its block, or its end. A *pass* lets every runnable lane of a warp run that
// far, in the order of the settings.
//
//   all lanes at the same collective      it is carried out, and the next pass begins
//   all lanes at the barrier, or ended    the warp waits for the other warps
//   some at a memory barrier              the warp waits until that wakes them (mbarrier.cpp)
//   anything else                         divergence: the launch fails and says who waits where
//
// The blocks of a cluster take turns on their CPU thread. When none of them can go on, a copy that is in flight lands
// (async.h); when none is, they are deadlocked, and the launch fails.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "emulator/async.h"
#include "emulator/fiber.h"
#include "emulator/launch.h"
#include "emulator/ptx.h"
#include "emulator/settings.h"
#include "emulator/wgmma.h"

namespace lowbit::emulator {

inline constexpr int kLanes = 32;
inline constexpr int kMaxThreads = 1024;

struct Warp;
struct Block;
struct Cluster;

// Something that a warp does together. Every lane brings its operands; the last to arrive carries it out for all.
struct Collective {
  const char* name;
  void (*run)(void* const (&operands)[kLanes]);  // null: nothing to exchange
};

// kWaiting: for a memory barrier's phase, or for the cluster.
enum class State : uint8_t { kRunnable, kAtCollective, kAtBarrier, kWaiting, kEnded };

// Where a thread stands between two barriers of its cluster: kReleased has arrived, as all others have, and not waited.
enum class AtCluster : uint8_t { kElsewhere, kArrived, kReleased };

struct Thread : Place {
  Block* block;
  Warp* warp;
  Context context;
  State state;
  int index;  // in the block
  Site at;    // of the collective or the barrier
  const Collective* collective;
  std::vector<Copy> copies;  // in flight, oldest first
  int64_t open_group;        // the group that the next commit closes
  int64_t passed;            // barriers, those of some threads among them
  int64_t fenced_at;         // barriers passed at the last fence; -1: none since the last count
  int64_t counted_at;        // barriers passed at the last atomic_increment of whoever it met last
  int meeting;  // the barrier of some threads that it waits at or has passed last; 0: the block's
  const uint64_t* waits_for;  // a memory barrier, or null: the cluster
  uint32_t parity;
  AtCluster at_cluster;
  bool waited_for_grid;
};

// A barrier of some of a block's threads.
struct Meeting {
  int expected;
  std::vector<Thread*> there;
  Site at;
};

struct Warp {
  Thread* lanes[kLanes];
  void* operands[kLanes];
  int count;
  int next;               // position in `order` of the next lane to look at
  uint8_t order[kLanes];  // lanes, in the order of this pass
  int at_collective, at_barrier, ended;
  bool runnable;
  bool woken;           // a lane has become runnable since this pass began
  const Thread* first;  // the first to arrive at the collective
};

struct Random {
  uint64_t state;
  uint32_t next();  // (splitmix64)
  uint32_t below(uint32_t bound) { return static_cast<uint32_t>(uint64_t{next()} * bound >> 32); }
};

// One CPU thread's place to run blocks, one after the other.
struct Block {
  const Call* call;
  Settings settings;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Stacks stacks;
  Context main;
  Random random;
  uint8_t* shared_allocation = nullptr;
  uint8_t* shared = nullptr;
  int64_t shared_bytes = 0;
  std::array<Meeting, 16> meetings;
  std::shared_ptr<MatrixUnits> units;
  const Thread* at_barrier = nullptr;  // the first to arrive
  Async async;                         // memory barriers, and copies in flight
  Cluster* cluster = nullptr;
  uint32_t rank = 0;  // in the cluster
  bool ended = false;
  std::string error;

  ~Block();
  void prepare(const Call& to_run, const Settings& with, cuda::Grid grid, int thread_count,
               int64_t bytes);
  void start(Dim index);
  // Runs until the block ends, or until all of it waits for something that only copies or other blocks can bring. False
  // when nothing could run. Leaves what went wrong in `error`.
  bool advance();
  int64_t offset(const void* pointer) const {
    return static_cast<const uint8_t*>(pointer) - shared;
  }
};

// Blocks that run at once. A launch without clusters has clusters of one.
struct Cluster {
  std::vector<Block*> blocks;
  int arrived;       // threads, at the barrier of the cluster
  int64_t barriers;  // passed
  Random random;
  uint8_t*
      dependence;  // what the launch depends on, as it was, while it is hidden (cluster.cpp); else null

  // Runs all of it; leaves what went wrong in `error`.
  void run(const std::vector<Dim>& indices);
  std::string error;

 private:
  bool turn();
  bool land_one();
  void hide_dependence();

 public:
  void show_dependence();
};

Thread& this_thread();

// Waits until the whole warp has arrived, and until the last to arrive has carried the collective out.
void meet(const Collective& collective, void* operands, Site at);
void meet_block(Site at);
// `threads` of the block, at its barrier `number`.
void meet_some(int number, int threads, Site at);
// Lets the block decide which warp is next, though this one could go on.
void give_way();
// Waits until somebody wakes this thread.
void sleep_thread(Site at);
void wake_thread(Thread& thread);
// Ends the launch. The fibers of the block stay where they are.
[[noreturn]] void fail_thread(const Thread& thread, const std::string& what, Site at);
[[noreturn]] void fail_here(const std::string& what, Site at);

// Whether `bytes` bytes lie in the running block's shared memory.
bool is_shared(const void* pointer, int64_t bytes);

// The block of this rank in the running block's cluster, for an access at the place of `own`.
Block& other_block(const void* own, int64_t bytes, uint32_t rank, const char* what, Site at);

// What a thread's end does to its copies in flight.
void end_copies();

std::string describe(const Thread& thread);
std::string describe_wait(const Thread& thread);
std::string describe(Site at);

}  // namespace lowbit::emulator
