// Memory barriers, and the copies that complete on them: what a block has of both.
//
// A copy lands as late as can be, when nobody in its cluster can go on without it (in random order sometimes at once), and
// its destination holds poison until then. So whoever reads without waiting, or from a stage that is being refilled,
// reads NaN.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "emulator/ptx.h"

namespace lowbit::emulator {

struct Block;
struct Thread;

// A cp.async that has been issued and not been waited for.
struct Copy {
  uint8_t* to;
  const uint8_t* from;
  int bytes;
  uint8_t data[16];  // the source as it was
  int64_t group;
  Site at;
};

// Its bytes in memory hold a token, which shows who else writes there.
struct Mbarrier {
  uint32_t arrivals;  // that end a phase
  uint32_t pending;   // of the current phase
  int64_t
      announced;  // bytes of the current phase that have not come; below zero: came before they were announced
  uint64_t phase;
  bool fenced;      // the initialisation, by a fence_mbarrier_init
  int initialised;  // the thread that did
};

// Part of a copy. Null: zeros come from nowhere.
struct Piece {
  uint8_t* to;
  const uint8_t* from;
  int64_t bytes;
};

// A copy that has been issued and has not landed.
struct Flight {
  const char* what;
  std::vector<Piece> pieces;
  std::vector<uint8_t> data;  // the sources as they were
  uint64_t* barrier;
  int64_t bytes;  // that it completes on the barrier; 0: it arrives there instead
  int thread;
  Site at;
  uint8_t *begin = nullptr, *end = nullptr;  // of all its pieces
  bool from_other =
      false;  // a block of the cluster, which does not know whether this one has announced the bytes
};

// Where a copy has landed, until the next one does.
struct Region {
  const uint8_t *begin, *end;
  const uint64_t* barrier;
  int thread;  // that issued the copy, and does not count as a reader
  bool awaited;
  std::vector<const Thread*> readers;  // one of each warp that has waited and may still read
};

struct Async {
  Block* block = nullptr;
  std::map<const uint64_t*, Mbarrier> barriers;
  std::vector<Flight> flights;
  std::vector<Region> regions;

  void start(Block& owner);
  void end();  // of the block: sets its error where something is in flight
  // These return what is wrong, or nothing.
  std::string land(size_t flight);
  std::string arrive(uint64_t* barrier);
  std::string complete(uint64_t* barrier, int64_t bytes, bool from_other);

  void add_reader(const uint64_t* barrier, const Thread& thread);
  void forget_readers();
  void forget_reader(const Thread& thread);  // its warp

 private:
  std::string settle(uint64_t* barrier, Mbarrier& state);
};

// Issues a copy of this thread; alignment is the caller's to check. `what` is its name in messages.
void start_copy(const char* what, const std::vector<Piece>& pieces, uint64_t* barrier, Site at);
// One to each block of the cluster whose bit is set: to where the pieces and the barrier stand in it.
void start_copies(const char* what, const std::vector<Piece>& pieces, uint64_t* barrier,
                  uint16_t blocks, Site at);

// "the phase of parity 0 of the mbarrier at byte 64 ..."; null is the barrier of the cluster.
std::string describe_barrier(const Block& block, const uint64_t* barrier);

// Ends the launch where the thread reads what the launch depends on before its grid_wait.
void check_dependence(const void* from, int64_t bytes, Site at);
void check_hopper(const char* what, Site at);

}  // namespace lowbit::emulator
