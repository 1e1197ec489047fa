#include "emulator/scheduler.h"

#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include "common/check.h"

namespace lowbit::emulator {

__thread Place* current __attribute__((tls_model("initial-exec"))) = nullptr;

namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr int64_t kGuardBytes = 0;  // the sanitizer has its own
#else
constexpr int64_t kGuardBytes = 256;  // on either side of shared memory
#endif
constexpr uint8_t kGuard = 0xa5;

// ---- orders ------------------------------------------------------------------------------------------------------------

void put_in_order(Warp& warp, Order order, Random& random) {
  const int count = warp.count;
  for (int i = 0; i < count; ++i) {
    warp.order[i] = static_cast<uint8_t>(order == Order::kReverse ? count - 1 - i : i);
  }
  if (order != Order::kRandom) return;
  for (int i = count - 1; i > 0; --i) {
    std::swap(warp.order[i], warp.order[random.below(static_cast<uint32_t>(i) + 1)]);
  }
}

void begin_pass(Warp& warp, Block& block) {
  if (block.settings.threads == Order::kRandom) {
    put_in_order(warp, Order::kRandom, block.random);
  }
  warp.next = 0;
}

Thread* next_runnable(Warp& warp) {
  while (warp.next < warp.count) {
    Thread* thread = warp.lanes[warp.order[warp.next++]];
    if (thread->state == State::kRunnable) return thread;
  }
  return nullptr;
}

bool same_place(Site one, Site other) {
  return one.line == other.line &&
         (one.file == other.file || std::strcmp(one.file, other.file) == 0);
}

// ---- what the end of a pass means --------------------------------------------------------------------------------------

[[noreturn]] void fail_divergent(const Thread& one, const Thread& other, const char* what) {
  fail_thread(one, concat("divergent ", what, ": ", describe_wait(one), ", ", describe_wait(other)),
              one.at);
}

// Carries out the collective that all lanes have reached. Returns the first lane of the next pass, or null when the block
// decides who is next.
Thread* end_pass(Warp& warp, Block& block) {
  if (warp.at_collective == warp.count) {
    const Collective& collective = *warp.first->collective;
    if (collective.run != nullptr) {
      if (warp.count != kLanes) {
        fail_thread(*warp.first, concat(collective.name, " in a warp of ", warp.count, " threads"),
                    warp.first->at);
      }
      collective.run(warp.operands);
    }
    for (int i = 0; i < warp.count; ++i) warp.lanes[i]->state = State::kRunnable;
    warp.at_collective = 0;
    // In random order another warp may be next.
    if (block.settings.threads == Order::kRandom) return nullptr;
    begin_pass(warp, block);
    return next_runnable(warp);
  }
  if (warp.woken) {
    warp.woken = false;
    begin_pass(warp, block);
    if (Thread* next = next_runnable(warp)) return next;
  }
  if (warp.at_collective > 0) {
    for (int i = 0; i < warp.count; ++i) {
      const State state = warp.lanes[i]->state;
      if (state == State::kAtBarrier || state == State::kEnded) {
        fail_divergent(*warp.first, *warp.lanes[i], "collective");
      }
    }
  }
  warp.runnable = false;
  return nullptr;
}

// The running thread has changed its state: continues with whoever is next.
void yield(Thread& thread) {
  Warp& warp = *thread.warp;
  Thread* next = next_runnable(warp);
  if (next == nullptr) next = end_pass(warp, *thread.block);
  if (next == &thread) return;
  if (next == nullptr) {
    switch_context(thread.context, thread.block->main);
  } else {
    current = next;
    switch_context(thread.context, next->context);
  }
}

// ---- a fiber -----------------------------------------------------------------------------------------------------------

// Runs the kernel, once for every block that comes.
void thread_main() {
  finish_first_switch();
  for (;;) {
    Thread& thread = this_thread();
    const Call& call = *thread.block->call;
    call.run(call.kernel, call.arguments);
    end_copies();
    thread.state = State::kEnded;
    ++thread.warp->ended;
    yield(thread);
  }
}

// ---- a block -----------------------------------------------------------------------------------------------------------

void start_warp(Block& block, Warp& warp) {
  warp.woken = false;
  begin_pass(warp, block);
  Thread* first = next_runnable(warp);
  current = first;
  switch_context(block.main, first->context);
  current = nullptr;
}

Warp* next_warp(Block& block) {
  const int count = static_cast<int>(block.warps.size());
  const int start = block.settings.threads == Order::kRandom
                        ? static_cast<int>(block.random.below(static_cast<uint32_t>(count)))
                        : 0;
  for (int i = 0; i < count; ++i) {
    const int at = (start + i) % count;
    Warp& warp = block.warps[static_cast<size_t>(
        block.settings.threads == Order::kReverse ? count - 1 - at : at)];
    if (warp.runnable) return &warp;
  }
  return nullptr;
}

// All warps wait: true when a barrier lets them go on.
bool pass_barrier(Block& block) {
  size_t waiting = 0;
  for (const Warp& warp : block.warps) waiting += static_cast<size_t>(warp.at_barrier);
  if (waiting == 0) return false;
  for (Thread& thread : block.threads) {
    if (thread.state == State::kEnded) {
      block.error = concat(describe(*block.at_barrier),
                           ": divergent barrier: ", describe_wait(*block.at_barrier), ", ",
                           describe_wait(thread));
      return false;
    }
  }
  if (waiting != block.threads.size()) return false;  // some wait for a memory barrier
  block.async.forget_readers();
  for (Thread& thread : block.threads) {
    thread.state = State::kRunnable;
    thread.meeting = 0;
    ++thread.passed;
  }
  for (Warp& warp : block.warps) {
    warp.at_barrier = 0;
    warp.runnable = true;
  }
  block.at_barrier = nullptr;
  return true;
}

// A launch after this one may start once its blocks have ended: before what this one depends on, if they did not wait.
void check_grid_wait(Block& block) {
  for (const Thread& thread : block.threads) {
    if (thread.waited_for_grid) return;
  }
  block.error =
      concat(describe(block.threads[0]), ": a dependent launch's block ended without a grid_wait");
}

bool guard_is_whole(const uint8_t* guard) {
  for (int64_t i = 0; i < kGuardBytes; ++i) {
    if (guard[i] != kGuard) return false;
  }
  return true;
}

}  // namespace

