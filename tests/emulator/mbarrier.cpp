// Memory barriers and the copies that complete on them (async.h).

#include <algorithm>
#include <cstring>
#include <utility>

#include "common/check.h"
#include "emulator/ptx_hopper.h"
#include "emulator/scheduler.h"

namespace lowbit::emulator {
namespace {

constexpr int64_t kMostBytes = (1 << 20) - 1;  // that a barrier can count, either way

uint64_t token_of(const uint64_t* barrier) {
  return 0x6d62617272696572u ^ reinterpret_cast<uintptr_t>(barrier);
}

std::string place_of(const Block& block, const uint64_t* barrier) {
  return concat("the mbarrier at byte ", block.offset(barrier), " of shared memory");
}

// The barrier's state, of a block of this thread's cluster.
Mbarrier& find(Block& block, uint64_t* barrier, const char* what, Site at) {
  check_hopper(what, at);
  const auto found = block.async.barriers.find(barrier);
  if (found == block.async.barriers.end()) {
    fail_here(concat(what, ": ", place_of(block, barrier), " was not initialised"), at);
  }
  if (*barrier != token_of(barrier)) {
    fail_here(concat(what, ": ", place_of(block, barrier), " was overwritten"), at);
  }
  return found->second;
}

void fail_if(const std::string& wrong, Site at) {
  if (!wrong.empty()) fail_here(wrong, at);
}

bool overlap(const uint8_t* begin, const uint8_t* end, const void* from, int64_t bytes) {
  const auto* other = static_cast<const uint8_t*>(from);
  return begin < other + bytes && other < end;
}

void add_announced(Block& block, uint64_t* barrier, Mbarrier& state, uint32_t bytes, Site at) {
  state.announced += bytes;
  if (state.announced > kMostBytes) {
    fail_here(concat(state.announced, " bytes are announced to ", place_of(block, barrier),
                     ", which counts to ", kMostBytes),
              at);
  }
}

// What a copy must not meet in shared memory: barriers, and stages that somebody reads.
void check_destination(const char* what, Block& block, const uint8_t* begin, const uint8_t* end,
                       Site at) {
  for (const auto& [barrier, state] : block.async.barriers) {
    if (overlap(begin, end, barrier, 8)) {
      fail_here(concat("a ", what, " onto ", place_of(block, barrier)), at);
    }
  }
  for (const Flight& flight : block.async.flights) {
    if (!overlap(begin, end, flight.begin, flight.end - flight.begin)) continue;
    for (const Piece& piece : flight.pieces) {
      if (overlap(begin, end, piece.to, piece.bytes)) {
        fail_here(
            concat("a ", what, " to where another one is in flight, from ", describe(flight.at)),
            at);
      }
    }
  }
  for (const Region& region : block.async.regions) {
    if (!overlap(begin, end, region.begin, region.end - region.begin)) {
      continue;
    }
    if (!region.readers.empty()) {
      const Thread& reader = *region.readers.front();
      fail_here(
          concat("a ", what, " refills a stage that warp ", reader.index / kLanes, " still reads"),
          at);
    }
    if (!region.awaited) {
      fail_here(concat("a ", what, " refills a stage that nobody has waited for"), at);
    }
  }
}

void read_sources(const std::vector<Piece>& pieces, std::vector<uint8_t>& data) {
  size_t at = 0;
  for (const Piece& piece : pieces) {
    if (piece.from != nullptr && piece.bytes > 0) {
      std::memcpy(data.data() + at, piece.from, static_cast<size_t>(piece.bytes));
    }
    at += static_cast<size_t>(piece.bytes);
  }
}

}  // namespace

std::string describe_barrier(const Block& block, const uint64_t* barrier) {
  if (barrier == nullptr)
    return concat("the cluster, where ", block.cluster->arrived, " threads are");
  const Mbarrier& state = block.async.barriers.at(barrier);
  return concat("the phase of parity ", state.phase & 1, " of ", place_of(block, barrier),
                ", which lacks ", state.pending, " of ", state.arrivals, " arrivals and ",
                state.announced, " bytes");
}

void check_hopper(const char* what, Site at) {
  if (this_thread().block->settings.capability < 90) {
    fail_here(concat(what, " needs sm_90, this is sm_", this_thread().block->settings.capability),
              at);
  }
}

// ---- Async -------------------------------------------------------------------------------------------------------------

void Async::start(Block& owner) {
  block = &owner;
  barriers.clear();
  flights.clear();
  regions.clear();
}

void Async::end() {
  if (flights.empty()) return;
  const Flight& flight = flights.front();
  block->error =
      concat(describe(block->threads[static_cast<size_t>(flight.thread)]), ": a ", flight.what,
             " is in flight when its block ends (", describe(flight.at), ")");
}

std::string Async::land(size_t index) {
  const Flight flight = std::move(flights[index]);
  flights.erase(flights.begin() + static_cast<int64_t>(index));
  std::vector<uint8_t> now(flight.data.size());
  read_sources(flight.pieces, now);
  if (now != flight.data) {
    return concat("the source of a ", flight.what, " changed while it was in flight (",
                  describe(flight.at), ")");
  }
  Region region{flight.begin, flight.end, flight.barrier, flight.thread, false, {}};
  const uint8_t* from = flight.data.data();
  for (const Piece& piece : flight.pieces) {
    if (std::any_of(piece.to, piece.to + piece.bytes,
                    [&](uint8_t byte) { return byte != block->settings.poison; })) {
      return concat("the destination of a ", flight.what, " was written while it was in flight (",
                    describe(flight.at), ")");
    }
    std::memcpy(piece.to, from, static_cast<size_t>(piece.bytes));
    if (flight.bytes > 0) async_wrote(*block, piece.to, piece.bytes);
    from += piece.bytes;
  }
  if (flight.bytes == 0) return arrive(flight.barrier);
  regions.erase(std::remove_if(regions.begin(), regions.end(),
                               [&](const Region& old) {
                                 return overlap(region.begin, region.end, old.begin,
                                                old.end - old.begin);
                               }),
                regions.end());
  regions.push_back(region);
  return complete(flight.barrier, flight.bytes, flight.from_other);
}

std::string Async::arrive(uint64_t* barrier) {
  Mbarrier& state = barriers.at(barrier);
  if (state.pending == 0) {
    return concat("an arrival past the ", state.arrivals, " that ", place_of(*block, barrier),
                  " counts in a phase");
  }
  --state.pending;
  return settle(barrier, state);
}

std::string Async::complete(uint64_t* barrier, int64_t bytes, bool from_other) {
  Mbarrier& state = barriers.at(barrier);
  state.announced -= bytes;
  if (state.announced < 0 && !(from_other && state.pending > 0)) {
    return concat(-state.announced, " bytes come to ", place_of(*block, barrier),
                  " that no expect_tx has announced");
  }
  return settle(barrier, state);
}

// Ends the phase where nothing is missing, and wakes who waits for that.
std::string Async::settle(uint64_t* barrier, Mbarrier& state) {
  if (*barrier != token_of(barrier)) return concat(place_of(*block, barrier), " was overwritten");
  if (state.pending != 0 || state.announced != 0) return "";
  ++state.phase;
  state.pending = state.arrivals;
  for (Thread& thread : block->threads) {
    if (thread.state == State::kWaiting && thread.waits_for == barrier &&
        thread.parity != (state.phase & 1)) {
      wake_thread(thread);
      add_reader(barrier, thread);
    }
  }
  return "";
}

void Async::add_reader(const uint64_t* barrier, const Thread& thread) {
  for (Region& region : regions) {
    if (region.barrier != barrier || region.thread == thread.index) continue;
    region.awaited = true;
    const bool known = std::any_of(region.readers.begin(), region.readers.end(),
                                   [&](const Thread* other) { return other->warp == thread.warp; });
    if (!known) region.readers.push_back(&thread);
  }
}

void Async::forget_readers() {
  for (Region& region : regions) region.readers.clear();
}

void Async::forget_reader(const Thread& thread) {
  for (Region& region : regions) {
    auto& readers = region.readers;
    readers.erase(std::remove_if(readers.begin(), readers.end(),
                                 [&](const Thread* other) { return other->warp == thread.warp; }),
                  readers.end());
  }
}

// ---- copies ------------------------------------------------------------------------------------------------------------

namespace {

// Into shared memory of `block`, which may be another one of the cluster.
void start_in(Block& block, const char* what, const std::vector<Piece>& pieces, uint64_t* barrier,
              Site at) {
  const Thread& thread = this_thread();
  const Mbarrier& state = find(block, barrier, what, at);
  if (!state.fenced) {
    fail_here(concat("a ", what, " completes on ", place_of(block, barrier),
                     ", whose initialisation no fence_mbarrier_init followed"),
              at);
  }
  Flight flight{what, pieces, {}, barrier, 0, thread.index, at, pieces[0].to, pieces[0].to};
  flight.from_other = &block != thread.block;
  for (const Piece& piece : pieces) {
    if (piece.to < block.shared || block.offset(piece.to) + piece.bytes > block.shared_bytes) {
      fail_here(concat("a ", what, " of ", piece.bytes, " bytes to byte ", block.offset(piece.to),
                       " of the ", block.shared_bytes, " bytes of shared memory"),
                at);
    }
    flight.begin = std::min(flight.begin, piece.to);
    flight.end = std::max(flight.end, piece.to + piece.bytes);
    if (piece.from != nullptr) check_dependence(piece.from, piece.bytes, at);
    flight.bytes += piece.bytes;
  }
  if (flight.bytes == 0) fail_here(concat("a ", what, " of no bytes"), at);
  check_destination(what, block, flight.begin, flight.end, at);
  flight.data.resize(static_cast<size_t>(flight.bytes));
  read_sources(pieces, flight.data);
  for (const Piece& piece : pieces) {
    std::memset(piece.to, block.settings.poison, static_cast<size_t>(piece.bytes));
  }
  const bool at_once = block.settings.threads == Order::kRandom && block.random.below(4) == 0 &&
                       (state.announced >= flight.bytes || flight.from_other);
  block.async.flights.push_back(std::move(flight));
  if (at_once) fail_if(block.async.land(block.async.flights.size() - 1), at);
}

}  // namespace

void start_copy(const char* what, const std::vector<Piece>& pieces, uint64_t* barrier, Site at) {
  start_in(*this_thread().block, what, pieces, barrier, at);
}

void start_copies(const char* what, const std::vector<Piece>& pieces, uint64_t* barrier,
                  uint16_t blocks, Site at) {
  if (blocks == 0) fail_here(concat("a ", what, " to no block"), at);
  const uint8_t* const own = this_thread().block->shared;
  for (uint32_t rank = 0; blocks >> rank != 0; ++rank) {
    if ((blocks >> rank & 1) == 0) continue;
    Block& block = other_block(barrier, 8, rank, what, at);
    std::vector<Piece> there = pieces;
    for (Piece& piece : there) piece.to = block.shared + (piece.to - own);
    auto* const its =
        reinterpret_cast<uint64_t*>(block.shared + (reinterpret_cast<uint8_t*>(barrier) - own));
    start_in(block, what, there, its, at);
  }
}

}  // namespace lowbit::emulator

