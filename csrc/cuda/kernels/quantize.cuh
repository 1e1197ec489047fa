// The weight quantizer on the GPU, to the bits of the CPU: the rules are shared (quantize/rules-inl.h), and the sums run
// over the same 16 lanes in the same order.
//
// Half a warp is a team: lane j of it takes the elements i with i % 16 == j, in order, and totals are added from lane 0
// to lane 15. A team quantizes a group by itself, or, where groups are long, the eight teams of a block share one: each
// tries every eighth candidate of the search, and the best is chosen as if they had been tried in order (smallest
// error, then smallest index). Refits depend on each other, so all teams make the same one.
//
// Collectives (shuffles, sync_warp) name the whole warp. Both its teams therefore walk the same loops, as long as either
// has work; what a team does in a step that is not its own is thrown away.
//
// Quantizing happens once per weight and is bound by its divisions and by fp64 sums (two of 64 candidates' nine
// instructions per element), not by memory.
#pragma once

#include <cstdint>

#include "common/check.h"
#include "cuda/elements.cuh"
#include "cuda/launch.cuh"
#include "cuda/launchers.h"
#include "cuda/rules.cuh"

namespace lowbit::cuda {

inline constexpr int kTeam = 16;  // lanes; the sums' order is that of the CPU's 16 lanes
inline constexpr int kTeams = 8;  // per block
inline constexpr int kQuantizeThreads = kTeam * kTeams;
inline constexpr int kChunk = 128;  // codes that a team stages before it packs them

struct QuantizeLaunch {
  QuantizeParams q;
  rules::CodeGrid grid;
  int64_t groups;      // of the whole weight
  bool shared_groups;  // a block per group
  float levels[16];    // of a code book
};

// One found scale: what the search compares.
struct Found {
  double error;
  int32_t index;  // of the candidate; kSearchSteps: none
};
inline constexpr int64_t kQuantizeShared = kTeams * (kChunk + static_cast<int64_t>(sizeof(Found)));

struct Group {
  const uint8_t* weight;    // its first element
  const float* importance;  // of its first column, or null
  int64_t row_stride;
  int32_t count, width;  // elements; per row (all of them but for 128x128 blocks)
  Element type;

