#include "packing/cuda_tile64.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "packing/tables.h"

namespace lowbit {
namespace {

// Scales and zeros of groups; the end of what has been laid so far.
int64_t lay_scales(CudaTile64& t) {
  const bool shared = t.shape.zeros_in_scales();
  if (t.groups_per_tile > 0) {
    t.scales_offset = t.codes_bytes;
    t.zeros_offset = t.scales_offset + t.groups_per_tile * t.scale_row_bytes;
    t.tile_bytes = round_up(t.zeros_offset + t.groups_per_tile * t.zero_row_bytes, 32);
    if (shared) t.zeros_offset = t.scales_offset;
    return t.tiles * t.tile_bytes;
  }
  t.tile_bytes = t.codes_bytes;
  t.scales_offset = t.tiles * t.tile_bytes;
  const int64_t end = t.scales_offset + t.groups * t.scale_row_bytes;
  t.zeros_offset = shared ? t.scales_offset : end;
  return end + t.groups * t.zero_row_bytes;
}

void lay_supers(CudaTile64& t, int64_t end) {
  for (int i : {kSuperTable, kSuperZeroTable}) {
    const GroupTable& table = t.shape.tables[i];
    if (!table.present()) continue;
    t.table_offset[i] = round_up(end, 16);
    end = t.table_offset[i] + table.fine_count * kStripRows * table.bytes;
  }
  t.strip_bytes = round_up(end, 128);
}

// Of the pairs of a tile's row n.
auto place_of(int n) {
  return [n](int bits, int64_t k) { return code_place(n, static_cast<int>(k), bits); };
}

// Bytes from the start of a strip to entry j of row n (0..63) in a table.
int64_t entry_place(const CudaTile64& t, int i, int64_t j, int n) {
  const int bytes = t.shape.tables[i].bytes == 0 ? 1 : t.shape.tables[i].bytes;
  const int64_t place = int64_t{scale_position(n)} * bytes;
  if (i == kScaleTable) return t.scale_row(j) + (t.one_scale ? 0 : place);
  if (i == kZeroTable) return (t.shape.zeros_in_scales() ? t.scale_row(j) : t.zero_row(j)) + place;
  return t.table_offset[i] + j * kStripRows * bytes + place;
}

StripRows rows_of(const CudaTile64& t, int64_t strip) {
  const int64_t first = strip * kStripRows;
  return {first, static_cast<int>(std::min<int64_t>(kStripRows, t.N - first))};
}

}  // namespace

CudaTile64 cuda_tile64(int64_t N, int64_t K, const Desc& desc) {
  const CanonicalShape s = canonical_shape(N, K, desc);
  CudaTile64 t{};
  t.shape = s;
  t.N = N;
  t.K = K;
  t.bits = s.bits;
  t.planes = lay_pair_planes(t.bits, [](int bits) { return kStripRows * kTileK * bits / 8; });
  t.codes_bytes = static_cast<int>(t.planes.bytes);
  t.tiles = div_up(K, kTileK);
  t.strips = div_up(N, kStripRows);
  t.group_size = s.group_size;
  t.groups = s.groups;
  t.one_scale = desc.scaling == Scaling::kBlock128;
  // -1 stands in the table whatever K is, so that where scales are depends on desc alone.
  const bool in_tile = desc.group_size != -1 && kTileK % s.group_size == 0;
  t.groups_per_tile = in_tile ? static_cast<int>(kTileK / s.group_size) : 0;
  t.scale_bytes = s.scale_bytes;
  t.zero_bytes = s.zero_bytes;
  t.scale_row_bytes = t.one_scale ? 16 : kStripRows * s.scale_bytes;
  t.zero_row_bytes = kStripRows * s.zero_bytes;
  t.plain = scale_info(desc.scale_dtype).is_float();
  t.floats = t.plain ? FloatRows{desc.scale_dtype, t.scale_row_bytes, t.zero_row_bytes}
                     : float_rows(desc.scale_dtype, desc.zero_kind, t.one_scale, t.zero_row_bytes);
  t.shared_super = desc.super_groups == -1;
  lay_supers(t, lay_scales(t));
  t.perm_offset = t.strips * t.strip_bytes;
  t.total_bytes = t.perm_offset + (s.has_perm ? 4 * K : 0);
  return t;
}

void pack_strip64(const CudaTile64& t, const CanonicalConst& from, int64_t strip, uint8_t* to) {
  std::memset(to, 0, static_cast<size_t>(t.strip_bytes));
  const int64_t row_bytes = packed_row_bytes(t.K, t.bits);
  const int rows = rows_of(t, strip).count;
  for (int64_t tile = 0; tile < t.tiles; ++tile) {
    const int64_t count = std::min<int64_t>(kTileK, t.K - tile * kTileK);
    for (int n = 0; n < rows; ++n) {
      // 128 codes are whole bytes, so a tile's part of a row starts at one.
      const uint8_t* row =
          from.packed + (strip * kStripRows + n) * row_bytes + tile * (kTileK / 8) * t.bits;
      uint8_t codes[kTileK] = {};
      unpack_row(row, count, t.bits, codes);
      write_pairs(t.planes, codes, kTileK, to + tile * t.tile_bytes, place_of(n));
    }
  }
  std::vector<uint8_t> scratch(static_cast<size_t>(table_scratch_bytes(t.shape)));
  pack_tables(t.shape, from, rows_of(t, strip), to, scratch.data(),
              [&t](int i, int64_t j, int n) { return entry_place(t, i, j, n); });
}

void unpack_strip64(const CudaTile64& t, const uint8_t* from, int64_t strip,
                    const CanonicalMutable& to) {
  const int64_t row_bytes = packed_row_bytes(t.K, t.bits);
  const int rows = rows_of(t, strip).count;
  for (int64_t tile = 0; tile < t.tiles; ++tile) {
    const int64_t count = std::min<int64_t>(kTileK, t.K - tile * kTileK);
    for (int n = 0; n < rows; ++n) {
      uint8_t codes[kTileK];
      read_pairs(t.planes, from + tile * t.tile_bytes, kTileK, codes, place_of(n));
      pack_row(codes, count, t.bits,
               to.packed + (strip * kStripRows + n) * row_bytes + tile * (kTileK / 8) * t.bits);
    }
  }
  std::vector<uint8_t> scratch(static_cast<size_t>(table_scratch_bytes(t.shape)));
  unpack_tables(t.shape, from, rows_of(t, strip), to, scratch.data(),
                [&t](int i, int64_t j, int n) { return entry_place(t, i, j, n); });
}

}  // namespace lowbit
