// The quantizer's search (quantize/search-inl.h): the candidate that the CPU chooses.
//
// The CPU takes, in order, each candidate whose error is less than the least so far: the first of those with the least error.
// Errors are fp64 sums, each term of which is hundreds of instructions here (ieee.h). So candidates are estimated first, in the
// hardware's fp32, and only those summed that may be the one.
//
// What an estimate says of an error. Let T be the sum of w * d^2 over a part of a group, d = x - v and v the fp32 value that x
// would have; A = max |x| + |offset| + |float zero * scale|. In the hardware's arithmetic, with division wrong by 2^-21 at most
// and products contracted or not, |d| is wrong by eta = 2^-18 A at most: where x is so near the middle between two codes that
// the other one is taken, both are as far away, but for 2^-20 A. So w * d^2 is wrong by w (2^-9 d^2 + 513 eta^2) at most
// (2 |d| eta <= 2^-9 d^2 + 2^9 eta^2), a sum of n <= 2^13 terms by 2^-10.9 of itself besides, and T lies within
// (1 +- 2^-8) estimate +- 2^-26 A^2 (sum of w). The same holds for the fp64 sum, whose own error is less than 2^-30 of it. A from
// 2^-30 to 2^30 and a sum of w from 2^-20 to 2^40, with no w negative, keep what underflows or is taken for zero far below that,
// and overflow away. Anything else, or an estimate that is not finite, bounds nothing: the candidate's error is summed.
#pragma once

#include "metal/shaders/quantize.h"

