// The tensors beside the codes (GroupTable, packing/canonical.h): entries of groups, into strips of the kernel layout
// (packing/tables.h) and back. Bits are moved as they are.
#pragma once

#include "metal/shaders/arguments.h"
#include "metal/shaders/numbers.h"
#include "metal/shaders/scales.h"

namespace lowbit {

using metal_params::Table;

constant constexpr int kCanonicalThreads = 256;

// ---- entries of canonical tensors --------------------------------------------------------------------------------------

// Which entry describes group g of row n.
inline long entry_of(int rows, int shift, long n, long g, long groups) {
  switch (rows) {
    case metal_params::kOwnRows:
      return n * (((groups - 1) >> shift) + 1) + (g >> shift);
    case metal_params::kBlockRows:
      return n / 128 * groups + g;
    case metal_params::kSharedRows:
      return 0;
    default:
      return (n * groups + g) >> shift;
  }
}

// Code i of a row that is a bit stream.
inline uint stream_code(device const uchar* row, int i, int bits) {
  const int at = i * bits, byte = at / 8;
  uint pair = row[byte];
  if (at % 8 + bits > 8) pair |= uint(row[byte + 1]) << 8;
  return pair >> (at % 8) & ((1u << bits) - 1u);
}

// metal_params::make_table
struct TableView {
  int rows, bits, shift;
  ScaleDtype dtype;
};
inline TableView view_of(int table) {
  return {table & 3, table >> 2 & 63, table >> 8 & 31, ScaleDtype(table >> 13 & 7)};
}

// The number for group g of row n.
inline float entry_value(device const uchar* data, TableView table, long n, long g, int groups,
                         ScaleDtype dtype) {
  if (table.bits < 8) {
    const int row_bytes = (groups * table.bits + 7) / 8;  // entries of a few bits have a group each
    return scale_code_value(stream_code(data + n * long(row_bytes), int(g), table.bits), dtype);
  }
  const long entry = entry_of(table.rows, table.shift, n, g, long(groups));
  switch (dtype) {
    case ScaleDtype::kFloat32:
      return load_element(data, entry, Element::kFloat32);
    case ScaleDtype::kFloat16:
      return load_element(data, entry, Element::kFloat16);
    case ScaleDtype::kBFloat16:
      return load_element(data, entry, Element::kBFloat16);
    default:
      return scale_code_value(data[entry], dtype);
  }
}

// ---- strips ------------------------------------------------------------------------------------------------------------

// Entries of a row of a strip: each describes 2^fine_shift groups.
inline int fine_count(thread const Table& t) {
  return t.rows == metal_params::kFlatRows ? t.groups >> t.fine_shift : t.count;
}
inline long fine_entry(thread const Table& t, int n, int j) {
  const long g = t.rows == metal_params::kSharedRows ? 0l : long(j) << t.fine_shift;
  return entry_of(t.rows, t.shift, long(n), g, long(t.groups));
}
inline long strip_place(thread const Table& t, int n, int j) {
  const int rows = t.rows == metal_params::kBlockRows ? 1 : 4;
  return long(n / 4) * long(t.strip_bytes) + long(t.offset) +
         (long(j) * rows + long(n % 4 % rows)) * long(max(t.bytes, 1));
}

inline void copy_bytes(device const uchar* from, device uchar* to, int bytes) {
  for (int i = 0; i < bytes; ++i) to[i] = from[i];
}

// group.x: fine entries, 256 at a time; group.y: strips. Before: clear_ends; offsets of 4 bits come after their scales.
template <int kOnly>
[[kernel]] void pack_table(LOWBIT_PARAMS_ARGUMENTS, device const uchar* from [[buffer(5)]],
                           device uchar* w [[buffer(6)]], LOWBIT_POSITION) {
  const Table t = LOWBIT_PARAMS(Table);
  const int j = int(group.x) * kCanonicalThreads + int(thread_index);
  if (!inside(j, fine_count(t))) return;
  const int row_bytes = (t.count * t.bits + 7) / 8, first = 4 * int(group.y);
  const int rows = t.rows == metal_params::kBlockRows ? 1 : 4;
  for (int n = first; inside(n, min(first + rows, t.N)); ++n) {
    device uchar* to = w + strip_place(t, n, j);
    if (t.bits >= 8) {
      copy_bytes(from + fine_entry(t, n, j) * long(t.bytes), to, t.bytes);
    } else {
      const uint code = stream_code(from + long(n) * long(row_bytes), j, t.bits);
      to[0] = t.bytes == 0 ? uchar(uint(to[0]) | code << 4) : uchar(code);
    }
  }
}

// group.x: fine entries, or eights of those that a bit stream has, 256 at a time; group.y: rows. Where several fine entries
// hold one entry, the first writes it.
template <int kOnly>
[[kernel]] void unpack_table(LOWBIT_PARAMS_ARGUMENTS, device const uchar* w [[buffer(5)]],
                             device uchar* to [[buffer(6)]], LOWBIT_POSITION) {
  const Table t = LOWBIT_PARAMS(Table);
  const int n = int(group.y), i = int(group.x) * kCanonicalThreads + int(thread_index);
  if (t.bits >= 8) {
    if (!inside(i, fine_count(t))) return;
    const long entry = fine_entry(t, n, i);
    const bool first =
        t.rows == metal_params::kBlockRows    ? n % 128 == 0
        : t.rows == metal_params::kSharedRows ? n == 0
        : t.rows == metal_params::kFlatRows
            ? entry << t.shift == long(n) * long(t.groups) + (long(i) << t.fine_shift)
            : true;
    if (first) copy_bytes(w + strip_place(t, n, i), to + entry * long(t.bytes), t.bytes);
    return;
  }
  ulong stream = 0;
  for (int j = 8 * i; j < 8 * i + 8; ++j) {
    if (!inside(j, t.count)) continue;
    const uint code = uint(w[strip_place(t, n, j)]) >> (t.bytes == 0 ? 4 : 0);
    stream |= ulong(code & ((1u << t.bits) - 1u)) << ((j - 8 * i) * t.bits);
  }
  const int row_bytes = (t.count * t.bits + 7) / 8;
  for (int b = 0; b < t.bits; ++b) {
    if (inside(i * t.bits + b, row_bytes))
      to[long(n) * long(row_bytes) + long(i * t.bits + b)] = uchar(stream >> (8 * b));
  }
}

// Zeros from byte `begin` of every strip to its end, by words. group.x: words, 256 at a time; group.y: strips.
template <int kOnly>
[[kernel]] void clear_ends(constant long& begin [[buffer(0)]],
                           constant long& strip_bytes [[buffer(1)]], device uint* w [[buffer(2)]],
                           LOWBIT_POSITION) {
  const long at = begin / 4 + long(group.x) * kCanonicalThreads + long(thread_index);
  if (inside(at, strip_bytes / 4)) w[long(group.y) * (strip_bytes / 4) + at] = 0u;
}

}  // namespace lowbit