// ---- messages ----------------------------------------------------------------------------------------------------------

std::string describe_wait(const Thread& thread) {
  switch (thread.state) {
    case State::kAtCollective:
      return concat("thread ", thread.index, " is at ", thread.collective->name, " (",
                    describe(thread.at), ")");
    case State::kAtBarrier:
      return concat("thread ", thread.index, " is at sync_block (", describe(thread.at), ")");
    case State::kWaiting:
      if (thread.meeting > 0) {
        const Meeting& meeting = thread.block->meetings[static_cast<size_t>(thread.meeting)];
        return concat("thread ", thread.index, " is at barrier ", thread.meeting, ", where ",
                      meeting.there.size(), " of ", meeting.expected, " threads are (",
                      describe(thread.at), ")");
      }
      return concat("thread ", thread.index, " waits for ",
                    describe_barrier(*thread.block, thread.waits_for), " (", describe(thread.at),
                    ")");
    case State::kEnded:
      return concat("thread ", thread.index, " has returned");
    case State::kRunnable:
      break;
  }
  return concat("thread ", thread.index, " runs");
}

std::string describe(Site at) {
  if (at.file == nullptr) return "";
  std::string file = at.file;
  // From the folder that repositories share on: messages do not depend on where the sources lie.
  for (const char* root : {"csrc/", "tests/"}) {
    const size_t found = file.rfind(root);
    if (found != std::string::npos) file = file.substr(found);
  }
  return concat(file, ":", at.line);
}