// ---- csrc/cuda/ptx_hopper.cuh ------------------------------------------------------------------------------------------

namespace lowbit::cuda::ptx {

using namespace emulator;

void mbarrier_init(uint64_t* barrier, uint32_t arrivals, Site at) {
  check_hopper("mbarrier_init", at);
  Thread& thread = this_thread();
  Block& block = *thread.block;
  if (reinterpret_cast<uintptr_t>(barrier) % 8 != 0 || !is_shared(barrier, 8)) {
    fail_here("an mbarrier is not 8 aligned bytes of shared memory", at);
  }
  if (arrivals < 1 || arrivals > kMostBytes)
    fail_here(concat("an mbarrier of ", arrivals, " arrivals"), at);
  if (block.async.barriers.count(barrier) != 0) {
    fail_here(concat(place_of(block, barrier), " was initialised before"), at);
  }
  *barrier = token_of(barrier);
  block.async.barriers[barrier] = {arrivals, arrivals, 0, 0, false, thread.index};
}

void fence_mbarrier_init(Site at) {
  check_hopper("fence_mbarrier_init", at);
  const Thread& thread = this_thread();
  for (auto& [barrier, state] : thread.block->async.barriers) {
    if (state.initialised == thread.index) state.fenced = true;
  }
}

void fence_proxy_async(Site at) {
  check_hopper("fence_proxy_async", at);
  publish_to_async_proxy(*this_thread().block);
}

void mbarrier_arrive(uint64_t* barrier, Site at) {
  const Thread& thread = this_thread();
  find(*thread.block, barrier, "mbarrier_arrive", at);
  thread.block->async.forget_reader(thread);
  fail_if(thread.block->async.arrive(barrier), at);
  // Who waited for this may be faster than the other lanes of this warp.
  Block& block = *thread.block;
  if (block.settings.threads == Order::kRandom && block.random.below(2) == 0) give_way();
}

void mbarrier_expect_tx(uint64_t* barrier, uint32_t bytes, Site at) {
  Block& block = *this_thread().block;
  add_announced(block, barrier, find(block, barrier, "mbarrier_expect_tx", at), bytes, at);
}

void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes, Site at) {
  mbarrier_expect_tx(barrier, bytes, at);
  mbarrier_arrive(barrier, at);
}

