// Canonical tensors (packing/canonical.h): to weights, to the kernel layout (packing/metal_tile4.h), and back. Bytes are moved
// as they are; weights are computed in fp32 in the order of the formula, to the CPU's bits.
#pragma once

#include "metal/shaders/arguments.h"
#include "metal/shaders/numbers.h"
#include "metal/shaders/tables.h"

namespace lowbit {

using metal_params::Canonical;

// Eight codes of a row of the bit stream, from `eight` * 8 on; zeros past K.
inline ulong load_stream(device const uchar* row, uint eight, uint bits,
                         thread const Canonical& p) {
  ulong stream = 0;
  for (uint i = 0; i < bits; ++i) {
    if (inside(eight * bits + i, uint(p.row_bytes)))
      stream |= ulong(row[eight * bits + i]) << (8u * i);
  }
  const uint count = min(8u, uint(p.K) - 8u * eight);
  return count == 8u ? stream : stream & ((ulong(1) << (count * bits)) - 1ul);
}

// ---- dequantize --------------------------------------------------------------------------------------------------------

struct Affine {
  float scale, zero;
  bool is_offset;
};

// Super scales are above scales and offsets, and what is added to scales that are numbers of a code book.
inline Affine affine_of(long n, long g, device const uchar* scales, device const uchar* zeros,
                        device const uchar* supers, device const uchar* super_zeros,
                        thread const Canonical& p) {
  LOWBIT_EXACT
  const ScaleDtype dtype = scale_dtype_of(p.kinds);
  const TableView super_table = view_of(p.super_tables), other = view_of(p.super_tables >> 16);
  Affine a = {entry_value(scales, view_of(p.tables), n, g, p.groups, dtype), 0.0f, false};
  if (super_table.bits != 0) {
    const float above = entry_value(supers, super_table, n, g, p.groups, super_table.dtype);
    a.scale = a.scale * above;
  }
  const float beside =
      other.bits != 0 ? entry_value(super_zeros, other, n, g, p.groups, other.dtype) : 1.0f;
  if (dtype == ScaleDtype::kDynamic8) a.scale = a.scale + beside;
  switch (zero_kind_of(p.kinds)) {
    case ZeroKind::kNone:
      if (is_integer(format_of(p.kinds))) a.zero = float(1 << (bits_of(format_of(p.kinds)) - 1));
      break;
    case ZeroKind::kInt:
      a.zero = float(zeros[n * long(p.groups) + g]);
      break;
    default:
      a.zero = entry_value(zeros, view_of(p.tables >> 16), n, g, p.groups, dtype);
      if (other.bits != 0) a.zero = a.zero * beside;
      a.is_offset = zero_kind_of(p.kinds) == ZeroKind::kOffset;
  }
  return a;
}

inline float weight_of(float number, thread const Affine& a) {
  LOWBIT_EXACT
  if (a.is_offset) {
    const float scaled = number * a.scale;
    return scaled + a.zero;
  }
  const float level = number - a.zero;
  return level * a.scale;
}

// W[n, :] in T, columns in the original order. group.x: eights of k, 256 at a time; group.y: rows.
template <class T>
[[kernel]] void dequantize(LOWBIT_PARAMS_ARGUMENTS, device const uchar* packed [[buffer(5)]],
                           device const uchar* scales [[buffer(6)]],
                           device const uchar* zeros [[buffer(7)]],
                           device const uchar* supers [[buffer(8)]],
                           device const uchar* super_zeros [[buffer(9)]],
                           device const int* perm [[buffer(10)]], device T* out [[buffer(11)]],
                           LOWBIT_POSITION) {
  const Canonical p = LOWBIT_PARAMS(Canonical);
  const int n = int(group.y);
  const uint eight = group.x * uint(kCanonicalThreads) + thread_index, k = 8u * eight;
  if (!inside(k, uint(p.K))) return;
  const Format format = format_of(p.kinds);
  const uint bits = uint(bits_of(format));
  const ulong stream = load_stream(packed + long(n) * long(p.row_bytes), eight, bits, p);
  Affine affine = {0.0f, 0.0f, false};
  uint g = ~0u;  // of `affine`; a block that runs across rows may have fewer than 8 k of one
  T values[8];
  for (uint i = 0; i < 8u; ++i) {
    const uint its = min(k + i, uint(p.K) - 1u) / uint(p.group_size);
    if (its != g) affine = affine_of(long(n), long(its), scales, zeros, supers, super_zeros, p);
    g = its;
    const uint code = uint(stream >> (i * bits)) & ((1u << bits) - 1u);
    values[i] = T(weight_of(code_value(code, format), affine));
  }
  device T* row = out + long(n) * long(p.K);
  if ((p.kinds & metal_params::kVectors) != 0) {
    *(device vec<T, 4>*)(row + k) = vec<T, 4>(values[0], values[1], values[2], values[3]);
    *(device vec<T, 4>*)(row + k + 4u) = vec<T, 4>(values[4], values[5], values[6], values[7]);
    return;
  }
  const bool permuted = (p.kinds & metal_params::kHasPerm) != 0;
  for (uint i = 0; i < 8u; ++i) {
    if (inside(k + i, uint(p.K))) row[permuted ? uint(perm[k + i]) : k + i] = values[i];
  }
}

// ---- pack --------------------------------------------------------------------------------------------------------------

// One word of a chunk: row r's field of the pair i is field 4r + i of both halves.
inline uint chunk_word(thread const ulong (&streams)[4], uint bits, uint position, uint plane_bits,
                       uint word) {
  const uint fields = 16u / plane_bits, mask = (1u << plane_bits) - 1u;
  uint value = 0;
  for (uint f = 0; f < fields; ++f) {
    const uint index = word * fields + f, k = index % 4u * 2u;
    const ulong stream = streams[index / 4u] >> position;
    const uint even = uint(stream >> (k * bits)) & mask;
    const uint odd = uint(stream >> ((k + 1u) * bits)) & mask;
    value |= (even | odd << 16) << (f * plane_bits);
  }
  return value;
}

// A plane's part of a chunk. Planes end at 16 bytes: the chunks that are missing there are zeros.
inline void write_chunk(thread const ulong (&streams)[4], uint bits, uint position, uint plane_bits,
                        uint chunk, uint chunks, device uchar* plane) {
  const uint end = (chunks * 4u * plane_bits + 15u) / 16u * 16u;
  for (uint word = 0; word < plane_bits; ++word) {
    const uint offset = (chunk * plane_bits + word) * 4u;
    if (inside(offset, end)) {
      *(device uint*)(plane + offset) = chunk_word(streams, bits, position, plane_bits, word);
    }
  }
}

// group.x: chunks (and up to 3 behind the last, where load_stream finds zeros), 256 at a time; group.y: strips.
template <int kOnly>
[[kernel]] void pack_codes(LOWBIT_PARAMS_ARGUMENTS, device const uchar* packed [[buffer(5)]],
                           device uchar* w [[buffer(6)]], LOWBIT_POSITION) {
  const Canonical p = LOWBIT_PARAMS(Canonical);
  const uint chunk = group.x * uint(kCanonicalThreads) + thread_index;
  const uint chunks = (uint(p.K) + 7u) / 8u;
  const Format format = format_of(p.kinds);
  const uint bits = uint(bits_of(format));
  ulong streams[4];
  for (int row = 0; row < 4; ++row) {
    const int n = 4 * int(group.y) + row;
    streams[row] =
        inside(n, p.N) ? load_stream(packed + long(n) * long(p.row_bytes), chunk, bits, p) : 0ul;
  }
  device uchar* strip = w + long(group.y) * long(p.strip_bytes);
  const uint low = uint(low_bits(format)), high = uint(high_bits(format));
  write_chunk(streams, bits, 0u, low, chunk, chunks, strip);
  if (high > 0u) write_chunk(streams, bits, low, high, chunk, chunks, strip + p.high_plane);
}

// ---- unpack ------------------------------------------------------------------------------------------------------------

// Bits of eight codes of a row, as far as a plane has them, where the stream wants them.
inline ulong read_chunk(device const uchar* plane, uint chunk, uint row, uint bits, uint position,
                        uint plane_bits) {
  const uint fields = 16u / plane_bits, mask = (1u << plane_bits) - 1u;
  ulong stream = 0;
  for (uint k = 0; k < 8u; ++k) {
    const uint index = 4u * row + k / 2u;
    const uint word = *(device const uint*)(plane + (chunk * plane_bits + index / fields) * 4u);
    const uint code = word >> (index % fields * plane_bits + 16u * (k % 2u)) & mask;
    stream |= ulong(code) << (k * bits + position);
  }
  return stream;
}

// group.x: eights of k, 256 at a time; group.y: rows.
template <int kOnly>
[[kernel]] void unpack_codes(LOWBIT_PARAMS_ARGUMENTS, device const uchar* w [[buffer(5)]],
                             device uchar* packed [[buffer(6)]], LOWBIT_POSITION) {
  const Canonical p = LOWBIT_PARAMS(Canonical);
  const uint n = group.y, eight = group.x * uint(kCanonicalThreads) + thread_index;
  if (!inside(8u * eight, uint(p.K))) return;
  const Format format = format_of(p.kinds);
  const uint bits = uint(bits_of(format)), low = uint(low_bits(format));
  device const uchar* strip = w + long(n / 4u) * long(p.strip_bytes);
  ulong stream = read_chunk(strip, eight, n % 4u, bits, 0u, low);
  if (bits > low) {
    stream |= read_chunk(strip + p.high_plane, eight, n % 4u, bits, low, bits - low);
  }
  device uchar* row = packed + long(n) * long(p.row_bytes);
  for (uint i = 0; i < bits; ++i) {
    if (inside(eight * bits + i, uint(p.row_bytes)))
      row[eight * bits + i] = uchar(stream >> (8u * i));
  }
}

// `count` ints; where they start is counted in ints.
template <int kOnly>
[[kernel]] void copy_ints(constant long& count [[buffer(0)]],
                          constant long& from_offset [[buffer(1)]],
                          constant long& to_offset [[buffer(2)]],
                          device const int* from [[buffer(3)]], device int* to [[buffer(4)]],
                          LOWBIT_POSITION) {
  const long i = long(group.x) * kCanonicalThreads + long(thread_index);
  if (inside(i, long(count))) to[to_offset + i] = from[from_offset + i];
}

}  // namespace lowbit
