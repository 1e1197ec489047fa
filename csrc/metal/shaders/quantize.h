// The weight quantizer, to the CPU's bits: its rules (quantize/rules-inl.h) on numbers that are IEEE's whatever the GPU does
// (ieee.h), sums over the same 16 lanes in the same order.
//
// A threadgroup per group: one SIMD-group, or eight where groups are long. Sixteen threads are a team, which adds up what the
// CPU's 16 lanes do; teams try different candidates of the search.
#pragma once

#include "metal/shaders/arguments.h"
#include "metal/shaders/codec.h"
#include "metal/shaders/ieee.h"

#define LOWBIT_HD

namespace lowbit {

using metal_params::Quantize;

namespace rules {
#include "quantize/rules-inl.h"
#include "quantize/search-inl.h"
}  // namespace rules

constant constexpr int kTeam = 16;

// ---- the elements of a group -------------------------------------------------------------------------------------------

struct Group {
  device const uchar* weight;
  device const uint* importance;  // fp32, of the group's first column
  bool weighted;
  long first;               // element of `weight`
  int stride, rows, width;  // one row of the group size, or a block of 128x128
  Element type;
};

inline Float32 load_number(device const uchar* data, long index, Element type) {
  switch (type) {
    case Element::kFloat32:
      return bits_float(((device const uint*)data)[index]);
    case Element::kFloat16:
      return rules::half_value_of(((device const ushort*)data)[index]);
    default:
      return bits_float(uint(((device const ushort*)data)[index]) << 16);
  }
}
inline Float32 value_at(thread const Group& group, int row, int column) {
  return load_number(group.weight, group.first + long(row) * long(group.stride) + long(column),
                     group.type);
}

// Every so many elements, in order.
struct Walk {
  int i, row, column;
};
inline Walk walk_from(int i, thread const Group& group) {
  return {i, i / group.width, i % group.width};
}
inline void advance(thread Walk& walk, int by, thread const Group& group) {
  walk.i += by;
  for (walk.column += by; walk.column >= group.width; walk.column -= group.width) ++walk.row;
}
#define LOWBIT_FOR_EACH(walk, from, by, group)                                       \
  for (Walk walk = walk_from(from, group); inside(walk.i, group.rows * group.width); \
       advance(walk, by, group))

// ---- a group's range ---------------------------------------------------------------------------------------------------

struct RangeLanes {
  uint low[kTeam], high[kTeam], nan[kTeam];
};

// As range_of of the CPU, down to which of two zeros is the least: every lane starts from the first element.
inline rules::Range range_of(thread const Group& group, int thread_index,
                             threadgroup RangeLanes& shared) {
  if (thread_index < kTeam) {
    Float32 low = value_at(group, 0, 0), high = low;
    bool nan = false;
    LOWBIT_FOR_EACH(walk, thread_index, kTeam, group) {
      const Float32 x = value_at(group, walk.row, walk.column);
      low = x < low ? x : low;
      high = x > high ? x : high;
      nan = nan || rules::is_nan(x);
    }
    shared.low[thread_index] = low.bits;
    shared.high[thread_index] = high.bits;
    shared.nan[thread_index] = nan ? 1u : 0u;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  rules::Range r = {bits_float(shared.low[0]), bits_float(shared.high[0]), 0.0f, false};
  for (int j = 0; j < kTeam; ++j) {
    const Float32 low = bits_float(shared.low[j]), high = bits_float(shared.high[j]);
    r.low = low < r.low ? low : r.low;
    r.high = high > r.high ? high : r.high;
    r.has_nan = r.has_nan || shared.nan[j] != 0u;
  }
  r.magnitude = -r.low > r.high ? -r.low : r.high;
  return r;
}

// ---- what a threadgroup does -------------------------------------------------------------------------------------------

struct Task {
  Group group;
  Format format;
  rules::CodeGrid grid;
  rules::Range range;
  int thread_index, threads;
};

inline Task task_of(thread const Quantize& p, uint3 at, uint thread_index,
                    device const uchar* weight, device const uint* importance,
                    device const uint* super_scale) {
  const bool blocks = (p.kinds & metal_params::kOneScale) != 0;
  const int n = int(at.y + p.first) * (blocks ? 128 : 1), k = int(at.x) * p.group_size;
  Task task;
  task.group.weight = weight;
  task.group.importance = importance;
  task.group.weighted = (p.kinds & metal_params::kHasImportance) != 0;
  if (task.group.weighted) task.group.importance += k;
  task.group.first = long(n) * long(p.stride) + long(k);
  task.group.stride = p.stride;
  task.group.rows = blocks ? min(128, p.N - n) : 1;
  task.group.width = min(p.group_size, p.K - k);
  task.group.type = x_type_of(p.kinds);
  const bool two_levels = (p.kinds & metal_params::kHasSuper) != 0;
  task.grid.scales.dtype = scale_dtype_of(p.kinds);
  task.grid.scales.unit = two_levels ? bits_float(super_scale[0]) : Float32(1.0f);
  task.grid.bits = bits_of(format_of(p.kinds));
  task.grid.max = bits_float(p.code_max);
  task.format = format_of(p.kinds);
  task.grid.mirror = rules::mirror_of(task.format);
  task.grid.has_zero = rules::has_zero(task.format);
  task.thread_index = int(thread_index);
  task.threads = p.threads;
  return task;
}

// Codes are computed and packed by eights, which are whole bytes.
template <class Encoder>
inline void store_codes(thread const Task& task, thread const Encoder& e, int row_bytes,
                        device uchar* to) {
  const Group group = task.group;
  const int eights = (group.width + 7) / 8, bits = task.grid.bits;
  for (int i = task.thread_index; inside(i, eights * group.rows); i += task.threads) {
    const int row = i / eights, first = i % eights * 8;
    const int count = min(8, group.width - first);
    ulong codes = 0;
    for (int j = 0; j < count; ++j)
      codes |= ulong(e.code(value_at(group, row, first + j))) << (j * bits);
    device uchar* bytes = to + long(row) * long(row_bytes) + long(first / 8 * bits);
    for (int b = 0; b < (count * bits + 7) / 8; ++b) bytes[b] = uchar(codes >> (8 * b));
  }
}

template <class Encoder>
inline void store_group(thread const Task& task, thread const Encoder& e, thread const Quantize& p,
                        uint3 at, device uchar* packed, device uchar* scales, device uchar* zeros) {
  constexpr ZeroKind kKind = ZeroKind(Encoder::kZeros);
  const bool blocks = (p.kinds & metal_params::kOneScale) != 0;
  const long row = long(at.y + p.first), n = row * (blocks ? 128l : 1l);
  const long k = long(at.x) * long(p.group_size);
  store_codes(task, e, p.row_bytes, packed + n * long(p.row_bytes) + k / 8l * long(task.grid.bits));
  if (task.thread_index != 0) return;
  const ScaleDtype dtype = task.grid.scales.dtype;
  const long index = row * long(p.groups) + long(at.x), bytes = rules::stored_bytes(dtype);
  rules::store_scale(e.p.scale, task.grid.scales, scales + index * bytes);
  rules::store_zero<kKind>(e.p, dtype, zeros + index * (kKind == ZeroKind::kInt ? 1l : bytes));
}

// Round-to-nearest.
template <class Encoder>
inline void start_nearest(thread const Task& task, thread Encoder& e) {
  constexpr ZeroKind kKind = ZeroKind(Encoder::kZeros);
  e.p = rules::affine_of<kKind>(task.grid, task.range, 1.0f);
  if (task.range.has_nan) e.p = rules::with_nan<kKind>(e.p);
}

// ---- encoders ----------------------------------------------------------------------------------------------------------

template <ZeroKind kKind>
struct Integers {
  typedef rules::IntEncoder<kKind> Exact;
  static inline Exact exact(thread const Task& task) {
    return {{}, Float32((1 << task.grid.bits) - 1)};
  }
};
template <int kExponentBits, int kMantissaBits>
struct Floats {
  typedef rules::FloatEncoder<rules::SmallFloat<kExponentBits, kMantissaBits>> Exact;
  static inline Exact exact(thread const Task& task) { return {{}, task.grid.max}; }
};
struct Book {
  typedef rules::BookEncoder Exact;
  static inline Exact exact(thread const Task& task) {
    if (task.format == Format::kIq4Nl) return Exact(kIq4Nl);
    if (task.format == Format::kBnbFp4) return Exact(kBnbFp4);
    return Exact(kNf4);
  }
};

// group.x: groups of k; group.y: rows, or blocks of 128, from p.first on.
template <class Source>
[[kernel]] void quantize(LOWBIT_PARAMS_ARGUMENTS, device const uchar* weight [[buffer(5)]],
                         device const uint* importance [[buffer(6)]],
                         device const uint* super_scale [[buffer(7)]],
                         device uchar* packed [[buffer(8)]], device uchar* scales [[buffer(9)]],
                         device uchar* zeros [[buffer(10)]], LOWBIT_POSITION) {
  LOWBIT_SHARED(RangeLanes, shared);
  const Quantize p = LOWBIT_PARAMS(Quantize);
  Task task = task_of(p, group, thread_index, weight, importance, super_scale);
  task.range = range_of(task.group, task.thread_index, shared);
  typename Source::Exact e = Source::exact(task);
  start_nearest(task, e);
  store_group(task, e, p, group, packed, scales, zeros);
}

}  // namespace lowbit