void cp_async_mbarrier_arrive(uint64_t* barrier, Site at) {
  Thread& thread = this_thread();
  Block& block = *thread.block;
  find(block, barrier, "cp_async_mbarrier_arrive", at);
  Flight flight{"cp.async", {}, {}, barrier, 0, thread.index, at, nullptr, nullptr};
  for (const Copy& copy : thread.copies) {
    flight.pieces.push_back({copy.to, copy.from, copy.bytes});
    if (copy.bytes < 16) flight.pieces.push_back({copy.to + copy.bytes, nullptr, 16 - copy.bytes});
    flight.data.insert(flight.data.end(), copy.data, copy.data + 16);
    if (flight.begin == nullptr || copy.to < flight.begin) flight.begin = copy.to;
    flight.end = std::max(flight.end, copy.to + 16);
  }
  thread.copies.clear();
  block.async.flights.push_back(std::move(flight));
}

bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity, Site at) {
  Thread& thread = this_thread();
  Block& block = *thread.block;
  const Mbarrier& state = find(block, barrier, "mbarrier_wait", at);
  if (parity > 1) fail_here(concat("a wait for parity ", parity), at);
  if ((state.phase & 1) != parity) {
    block.async.add_reader(barrier, thread);
    return true;
  }
  if (block.settings.threads == Order::kRandom && block.random.below(4) == 0) return false;
  thread.waits_for = barrier;
  thread.parity = parity;
  sleep_thread(at);
  return true;
}

