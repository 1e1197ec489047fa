// wgmma: every warp multiplies its 16 rows when it issues the instruction, and has the result when it has waited for it.
//
// In between, hardware may read and write at any moment. So the registers of D hold poison, and at the wait they must hold
// it still; the registers of A, and B in shared memory, are read at the issue and must be the same at the wait. Registers
// that ordinary instructions wrote after the last wgmma_fence are an error, as far as this is seen: of those that a wgmma
// has used before, the fence remembers the values.
//
// The four warps of a warpgroup need not run in step here, but must issue the same instructions.

#include "emulator/wgmma.h"

#include <array>
#include <cstring>
#include <deque>
#include <map>
#include <vector>

#include "common/check.h"
#include "cuda/ptx_wgmma.cuh"
#include "emulator/scheduler.h"
#include "formats/codebooks.h"

#define LOWBIT_ARITHMETIC __attribute__((no_sanitize("address", "undefined"), optimize("O3")))

namespace lowbit::emulator {
namespace {

using cuda::Wgmma;

constexpr int kGroupWarps = 4, kRows = 16, kRowBytes = 32;  // rows of a warp; bytes of K
constexpr uint32_t kPoison = 0xffbadbadu;                   // NaN
constexpr int kMostRegisters = 65536;                       // of a multiprocessor
constexpr const char* kNames[] = {"bf16", "f16", "e4m3", "e5m2", "s8"};

// Values of registers that a wgmma has used, at the last fence. A lane's arrays stay where they are on its stack.
using Remembered = std::map<const uint32_t*, std::vector<uint32_t>>;

struct InFlight {
  int64_t group;
  int kind, columns;
  uint64_t b;
  Site at;
  std::array<uint32_t*, kLanes> d;
  std::array<const uint32_t*, kLanes> a;
  std::array<std::array<uint32_t, 4>, kLanes> a_was;
  std::vector<uint8_t> b_was;
  std::vector<uint32_t> result;  // [lane][columns / 2]
  bool superseded;               // a later one adds to the same D
};

struct WarpUnits {
  std::deque<InFlight> flying;
  std::array<Remembered, kLanes> remembered;
  int64_t open_group = 0;
  size_t issued = 0;
  bool fenced = false;
  int registers = 0;  // a thread; 0: as launched
};

struct Issued {
  int kind, columns;
  uint64_t b;
  Site at;
};

}  // namespace

struct MatrixUnits {
  std::vector<WarpUnits> warps;
  std::vector<std::vector<Issued>> groups;  // what the warpgroup's foremost warp has issued
  std::vector<uint8_t> shadow;              // shared memory as the asynchronous proxy sees it
  // The last B as numbers: the warps of a group, and the fragments of a warp, multiply with the same.
  int kind = -1;
  std::vector<uint8_t> b_bytes;
  std::vector<float> b_values;  // [k][column]
};

namespace {

MatrixUnits& units() { return *this_thread().block->units; }
int warp_index() { return this_thread().index / kLanes; }
WarpUnits& warp_units() { return units().warps[static_cast<size_t>(warp_index())]; }

// It exists from the first use on: most kernels have none.
std::vector<uint8_t>& shadow_of(Block& block) {
  std::vector<uint8_t>& shadow = block.units->shadow;
  if (shadow.empty()) shadow.assign(static_cast<size_t>(block.shared_bytes), block.settings.poison);
  return shadow;
}
// ---- numbers -----------------------------------------------------------------------------------------------------------

constexpr int width(int kind) { return kind <= static_cast<int>(Wgmma::kF16) ? 2 : 1; }

float value(int kind, bool of_a, const uint8_t* bytes) {
  switch (static_cast<Wgmma>(kind)) {
    case Wgmma::kBf16:
      return bfloat16_value(bytes[0] | static_cast<uint32_t>(bytes[1]) << 8);
    case Wgmma::kF16:
      return half_value(bytes[0] | static_cast<uint32_t>(bytes[1]) << 8);
    case Wgmma::kE5m2:
      return of_a ? fp8_e5m2_code()[*bytes] : fp8_e4m3_code()[*bytes];
    case Wgmma::kE4m3:
      return fp8_e4m3_code()[*bytes];
    default:
      return static_cast<float>(static_cast<int8_t>(*bytes));
  }
}

// sums[16][columns] += a[16][depth] b[depth][columns]
LOWBIT_ARITHMETIC void multiply(const float* a, const float* b, int depth, int columns,
                                float* sums) {
  for (int m = 0; m < kRows; ++m) {
    float* row = sums + m * columns;
    for (int k = 0; k < depth; ++k) {
      const float factor = a[m * depth + k];
      const float* from = b + k * columns;
      for (int n = 0; n < columns; ++n) row[n] += factor * from[n];
    }
  }
}

// ---- operands ----------------------------------------------------------------------------------------------------------

// The 16 bytes `half` of column n, by the descriptor: offset in shared memory (PTX 9.7.15.5.1, K-major).
int64_t piece_of(uint64_t descriptor, int n, int half, Site at) {
  const auto field = [&](int low) {
    return static_cast<int64_t>(descriptor >> low & 0x3fffu) << 4;
  };
  const int64_t start = field(0), leading = field(16), stride = field(32);
  const int swizzle = static_cast<int>(descriptor >> 62);
  if (swizzle == 0) return start + n / 8 * stride + n % 8 * 16 + half * leading;
  if (swizzle != 1) fail_here(concat("a descriptor with swizzle mode ", swizzle), at);
  if ((descriptor >> 49 & 7u) != 0 || (start >> 7 & 7) != 0)
    fail_here("a swizzled operand whose pattern does not begin at a multiple of 1024 bytes", at);
  const int64_t plain = start + n / 8 * stride + n % 8 * 128 + half * 16;
  return plain ^ (plain >> 7 & 7) << 4;
}

void read_b(const InFlight& op, std::vector<uint8_t>& to) {
  const Block& block = *this_thread().block;
  to.resize(static_cast<size_t>(op.columns * kRowBytes));
  for (int n = 0; n < op.columns; ++n) {
    for (int half = 0; half < 2; ++half) {
      const int64_t offset = piece_of(op.b, n, half, op.at);
      if (offset + 16 > block.shared_bytes)
        fail_here(concat("wgmma: column ", n, " of B at byte ", offset, " of the ",
                         block.shared_bytes, " bytes of shared memory"),
                  op.at);
      std::memcpy(&to[static_cast<size_t>(n * kRowBytes + 16 * half)], block.shared + offset, 16);
    }
  }
}

// Whether all of B is as the asynchronous proxy sees it.
void check_proxy(const InFlight& op) {
  Block& block = *this_thread().block;
  const std::vector<uint8_t>& shadow = shadow_of(block);
  for (int n = 0; n < op.columns; ++n) {
    for (int half = 0; half < 2; ++half) {
      const auto offset = static_cast<size_t>(piece_of(op.b, n, half, op.at));
      if (std::memcmp(&shadow[offset], block.shared + offset, 16) != 0)
        fail_here(
            "wgmma: an operand in shared memory was written by ordinary stores, without a "
            "fence_proxy_async after them",
            op.at);
    }
  }
}

const float* values_of_b(const InFlight& op) {
  MatrixUnits& all = units();
  if (all.kind == op.kind && all.b_bytes == op.b_was) return all.b_values.data();
  const int size = width(op.kind), depth = kRowBytes / size;
  all.kind = op.kind;
  all.b_bytes = op.b_was;
  all.b_values.resize(static_cast<size_t>(depth * op.columns));
  for (int n = 0; n < op.columns; ++n) {
    for (int k = 0; k < depth; ++k)
      all.b_values[static_cast<size_t>(k * op.columns + n)] =
          value(op.kind, false, &op.b_was[static_cast<size_t>(n * kRowBytes + size * k)]);
  }
  return all.b_values.data();
}

// ---- registers ---------------------------------------------------------------------------------------------------------

// Reads stacks of other fibers, at addresses that their frames may have left: never faulty, maybe meaningless.
LOWBIT_ARITHMETIC void remember(Remembered& remembered) {
  for (auto& [address, values] : remembered) {
    const volatile uint32_t* from = address;
    for (size_t i = 0; i < values.size(); ++i) values[i] = from[i];
  }
}

void check_fenced(Remembered& remembered, const uint32_t* registers, int count, const char* which,
                  Site at) {
  const auto size = static_cast<size_t>(count);
  auto [found, is_new] = remembered.try_emplace(registers, registers, registers + count);
  if (is_new || found->second.size() != size) {
    found->second.assign(registers, registers + count);
    return;
  }
  if (std::memcmp(found->second.data(), registers, 4 * size) != 0)
    fail_here(concat("wgmma: registers of ", which, " were written after the last wgmma_fence"),
              at);
}

// ---- issue -------------------------------------------------------------------------------------------------------------

struct Lane : WgmmaOperands {
  Site at;
};

// The one that the new one's D belongs to, if it is in flight.
InFlight* earlier_of(WarpUnits& warp, const Lane& first) {
  InFlight* found = nullptr;
  for (InFlight& op : warp.flying) {
    if (op.d[0] == first.d && op.columns == first.columns && op.kind == first.kind) {
      found = &op;
    } else if (op.d[0] < first.d + first.columns / 2 && first.d < op.d[0] + op.columns / 2) {
      fail_here("wgmma: D overlaps that of another one in flight", first.at);
    }
  }
  return found;
}

void check_group(const Lane& first) {
  const int index = warp_index();
  Block& block = *this_thread().block;
  if (block.warps.size() % kGroupWarps != 0)
    fail_here(concat("wgmma in a block of ", block.warps.size(), " warps: no whole warpgroups"),
              first.at);
  if (block.settings.capability != 90)
    fail_here(concat("wgmma needs sm_90, this is sm_", block.settings.capability), first.at);
  std::vector<Issued>& group = units().groups[static_cast<size_t>(index / kGroupWarps)];
  const size_t mine = warp_units().issued++;
  if (mine == group.size()) {
    group.push_back({first.kind, first.columns, first.b, first.at});
    return;
  }
  const Issued& other = group[mine];
  if (other.kind != first.kind || other.columns != first.columns || other.b != first.b ||
      other.at.line != first.at.line)
    fail_here(concat("divergent wgmma: warp ", index, " and another one of its warpgroup issue ",
                     "different instructions (the other at ", describe(other.at), ")"),
              first.at);
}

// What D holds before, [16][columns], as floats; s8 keeps its sums apart.
std::vector<float> sums_before(const InFlight& op, const InFlight* earlier, bool accumulate) {
  std::vector<float> sums(static_cast<size_t>(kRows * op.columns), 0.0f);
  if (!accumulate || op.kind == static_cast<int>(Wgmma::kS8)) return sums;
  for (int l = 0; l < kLanes; ++l) {
    const uint32_t* from = earlier == nullptr
                               ? op.d[static_cast<size_t>(l)]
                               : &earlier->result[static_cast<size_t>(l * op.columns / 2)];
    for (int i = 0; i < op.columns / 2; ++i) {
      const int row = l / 4 + 8 * (i / 2 % 2), column = i / 4 * 8 + 2 * (l % 4) + i % 2;
      sums[static_cast<size_t>(row * op.columns + column)] = float_of(from[i]);
    }
  }
  return sums;
}

void compute(InFlight& op, const InFlight* earlier, bool accumulate) {
  const int size = width(op.kind), depth = kRowBytes / size, per = 4 / size;
  std::vector<float> a(static_cast<size_t>(kRows * depth));
  for (int l = 0; l < kLanes; ++l) {
    for (int r = 0; r < 4; ++r) {
      uint8_t bytes[4];
      std::memcpy(bytes, &op.a_was[static_cast<size_t>(l)][static_cast<size_t>(r)], 4);
      const int row = l / 4 + 8 * (r % 2), k = (r / 2 * 4 + l % 4) * per;
      for (int i = 0; i < per; ++i)
        a[static_cast<size_t>(row * depth + k + i)] = value(op.kind, true, bytes + size * i);
    }
  }
  std::vector<float> sums = sums_before(op, earlier, accumulate);
  multiply(a.data(), values_of_b(op), depth, op.columns, sums.data());
  op.result.resize(static_cast<size_t>(kLanes * op.columns / 2));
  for (int l = 0; l < kLanes; ++l) {
    for (int i = 0; i < op.columns / 2; ++i) {
      const int row = l / 4 + 8 * (i / 2 % 2), column = i / 4 * 8 + 2 * (l % 4) + i % 2;
      const float sum = sums[static_cast<size_t>(row * op.columns + column)];
      const auto at = static_cast<size_t>(l * op.columns / 2 + i);
      if (op.kind != static_cast<int>(Wgmma::kS8)) {
        op.result[at] = bits_of(sum);
        continue;
      }
      const uint32_t before = !accumulate          ? 0u
                              : earlier == nullptr ? op.d[static_cast<size_t>(l)][i]
                                                   : earlier->result[at];
      op.result[at] = before + static_cast<uint32_t>(static_cast<int32_t>(sum));
    }
  }
}

void run_wgmma(void* const (&operands)[kLanes]) {
  const auto& first = *static_cast<const Lane*>(operands[0]);
  WarpUnits& warp = warp_units();
  check_group(first);
  if (!warp.fenced) fail_here("wgmma without a wgmma_fence before it", first.at);
  InFlight* earlier = earlier_of(warp, first);
  InFlight op{
      warp.open_group, first.kind, first.columns, first.b, first.at, {}, {}, {}, {}, {}, false};
  for (size_t l = 0; l < kLanes; ++l) {
    const auto& lane = *static_cast<const Lane*>(operands[l]);
    if (lane.b != first.b || lane.accumulate != first.accumulate)
      fail_here("wgmma: the lanes of a warp give different descriptors", first.at);
    op.d[l] = lane.d;
    op.a[l] = lane.a;
    std::memcpy(op.a_was[l].data(), lane.a, sizeof op.a_was[l]);
    check_fenced(warp.remembered[l], lane.a, 4, "A", first.at);
    if (first.accumulate && earlier == nullptr)
      check_fenced(warp.remembered[l], lane.d, first.columns / 2, "D", first.at);
  }
  read_b(op, op.b_was);
  check_proxy(op);
  compute(op, earlier, first.accumulate);
  if (earlier != nullptr) earlier->superseded = true;
  for (uint32_t* d : op.d) std::fill(d, d + op.columns / 2, kPoison);
  warp.flying.push_back(std::move(op));
}

// ---- wait --------------------------------------------------------------------------------------------------------------

void land(WarpUnits& warp, const InFlight& op) {
  std::vector<uint8_t> b_now;
  read_b(op, b_now);
  if (b_now != op.b_was)
    fail_here("an operand of a wgmma in shared memory changed while it was in flight", op.at);
  const auto count = static_cast<size_t>(op.columns / 2);
  for (size_t l = 0; l < kLanes; ++l) {
    if (std::memcmp(op.a[l], op.a_was[l].data(), sizeof op.a_was[l]) != 0)
      fail_here("registers of A changed while a wgmma was in flight", op.at);
    for (size_t i = 0; i < count; ++i) {
      if (op.d[l][i] != kPoison)
        fail_here("registers of D were written while a wgmma was in flight", op.at);
    }
    if (op.superseded) continue;
    std::memcpy(op.d[l], &op.result[l * count], 4 * count);
    const auto found = warp.remembered[l].find(op.d[l]);
    if (found != warp.remembered[l].end())
      found->second.assign(op.d[l], op.d[l] + count);  // wgmma itself needs no fence
  }
}

struct Wait {
  int pending;
};
void run_wait(void* const (&operands)[kLanes]) {
  WarpUnits& warp = warp_units();
  const int64_t done = warp.open_group - static_cast<const Wait*>(operands[0])->pending;
  while (!warp.flying.empty() && warp.flying.front().group < done) {
    land(warp, warp.flying.front());
    warp.flying.pop_front();
  }
}
void run_commit(void* const (&)[kLanes]) { ++warp_units().open_group; }
void run_fence(void* const (&)[kLanes]) {
  WarpUnits& warp = warp_units();
  warp.fenced = true;
  for (Remembered& lane : warp.remembered) remember(lane);
}

// ---- register budgets --------------------------------------------------------------------------------------------------

struct Budget {
  int count;
  bool more;
};
int launched_registers(const Block& block) {
  return std::min(kMostRegisters / static_cast<int>(block.threads.size()) / 8 * 8, 256);
}
void run_budget(void* const (&operands)[kLanes]) {
  const auto& budget = *static_cast<const Budget*>(operands[0]);
  WarpUnits& warp = warp_units();
  const int now = warp.registers == 0 ? launched_registers(*this_thread().block) : warp.registers;
  if (budget.more ? budget.count < now : budget.count > now)
    fail_here(
        concat(budget.more ? "raising" : "lowering", " registers from ", now, " to ", budget.count),
        this_thread().at);
  warp.registers = budget.count;
}

constexpr Collective kWgmma = {"wgmma", run_wgmma};
constexpr Collective kWait = {"wgmma_wait", run_wait};
constexpr Collective kCommit = {"wgmma_commit", run_commit};
constexpr Collective kFence = {"wgmma_fence", run_fence};
constexpr Collective kBudget = {"set_registers", run_budget};

// What four warps have to do alike.
std::string differences(const Block& block) {
  const MatrixUnits& all = *block.units;
  int64_t registers = 0;
  for (size_t w = 0; w < all.warps.size(); ++w) {
    const WarpUnits& warp = all.warps[w];
    const size_t first = w / kGroupWarps * kGroupWarps;
    const size_t issued = all.groups[w / kGroupWarps].size();
    if (!warp.flying.empty())
      return concat("warp ", w, " ended with a ", kNames[warp.flying.front().kind],
                    " wgmma in flight (", describe(warp.flying.front().at), ")");
    if (warp.issued != issued)
      return concat("divergent wgmma: warp ", w, " issued ", warp.issued,
                    ", another one of its warpgroup ", issued, " (",
                    describe(all.groups[w / kGroupWarps][warp.issued].at), ")");
    if (warp.registers != all.warps[first].registers)
      return concat("warps ", first, " and ", w, " of a warpgroup have different register budgets");
    registers += kLanes * (warp.registers == 0 ? launched_registers(block) : warp.registers);
  }
  // What others give up is all there is to have: hardware would wait for the rest.
  const int64_t launched = static_cast<int64_t>(block.threads.size()) * launched_registers(block);
  if (registers > launched)
    return concat("register budgets of ", registers, " in all, the block was launched with ",
                  launched);
  return "";
}

}  // namespace

void wgmma(const WgmmaOperands& operands, Site at) {
  Lane lane{operands, at};
  meet(kWgmma, &lane, at);
}
int wgmma_columns(bool integers, int most, int number, Site at) {
  const int columns = number < 0 ? 0 : cuda::numbered_columns(integers, most, number);
  if (columns < 8 || columns > most)
    fail_here(concat("wgmma number ", number, " of those for up to ", most, " columns"), at);
  return columns;
}
void wgmma_fence(Site at) { meet(kFence, nullptr, at); }
void wgmma_commit(Site at) { meet(kCommit, nullptr, at); }
void wgmma_wait(int pending, Site at) {
  Wait wait{pending};
  meet(kWait, &wait, at);
}
void set_registers(int count, bool more, Site at) {
  Budget budget{count, more};
  meet(kBudget, &budget, at);
}

void begin_matrix_units(Block& block) {
  block.units = std::make_shared<MatrixUnits>();
  block.units->warps.resize(block.warps.size());
  block.units->groups.resize((block.warps.size() + kGroupWarps - 1) / kGroupWarps);
}
void end_matrix_units(Block& block) {
  const std::string wrong = differences(block);
  if (!wrong.empty()) block.error = concat(describe(block.threads[0]), ": ", wrong);
}

void async_wrote(Block& block, const void* to, int64_t bytes) {
  const int64_t offset = static_cast<const uint8_t*>(to) - block.shared;
  std::memcpy(&shadow_of(block)[static_cast<size_t>(offset)], to, static_cast<size_t>(bytes));
}
void publish_to_async_proxy(Block& block) {
  std::memcpy(shadow_of(block).data(), block.shared, static_cast<size_t>(block.shared_bytes));
}

}  // namespace lowbit::emulator