std::string describe(const Thread& thread) {
  const Dim& block = thread.block_index;
  return concat(thread.block->call->name, ": block (", block.x, ", ", block.y, ", ", block.z,
                "), thread ", thread.index);
}

void fail_thread(const Thread& thread, const std::string& what, Site at) {
  Block& block = *thread.block;
  Thread& running = this_thread();
  block.error = concat(describe(thread), ": ", what);
  if (what.compare(0, 9, "divergent") != 0 && at.file != nullptr) {
    block.error += concat(" (", describe(at), ")");
  }
  switch_context(running.context, block.main);
  __builtin_unreachable();
}

void fail_here(const std::string& what, Site at) { fail_thread(this_thread(), what, at); }

void trap() { fail_here("__trap", {nullptr, 0}); }

// ---- meeting -----------------------------------------------------------------------------------------------------------

Thread& this_thread() { return *static_cast<Thread*>(current); }

void meet(const Collective& collective, void* operands, Site at) {
  Thread& thread = this_thread();
  Warp& warp = *thread.warp;
  thread.state = State::kAtCollective;
  thread.collective = &collective;
  thread.at = at;
  warp.operands[thread.index % kLanes] = operands;
  if (warp.at_collective++ == 0) {
    warp.first = &thread;
  } else if (warp.first->collective != &collective || !same_place(warp.first->at, at)) {
    fail_divergent(*warp.first, thread, "collective");
  }
  yield(thread);
}

void meet_block(Site at) {
  Thread& thread = this_thread();
  Block& block = *thread.block;
  thread.state = State::kAtBarrier;
  thread.at = at;
  ++thread.warp->at_barrier;
  if (block.at_barrier == nullptr) {
    block.at_barrier = &thread;
  } else if (!same_place(block.at_barrier->at, at)) {
    fail_divergent(*block.at_barrier, thread, "barrier");
  }
  yield(thread);
}

void meet_some(int number, int threads, Site at) {
  Thread& thread = this_thread();
  Block& block = *thread.block;
  if (number == 0) {
    if (static_cast<size_t>(threads) != block.threads.size())
      fail_here(concat("sync_some of ", threads, " threads at barrier 0 of a block of ",
                       block.threads.size()),
                at);
    return meet_block(at);
  }
  Meeting& meeting = block.meetings[static_cast<size_t>(number)];
  if (meeting.there.empty()) {
    meeting.expected = threads;
    meeting.at = at;
  } else if (meeting.expected != threads || !same_place(meeting.at, at)) {
    fail_divergent(*meeting.there.front(), thread, "barrier");
  }
  meeting.there.push_back(&thread);
  thread.meeting = number;
  thread.at = at;
  if (meeting.there.size() < static_cast<size_t>(threads)) return sleep_thread(at);
  const std::vector<Thread*> there = std::move(meeting.there);
  meeting.there.clear();
  for (Thread* other : there) {
    ++other->passed;
    block.async.forget_reader(*other);
    if (other != &thread) wake_thread(*other);
  }
}

void give_way() {
  Thread& thread = this_thread();
  switch_context(thread.context, thread.block->main);
}

void sleep_thread(Site at) {
  Thread& thread = this_thread();
  thread.state = State::kWaiting;
  thread.at = at;
  yield(thread);
}

void wake_thread(Thread& thread) {
  thread.state = State::kRunnable;
  thread.warp->woken = true;
  thread.warp->runnable = true;
}

uint32_t Random::next() {
  state += 0x9e3779b97f4a7c15u;
  uint64_t z = state;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return static_cast<uint32_t>((z ^ (z >> 31)) >> 32);
}

// ---- Block -------------------------------------------------------------------------------------------------------------

Block::~Block() {
  for (Thread& thread : threads) free_context(thread.context);
  free_context(main);
  std::free(shared_allocation);
}