namespace lowbit {

// The same rules on the hardware's floats.
namespace estimate {
typedef float Float32;
inline float bits_float(uint bits) { return as_type<float>(bits); }
inline uint float_bits(float value) { return as_type<uint>(value); }
inline float round_even(float value) { return rint(value); }
#include "quantize/rules-inl.h"
}  // namespace estimate

enum : int { kSteps = rules::kSearchSteps, kParts = 4, kRound = 16 };

struct SearchShared {
  RangeLanes range;
  float lower[kParts][kSteps], upper[kParts][kSteps];
  ulong partial[kRound][kTeam];
  ulong total[kRound];
};

// ---- estimates ---------------------------------------------------------------------------------------------------------

template <class Exact>
struct Estimate;
template <ZeroKind kKind>
struct Estimate<rules::IntEncoder<kKind>> {
  typedef estimate::IntEncoder<kKind> Encoder;
  static inline Encoder of(thread const rules::IntEncoder<kKind>& e) {
    return {{}, as_type<float>(e.top.bits)};
  }
};
template <int kExponentBits, int kMantissaBits>
struct Estimate<rules::FloatEncoder<rules::SmallFloat<kExponentBits, kMantissaBits>>> {
  typedef estimate::FloatEncoder<estimate::SmallFloat<kExponentBits, kMantissaBits>> Encoder;
  static inline Encoder of(
      thread const rules::FloatEncoder<rules::SmallFloat<kExponentBits, kMantissaBits>>& e) {
    return {{}, as_type<float>(e.max.bits)};
  }
};
template <>
struct Estimate<rules::BookEncoder> {
  typedef estimate::BookEncoder Encoder;
  static inline Encoder of(thread const rules::BookEncoder& e) {
    float levels[16];
    for (int i = 0; i < 16; ++i) levels[i] = as_type<float>(e.levels[i].bits);
    return Encoder(levels);
  }
};

struct Bounds {
  float lower, upper;
};

inline Bounds nothing_known() { return {-1.0e37f, 1.0e37f}; }

// By bits, which says no of negative numbers, infinities and NaN too, in every math mode.
inline bool within(float value, float low, float high) {
  return as_type<uint>(value) >= as_type<uint>(low) && as_type<uint>(value) <= as_type<uint>(high);
}

// Of the error of every `parts`th element from `part` on.
template <class Encoder>
inline Bounds estimated(thread const Task& task, thread const Encoder& e, int part, int parts) {
  float error = 0.0f, weights = 0.0f;
  bool sound = task.group.rows * task.group.width <= 8192 * parts;
  LOWBIT_FOR_EACH(walk, part, parts, task.group) {
    const float x = as_type<float>(value_at(task.group, walk.row, walk.column).bits);
    const float weight =
        task.group.weighted ? as_type<float>(task.group.importance[walk.column]) : 1.0f;
    const float difference = x - e.value(x);
    error += difference * difference * weight;
    weights += weight;
    sound = sound && within(weight, 0.0f, 1.0e12f);
  }
  float extent = as_type<float>(task.range.magnitude.bits) + fabs(e.p.offset);
  if (ZeroKind(Encoder::kZeros) == ZeroKind::kFloat) extent += fabs(e.p.zero * e.p.scale);
  sound = sound && within(extent, 9.5e-10f, 1.0e9f) && within(weights, 1.0e-6f, 1.0e12f) &&
          within(error, 0.0f, 1.0e31f);
  if (!sound) return nothing_known();
  const float slack = extent * extent * weights * 1.5e-8f;
  return {error - error * 0.00390625f - slack, error + error * 0.00390625f + slack};
}

// Candidate `step`, as the search tries it.
template <ZeroKind kKind>
inline rules::Affine candidate_of(thread const Task& task, int step) {
  const Float32 factor = rules::search_factor<kKind>(task.grid, task.range, step);
  return rules::affine_of<kKind>(task.grid, task.range, factor);
}

template <class Exact>
inline void estimate_all(thread const Task& task, thread const Exact& exact,
                         threadgroup SearchShared& shared) {
  const int parts = task.threads > kSteps ? kParts : 1, count = rules::search_steps(task.grid);
  typename Estimate<Exact>::Encoder e = Estimate<Exact>::of(exact);
  for (int i = task.thread_index; i < count * parts; i += task.threads) {
    const int step = i % count, part = i / count;
    const rules::Affine p = candidate_of<ZeroKind(Exact::kZeros)>(task, step);
    e.p = {as_type<float>(p.scale.bits), as_type<float>(p.zero.bits),
           as_type<float>(p.offset.bits)};
    const Bounds bounds =
        rules::usable_scale(p.scale) ? estimated(task, e, part, parts) : nothing_known();
    shared.lower[part][step] = bounds.lower;
    shared.upper[part][step] = bounds.upper;
  }
}

// The steps that may have the least error: a bit each.
struct Steps {
  uint word[2];
};
inline Steps possible_steps(thread const Task& task, threadgroup SearchShared& shared) {
  const int parts = task.threads > kSteps ? kParts : 1, count = rules::search_steps(task.grid);
  float least = 3.0e38f;
  for (int step = 0; step < count; ++step) {
    float upper = 0.0f;
    for (int part = 0; part < parts; ++part) upper += shared.upper[part][step];
    least = upper < least ? upper : least;
  }
  Steps steps = {{0u, 0u}};
  for (int step = 0; step < count; ++step) {
    float lower = 0.0f;
    for (int part = 0; part < parts; ++part) lower += shared.lower[part][step];
    if (lower <= least) steps.word[step / 32] |= 1u << (step % 32);
  }
  return steps;
}

// The first step of them, which is taken out; -1 where there is none.
inline int next_step(thread Steps& steps) {
  for (int i = 0; i < 2; ++i) {
    const uint word = steps.word[i];
    if (word == 0u) continue;
    steps.word[i] = word & (word - 1u);
    return 32 * i + 31 - int(clz(word & (~word + 1u)));
  }
  return -1;
}

// ---- sums over a group -------------------------------------------------------------------------------------------------

// A lane's share of the squared error.
template <class Exact>
inline Float64 partial_error(thread const Group& group, int lane, thread const Exact& e) {
  Float64 sum = Float64(0);
  LOWBIT_FOR_EACH(walk, lane, kTeam, group) {
    const Float32 x = value_at(group, walk.row, walk.column);
    Float64 term = rules::error_term(x, e.value(x));
    if (group.weighted) term = Float64(bits_float(group.importance[walk.column])) * term;
    sum = sum + term;
  }
  return sum;
}

// A lane's share of one of rules::Moments, by its place in there.
template <class Exact>
inline Float64 partial_moment(thread const Group& group, int lane, thread const Exact& e,
                              int moment) {
  Float64 sum = Float64(0);
  LOWBIT_FOR_EACH(walk, lane, kTeam, group) {
    const Float32 x = value_at(group, walk.row, walk.column);
    Float64 term = group.weighted ? Float64(bits_float(group.importance[walk.column])) : Float64(1);
    if (moment == 1 || moment == 2 || moment == 4) {
      const Float64 level = Float64(e.level(x));
      term = term * level;
      if (moment == 2) term = term * level;
    }
    if (moment >= 3) term = term * Float64(x);
    sum = sum + term;
  }
  return sum;
}

// shared.total of the first `count` rows of shared.partial, in the CPU's order. All threads of the threadgroup.
inline void add_lanes(int count, int thread_index, threadgroup SearchShared& shared) {
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (thread_index < count) {
    Float64 total = Float64(0);
    for (int lane = 0; lane < kTeam; ++lane)
      total = total + bits_double(shared.partial[thread_index][lane]);
    shared.total[thread_index] = total.bits;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// ---- the search --------------------------------------------------------------------------------------------------------

struct Best {
  Float64 error;
  int step;  // -1: round-to-nearest
};

// Round-to-nearest and the steps, sixteen at a time: teams take turns, and everyone looks at all of their errors in order.
template <class Exact>
inline Best best_of(thread const Task& task, Steps steps, thread const Exact& nearest,
                    threadgroup SearchShared& shared) {
  constexpr ZeroKind kKind = ZeroKind(Exact::kZeros);
  const int team = task.thread_index / kTeam, teams = task.threads / kTeam;
  const int lane = task.thread_index % kTeam;
  Best best = {Float64(0), -1};
  for (bool first = true;; first = false) {
    int tried[kRound], count = 0;
    if (first) tried[count++] = -1;
    for (; count < kRound; ++count) {
      tried[count] = next_step(steps);
      if (tried[count] < 0) break;
    }
    if (count == 0) return best;
    for (int i = team; i < count; i += teams) {
      Exact e = nearest;
      if (tried[i] >= 0) e.p = candidate_of<kKind>(task, tried[i]);
      const Float64 error = partial_error(task.group, lane, e);
      // What no candidate may be has an error that is less than none.
      const bool usable = tried[i] < 0 || rules::usable_scale(e.p.scale);
      shared.partial[i][lane] = usable ? error.bits : nan_of<ulong>();
    }
    add_lanes(count, task.thread_index, shared);
    for (int i = 0; i < count; ++i) {
      const Float64 error = bits_double(shared.total[i]);
      if (tried[i] < 0 || (best.error > Float64(0) && error < best.error)) best = {error, tried[i]};
    }
  }
}

template <class Exact>
inline rules::Affine refitted(thread const Task& task, thread const Exact& e,
                              threadgroup SearchShared& shared) {
  constexpr ZeroKind kKind = ZeroKind(Exact::kZeros);
  constexpr bool kScaleOnly = kKind == ZeroKind::kNone || kKind == ZeroKind::kInt;
  const int team = task.thread_index / kTeam, teams = task.threads / kTeam;
  const int lane = task.thread_index % kTeam, count = kScaleOnly ? 2 : 5;
  for (int i = team; i < count; i += teams) {
    const int moment = kScaleOnly ? 2 * i + 2 : i;
    shared.partial[i][lane] = partial_moment(task.group, lane, e, moment).bits;
  }
  add_lanes(count, task.thread_index, shared);
  rules::Moments s;
  if (kScaleOnly) {
    s.w = s.l = s.x = Float64(0);  // not asked for
    s.ll = bits_double(shared.total[0]);
    s.lx = bits_double(shared.total[1]);
  } else {
    s = {bits_double(shared.total[0]), bits_double(shared.total[1]), bits_double(shared.total[2]),
         bits_double(shared.total[3]), bits_double(shared.total[4])};
  }
  return rules::round_to_storage<kKind>(rules::refit_of<kKind>(s, e.p), task.grid.scales);
}

// `e` holds round-to-nearest's parameters; afterwards the best found.
template <class Exact>
inline void search_scale(thread const Task& task, thread Exact& e,
                         threadgroup SearchShared& shared) {
  estimate_all(task, e, shared);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const Best best = best_of(task, possible_steps(task, shared), e, shared);
  if (best.step >= 0) e.p = candidate_of<ZeroKind(Exact::kZeros)>(task, best.step);
  Float64 least = best.error;
  for (int i = 0; i < rules::kSearchRefits && least > Float64(0); ++i) {
    Exact candidate = e;
    candidate.p = refitted(task, e, shared);
    if (!rules::usable_scale(candidate.p.scale)) return;
    if (task.thread_index < kTeam)
      shared.partial[0][task.thread_index] =
          partial_error(task.group, task.thread_index, candidate).bits;
    add_lanes(1, task.thread_index, shared);
    const Float64 error = bits_double(shared.total[0]);
    if (!(error < least)) return;
    least = error;
    e.p = candidate.p;
  }
}

// group.x: groups of k; group.y: rows, or blocks of 128.
template <class Source>
[[kernel]] void quantize_search(LOWBIT_PARAMS_ARGUMENTS, device const uchar* weight [[buffer(5)]],
                                device const uint* importance [[buffer(6)]],
                                device const uint* super_scale [[buffer(7)]],
                                device uchar* packed [[buffer(8)]],
                                device uchar* scales [[buffer(9)]],
                                device uchar* zeros [[buffer(10)]], LOWBIT_POSITION) {
  LOWBIT_SHARED(SearchShared, shared);
  const Quantize p = LOWBIT_PARAMS(Quantize);
  Task task = task_of(p, group, thread_index, weight, importance, super_scale);
  task.range = range_of(task.group, task.thread_index, shared.range);
  typename Source::Exact e = Source::exact(task);
  start_nearest(task, e);
  if (rules::searchable(task.range, e.p)) search_scale(task, e, shared);
  store_group(task, e, p, group, packed, scales, zeros);
}

}  // namespace lowbit
