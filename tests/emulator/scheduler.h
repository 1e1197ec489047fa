// Threads, warps and blocks: who runs, who waits where, and what it means when they wait in different places.
//
// A block is run by one CPU thread, and each of its threads is a fiber that runs until it reaches a point at which it must
// wait: a collective of its warp, a barrier of its block, or its end. A *pass* lets every runnable lane of a warp run that
// far, in the order of the settings.
//
//   all lanes at the same collective      it is carried out, and the next pass begins
//   all lanes at the barrier, or ended    the warp waits for the other warps
//   anything else                         divergence: the launch fails and says who waits where
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "emulator/fiber.h"
#include "emulator/launch.h"
#include "emulator/ptx.h"
#include "emulator/settings.h"

namespace lowbit::emulator {

inline constexpr int kLanes = 32;
inline constexpr int kMaxThreads = 1024;

struct Warp;
struct Block;

// Something that a warp does together. Every lane brings its operands; the last to arrive carries it out for all.
struct Collective {
  const char* name;
  void (*run)(void* const (&operands)[kLanes]);  // null: nothing to exchange
};

// A cp.async that has been issued and not been waited for.
struct Copy {
  uint8_t* to;
  const uint8_t* from;
  int bytes;
  uint8_t data[16];  // the source as it was
  int64_t group;
  Site at;
};

enum class State : uint8_t { kRunnable, kAtCollective, kAtBarrier, kEnded };

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
  int64_t
      fenced_at;  // barriers that the block had passed at the last fence; -1: none since the last count
};

struct Warp {
  Thread* lanes[kLanes];
  void* operands[kLanes];
  int count;
  int next;               // position in `order` of the next lane to look at
  uint8_t order[kLanes];  // lanes, in the order of this pass
  int at_collective, at_barrier, ended;
  bool runnable;
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
  int64_t barriers = 0;                // passed by this block
  int64_t counted_at = 0;              // barriers at the last atomic_increment
  const Thread* at_barrier = nullptr;  // the first to arrive
  std::string error;

  ~Block();
  void prepare(const Call& to_run, const Settings& with, cuda::Grid grid, int thread_count,
               int64_t bytes);
  void run(Dim index);  // leaves what went wrong in `error`
};

Thread& this_thread();

// Waits until the whole warp has arrived, and until the last to arrive has carried the collective out.
void meet(const Collective& collective, void* operands, Site at);
void meet_block(Site at);
// Ends the launch. The fibers of the block stay where they are.
[[noreturn]] void fail_thread(const Thread& thread, const std::string& what, Site at);
[[noreturn]] void fail_here(const std::string& what, Site at);

// Whether `bytes` bytes lie in the running block's shared memory.
bool is_shared(const void* pointer, int64_t bytes);

// What a thread's end does to its copies in flight.
void end_copies();

std::string describe(const Thread& thread);
std::string describe(Site at);

}  // namespace lowbit::emulator