void mbarrier_wait(uint64_t* barrier, uint32_t parity, Site at) {
  while (!mbarrier_try_wait(barrier, parity, at)) {
  }
}

void mbarrier_arrive_remote(uint64_t* own, uint32_t rank, Site at) {
  Thread& thread = this_thread();
  Block& other = other_block(own, 8, rank, "mbarrier_arrive_remote", at);
  auto* barrier = reinterpret_cast<uint64_t*>(other.shared + thread.block->offset(own));
  find(other, barrier, "mbarrier_arrive_remote", at);
  thread.block->async.forget_reader(thread);
  fail_if(other.async.arrive(barrier), at);
}

// Ends the launch where a bulk copy is not made of 16 bytes; else it is one piece.
static std::vector<Piece> bulk_piece(void* to, const void* from, uint32_t bytes, Site at) {
  for (const auto& [value, what] : {std::pair(reinterpret_cast<uintptr_t>(to), "destination"),
                                    std::pair(reinterpret_cast<uintptr_t>(from), "source"),
                                    std::pair(uintptr_t{bytes}, "size")}) {
    if (value % 16 != 0) {
      fail_here(
          concat("the ", what, " of a bulk copy is not a multiple of 16: it ends in ", value % 16),
          at);
    }
  }
  return {{static_cast<uint8_t*>(to), static_cast<const uint8_t*>(from), bytes}};
}

void copy_bulk(void* to, const void* from, uint32_t bytes, uint64_t* barrier, Site at) {
  start_copy("bulk copy", bulk_piece(to, from, bytes, at), barrier, at);
}

void copy_bulk_shared(void* to, const void* from, uint32_t bytes, uint64_t* barrier,
                      uint16_t blocks, Site at) {
  start_copies("bulk copy", bulk_piece(to, from, bytes, at), barrier, blocks, at);
}

void copy_bulk_once(void* to, const void* from, uint32_t bytes, uint64_t* barrier, uint64_t policy,
                    Site at) {
  if (policy != kEvictFirst) fail_here("a bulk copy with a policy that nobody made", at);
  copy_bulk(to, from, bytes, barrier, at);
}

}  // namespace lowbit::cuda::ptx
