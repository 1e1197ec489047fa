// Copies, loads, fences and counters: what single threads do to memory, with the checks that hardware does or should do.

#include <cstring>

#include "common/check.h"
#include "emulator/scheduler.h"

namespace lowbit::emulator {
namespace {

void check_aligned(const void* pointer, const char* what, Site at) {
  if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) {
    fail_here(concat(what, " is not aligned to 16 bytes: it ends in ",
                     reinterpret_cast<uintptr_t>(pointer) % 16),
              at);
  }
}

// What the bytes of a copy will be, read where AddressSanitizer sees it.
void read_source(uint8_t (&data)[16], const void* from, int bytes) {
  std::memset(data, 0, sizeof data);
  if (bytes > 0) std::memcpy(data, from, static_cast<size_t>(bytes));
}

bool is_poison(const uint8_t* bytes, uint8_t poison) {
  for (int i = 0; i < 16; ++i) {
    if (bytes[i] != poison) return false;
  }
  return true;
}

void land(const Copy& copy) {
  uint8_t now[16];
  read_source(now, copy.from, copy.bytes);
  if (std::memcmp(now, copy.data, sizeof now) != 0) {
    fail_here("the source of a cp.async changed while it was in flight", copy.at);
  }
  if (!is_poison(copy.to, this_thread().block->settings.poison)) {
    fail_here("the destination of a cp.async was written while it was in flight", copy.at);
  }
  std::memcpy(copy.to, copy.data, sizeof copy.data);
}

}  // namespace

bool is_shared(const void* pointer, int64_t bytes) {
  const int64_t offset = static_cast<const uint8_t*>(pointer) - current->shared;
  return offset >= 0 && offset + bytes <= current->shared_bytes;
}

// Hardware copies at any moment between the issue and the wait. So the 16 bytes hold poison in between, which shows a reader
// that did not wait, one that has not finished with what the stage held before, and who writes there; and the source is read
// at both ends (at the issue, so that a sanitizer names the faulty line) and must not have changed.
void copy_16(void* to, const void* from, int bytes, Site at) {
  Thread& thread = this_thread();
  check_aligned(to, "the destination of a cp.async", at);
  check_aligned(from, "the source of a cp.async", at);
  if (bytes < 0 || bytes > 16) fail_here(concat("a cp.async of ", bytes, " bytes"), at);
  if (!is_shared(to, 16)) {
    fail_here(concat("a cp.async to byte ", static_cast<uint8_t*>(to) - thread.shared, " of the ",
                     thread.shared_bytes, " bytes of shared memory"),
              at);
  }
  if (bytes > 0) check_dependence(from, bytes, at);
  Copy copy{static_cast<uint8_t*>(to),
            static_cast<const uint8_t*>(from),
            bytes,
            {},
            thread.open_group,
            at};
  read_source(copy.data, from, bytes);
  std::memset(to, thread.block->settings.poison, 16);
  thread.copies.push_back(copy);
}

void copy_wait(int pending) {
  Thread& thread = this_thread();
  size_t landed = 0;
  while (landed < thread.copies.size() &&
         thread.copies[landed].group < thread.open_group - pending) {
    land(thread.copies[landed++]);
  }
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + static_cast<int64_t>(landed));
}

// Copies that nobody waited for may land as late as this.
void end_copies() {
  Thread& thread = this_thread();
  for (const Copy& copy : thread.copies) land(copy);
  thread.copies.clear();
}

}  // namespace lowbit::emulator

namespace lowbit::cuda::ptx {

using namespace emulator;

uint32_t shared_address(const void* pointer) {
  if (!is_shared(pointer, 0))
    fail_here("shared_address of a pointer to other memory", {nullptr, 0});
  return static_cast<uint32_t>(static_cast<const uint8_t*>(pointer) - current->shared);
}

void cp_async_16_once(void* to, const void* from, uint64_t policy, Site at) {
  if (policy != kEvictFirst) fail_here("a cp.async with a policy that nobody made", at);
  copy_16(to, from, 16, at);
}

void cp_async_commit() { ++this_thread().open_group; }

uint4 load_once(const uint4* from, Site at) {
  check_aligned(from, "the address of a 16-byte load", at);
  if (is_shared(from, 16)) fail_here("a global load from shared memory", at);
  check_dependence(from, 16, at);
  return *from;
}

void fence_device() {
  Thread& thread = this_thread();
  thread.fenced_at = thread.passed;
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

// A counter tells other blocks that this one's results are written. They are visible before it in two cases: every thread
// that the counting one met last has a fence behind its writes, and a barrier follows; or a barrier is followed by a fence
// of the thread that counts. The CPU that runs this would not show the difference, hence the check.
uint32_t atomic_increment(uint32_t* counter, Site at) {
  Thread& thread = this_thread();
  bool others = false, all = true, early = true;
  const auto concerns = [&](const Thread& other) {
    return thread.meeting == 0 || other.meeting == thread.meeting;
  };
  for (const Thread& other : thread.block->threads) {
    if (!concerns(other)) continue;
    const bool fenced = other.fenced_at >= other.counted_at;
    others = others || (fenced && &other != &thread);
    all = all && fenced;
    early = early && other.fenced_at < other.passed;
  }
  if (others ? !(all && early) : thread.fenced_at <= thread.counted_at) {
    fail_here(
        "an atomic_increment without a fence_device and a sync_block between it and the block's "
        "writes",
        at);
  }
  for (Thread& other : thread.block->threads) {
    if (!concerns(other)) continue;
    other.counted_at = other.passed;
    other.fenced_at = -1;
  }
  return __atomic_fetch_add(counter, 1u, __ATOMIC_SEQ_CST);
}

}  // namespace lowbit::cuda::ptx