void Block::prepare(const Call& to_run, const Settings& with, cuda::Grid grid, int thread_count,
                    int64_t bytes) {
  const auto count = static_cast<size_t>(thread_count);
  // Fibers that an error left in the middle of a kernel cannot go on.
  const bool keep = threads.size() == count && error.empty();
  call = &to_run;
  settings = with;
  error.clear();
  if (!keep) {
    for (Thread& thread : threads) free_context(thread.context);
    threads.clear();  // in case that there is no memory for more
    stacks.reserve(thread_count);
    stacks.forget_frames();
    threads.assign(count, Thread{});
    warps.assign((count + kLanes - 1) / kLanes, Warp{});
    for (int i = 0; i < thread_count; ++i) {
      Thread& thread = threads[static_cast<size_t>(i)];
      make_context(thread.context, stacks.stack(i), stacks.bytes(i), thread_main);
      thread.block = this;
      thread.index = i;
      thread.thread_index = {static_cast<uint32_t>(i), 0, 0};
      thread.warp = &warps[static_cast<size_t>(i / kLanes)];
      thread.warp->lanes[thread.warp->count++] = &thread;
    }
  }
  // malloc'ed at exactly this size, so that AddressSanitizer has a red zone behind the last byte; without it, the guards
  // are looked at after every block.
  std::free(shared_allocation);
  shared_bytes = bytes;
  void* memory = nullptr;
  const auto whole = static_cast<size_t>(bytes + 2 * kGuardBytes);
  if (posix_memalign(&memory, 256, whole) != 0) throw std::bad_alloc();
  shared_allocation = static_cast<uint8_t*>(memory);
  shared = shared_allocation + kGuardBytes;
  for (Thread& thread : threads) {
    thread.block_dim = {static_cast<uint32_t>(thread_count), 1, 1};
    thread.grid_dim = {grid.x, grid.y, grid.z};
    thread.shared = shared;
    thread.shared_bytes = bytes;
  }
}

void Block::start(Dim index) {
  std::memset(shared_allocation, kGuard, static_cast<size_t>(shared_bytes + 2 * kGuardBytes));
  std::memset(shared, settings.poison, static_cast<size_t>(shared_bytes));
  at_barrier = nullptr;
  for (Meeting& meeting : meetings) meeting.there.clear();
  ended = false;
  async.start(*this);
  begin_matrix_units(*this);
  const uint64_t linear = index.x + uint64_t{index.y} * 0x10001u + uint64_t{index.z} * 0x3000001u;
  random.state = settings.seed * 0x2545f4914f6cdd1du + linear;
  for (Thread& thread : threads) {
    thread.block_index = index;
    thread.state = State::kRunnable;
    thread.copies.clear();
    thread.open_group = 0;
    thread.fenced_at = -1;
    thread.passed = thread.counted_at = 0;
    thread.meeting = 0;
    thread.at_cluster = AtCluster::kElsewhere;
    thread.waited_for_grid = false;
  }
  for (Warp& warp : warps) {
    warp.at_collective = warp.at_barrier = warp.ended = 0;
    warp.runnable = true;
    warp.woken = false;
    put_in_order(warp, settings.threads, random);
  }
}

bool Block::advance() {
  bool moved = false;
  do {
    for (Warp* warp = next_warp(*this); warp != nullptr; warp = next_warp(*this)) {
      start_warp(*this, *warp);
      moved = true;
      if (!error.empty()) return true;
    }
  } while (pass_barrier(*this));
  if (!error.empty()) return true;
  for (const Warp& warp : warps) {
    if (warp.ended != warp.count) return moved;
  }
  ended = true;
  async.end();
  if (error.empty() && call->options.dependent) check_grid_wait(*this);
  if (error.empty()) end_matrix_units(*this);
  if (!error.empty()) return true;
  if (!guard_is_whole(shared_allocation)) {
    error = concat(describe(threads[0]), ": something wrote in front of shared memory");
  } else if (!guard_is_whole(shared + shared_bytes)) {
    error = concat(describe(threads[0]), ": something wrote past the ", shared_bytes,
                   " bytes of shared memory");
  }
  return true;
}

}  // namespace lowbit::emulator