  __device__ float value(int32_t row, int32_t column) const {
    return load_element(weight, row * row_stride + column, type);
  }
  __device__ float at(int32_t i) const { return value(i / width, i % width); }
};

// body(x, column) for each of a lane's elements, in order. They are loaded again for every candidate, from L1: a tenth of
// what a candidate costs, and keeping them in registers would be a second kernel for short groups.
template <class Body>
__device__ void for_lane(const Group& group, int lane, const Body& body) {
  int32_t row = lane / group.width, column = lane % group.width;
  for (int32_t i = lane; inside(i, group.count); i += kTeam) {
    body(group.value(row, column), column);
    column += kTeam;
    while (column >= group.width) column -= group.width, ++row;
  }
}

// ---- collectives of a team ---------------------------------------------------------------------------------------------

__device__ inline double team_total(double value) {
  const int first = static_cast<int>(threadIdx.x) % 32 / kTeam * kTeam;
  double total = 0;
#pragma unroll 4  // all 16 of a refit's five sums at once would be 160 registers
  for (int j = 0; j < kTeam; ++j) total += ptx::shuffle(value, first + j);
  return total;
}

__device__ inline bool team_any(bool value) {
  uint32_t any = value ? 1u : 0u;
  for (int mask = 1; mask < kTeam; mask *= 2) any |= ptx::shuffle_xor(any, mask);
  return any != 0;
}

// As range_of of the CPU, down to which of two zeros is the least: every lane starts from the first element.
__device__ inline rules::Range range_of(const Group& group, int lane) {
  float low = group.at(0), high = low;  // a group that does not exist has the first one's address
  bool nan = false;
  for_lane(group, lane, [&](float v, int32_t) {
    low = v < low ? v : low;
    high = v > high ? v : high;
    nan |= rules::is_nan(v);
  });
  const int first = static_cast<int>(threadIdx.x) % 32 / kTeam * kTeam;
  rules::Range r{ptx::shuffle(low, first), ptx::shuffle(high, first), 0.0f, team_any(nan)};
  for (int j = 1; j < kTeam; ++j) {
    const float l = ptx::shuffle(low, first + j), h = ptx::shuffle(high, first + j);
    r.low = l < r.low ? l : r.low;
    r.high = h > r.high ? h : r.high;
  }
  r.magnitude = -r.low > r.high ? -r.low : r.high;
  return r;
}

template <class Encoder>
__device__ double squared_error(const Group& group, int lane, const Encoder& e) {
  double sum = 0;
  if (group.importance == nullptr) {
    for_lane(group, lane, [&](float x, int32_t) { sum += rules::error_term(x, e.value(x)); });
  } else {
    for_lane(group, lane, [&](float x, int32_t column) {
      sum += static_cast<double>(group.importance[column]) * rules::error_term(x, e.value(x));
    });
  }
  return team_total(sum);
}

template <class Encoder>
__device__ rules::Affine refit(const Group& group, int lane, const Encoder& e) {
  rules::Moments s{};
  for_lane(group, lane, [&](float v, int32_t column) {
    const double x = v, level = e.level(v);
    const double weight =
        group.importance == nullptr ? 1.0 : static_cast<double>(group.importance[column]);
    s.w += weight;
    s.l += weight * level;
    s.ll += weight * level * level;
    s.x += weight * x;
    s.lx += weight * level * x;
  });
  return rules::refit_of<static_cast<ZeroKind>(Encoder::kZeros)>(
      {team_total(s.w), team_total(s.l), team_total(s.ll), team_total(s.x), team_total(s.lx)}, e.p);
}

// ---- the search --------------------------------------------------------------------------------------------------------

// The best of all teams' candidates; every thread of the block takes part.
__device__ inline Found block_best(const Found& mine, Found* found) {
  const int team = static_cast<int>(threadIdx.x) / kTeam;
  if (threadIdx.x % kTeam == 0) found[team] = mine;
  ptx::sync_block();
  Found best = found[0];
  for (int t = 1; t < kTeams; ++t) {
    const Found other = found[t];
    if (other.error < best.error || (other.error == best.error && other.index < best.index))
      best = other;
  }
  return best;
}

// Whether the team has a group to search at all (`active`) may differ between the two teams of a warp.
template <class Encoder>
__device__ void search_scale(const QuantizeLaunch& p, const Group& group, int lane,
                             const rules::Range& range, bool active, Found* found, Encoder& e) {
  constexpr auto kKind = static_cast<ZeroKind>(Encoder::kZeros);
  Found best{squared_error(group, lane, e), rules::kSearchSteps};
  Encoder candidate = e;
  active = active && best.error > 0;
  const int first = p.shared_groups ? static_cast<int>(threadIdx.x) / kTeam : 0;
  const int step = p.shared_groups ? kTeams : 1;
  for (int i = first; i < rules::search_steps(p.grid); i += step) {
    if (!ptx::any_lane(active && best.error > 0)) break;
    candidate.p =
        rules::affine_of<kKind>(p.grid, range, rules::search_factor<kKind>(p.grid, range, i));
    const double error = squared_error(group, lane, candidate);
    if (active && rules::usable_scale(candidate.p.scale) && error < best.error) best = {error, i};
  }
  if (p.shared_groups) best = block_best(best, found);
  if (best.index < rules::kSearchSteps)
    e.p = rules::affine_of<kKind>(p.grid, range,
                                  rules::search_factor<kKind>(p.grid, range, best.index));
  for (int i = 0; i < rules::kSearchRefits; ++i) {
    active = active && best.error > 0;
    if (!ptx::any_lane(active)) break;
    candidate.p = rules::round_to_storage<kKind>(refit(group, lane, e), p.grid.scales);
    const double error = squared_error(group, lane, candidate);
    active = active && rules::usable_scale(candidate.p.scale) && error < best.error;
    if (active) best.error = error, e.p = candidate.p;
  }
}

// ---- codes -------------------------------------------------------------------------------------------------------------

// Eight-bit codes: one byte each, in place. `rank` of `teams` teams take turns in the rows of 16.
template <class Encoder>
__device__ void store_bytes(const Group& group, const Encoder& e, int lane, int rank, int teams,
                            int64_t row_bytes, uint8_t* to) {
  for (int32_t i = rank * kTeam + lane; inside(i, group.count); i += teams * kTeam) {
    const int32_t row = i / group.width, column = i % group.width;
    to[row * row_bytes + column] = e.code(group.value(row, column));
  }
}

// Narrower codes, always of one row: 128 at a time become bytes in shared memory, then a lane packs eight of them into
// `bits` bytes. `chunks` is the same for both teams of a warp.
template <class Encoder>
__device__ void store_packed(const Group& group, const Encoder& e, int lane, int rank, int teams,
                             int32_t chunks, int bits, uint8_t* stage, uint8_t* to) {
  for (int32_t chunk = rank; chunk < chunks; chunk += teams) {
    for (int i = lane; i < kChunk; i += kTeam)
      stage[i] = inside(chunk * kChunk + i, group.count) ? e.code(group.at(chunk * kChunk + i)) : 0;
    ptx::sync_warp();
    const int32_t first = chunk * kChunk + lane * 8;
    const int32_t left = group.count - first < 8 ? group.count - first : 8;  // none: 0 or less
    uint64_t word = 0;
    for (int j = 0; j < 8; ++j) word |= static_cast<uint64_t>(stage[lane * 8 + j]) << (j * bits);
    for (int b = 0; inside(b, (left * bits + 7) / 8); ++b)
      to[first / 8 * static_cast<int64_t>(bits) + b] = static_cast<uint8_t>(word >> (8 * b));
    ptx::sync_warp();
  }
}

__device__ inline Group group_of(const QuantizeLaunch& p, int64_t n, int64_t k0) {
  const CanonicalParams& c = p.q.shape;
  const int64_t columns = c.group_size < c.K - k0 ? c.group_size : c.K - k0;
  const int64_t rows = !c.blocks128 ? 1 : c.N - n < 128 ? c.N - n : 128;
  return {static_cast<const uint8_t*>(p.q.weight) + (n * c.K + k0) * element_bytes(p.q.type),
          p.q.importance == nullptr ? nullptr : p.q.importance + k0,
          c.K,
          static_cast<int32_t>(rows * columns),
          static_cast<int32_t>(columns),
          p.q.type};
}

template <class Encoder>
__device__ void quantize_group(const QuantizeLaunch& p, Encoder e) {
  constexpr auto kKind = static_cast<ZeroKind>(Encoder::kZeros);
  const CanonicalParams& c = p.q.shape;
  const int lane = static_cast<int>(threadIdx.x) % kTeam,
            team = static_cast<int>(threadIdx.x) / kTeam;
  const int64_t index = p.shared_groups ? blockIdx.x : blockIdx.x * int64_t{kTeams} + team;
  const bool exists = inside(index, p.groups);
  const int64_t row = exists ? index / c.groups : 0, g = exists ? index % c.groups : 0;
  const int64_t n = c.blocks128 ? row * 128 : row, k0 = g * c.group_size;
  Group group = group_of(p, n, k0);
  if (!exists) group.count = 0;

  const rules::Range range = range_of(group, lane);
  e.p = rules::affine_of<kKind>(p.grid, range, 1.0f);
  const bool search = exists && rules::searchable(range, e.p);
  if (range.has_nan) e.p = rules::with_nan<kKind>(e.p);
  uint8_t* stage = dynamic_shared() + kTeams * sizeof(Found) + team * kChunk;
  if (p.q.search)
    search_scale(p, group, lane, range, search, reinterpret_cast<Found*>(dynamic_shared()), e);

  const int rank = p.shared_groups ? team : 0, teams = p.shared_groups ? kTeams : 1;
  uint8_t* packed = p.q.to.packed + n * c.row_bytes + k0 / 8 * c.bits;
  if (c.bits == 8) {
    store_bytes(group, e, lane, rank, teams, c.row_bytes, packed);
  } else {
    const int32_t chunks = static_cast<int32_t>((c.group_size + kChunk - 1) / kChunk);
    store_packed(group, e, lane, rank, teams, (chunks + teams - 1) / teams * teams, c.bits, stage,
                 packed);
  }
  if (!exists || lane != 0 || rank != 0) return;
  const int bytes = scale_bytes(p.grid.scales.dtype),
            zero_size = kKind == ZeroKind::kInt ? 1 : bytes;
  rules::store_scale(e.p.scale, p.grid.scales,
                     static_cast<uint8_t*>(p.q.to.scales) + index * bytes);
  if (kKind != ZeroKind::kNone)
    rules::store_zero<kKind>(e.p, p.grid.scales.dtype,
                             static_cast<uint8_t*>(p.q.to.zeros) + index * zero_size);
}

}  // namespace lowbit::cuda
