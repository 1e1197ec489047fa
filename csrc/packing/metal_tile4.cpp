#include "packing/metal_tile4.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "packing/tables.h"

namespace lowbit {
namespace {

// Of the pairs of a strip's row.
auto place_of(int row) {
  return [row](int bits, int64_t k) {
    PairPlace place = chunk_place(row, static_cast<int>(k % kChunkK), bits);
    place.word += static_cast<int>(k / kChunkK) * bits;
    return place;
  };
}

StripRows rows_of(const MetalTile4& t, int64_t strip) {
  const int64_t first = strip * kMetalRows;
  return {first, static_cast<int>(std::min<int64_t>(kMetalRows, t.N - first))};
}

int64_t entry_place(const MetalTile4& t, int i, int64_t j, int n) {
  const int bytes = t.shape.tables[i].bytes == 0 ? 1 : t.shape.tables[i].bytes;
  const int rows = i == kScaleTable ? t.scale_rows : kMetalRows;
  return t.table_offset[i] + (j * rows + n) * bytes;
}

void lay_tables(MetalTile4& t) {
  int64_t end = t.planes.bytes;
  for (int i = 0; i < kTableCount; ++i) {
    const GroupTable& table = t.shape.tables[i];
    if (i >= kSuperTable) end = round_up(end, 16);  // a row of four is one load
    t.table_offset[i] =
        i == kZeroTable && t.shape.zeros_in_scales() ? t.table_offset[kScaleTable] : end;
    end += table.fine_count * (i == kScaleTable ? t.scale_rows : kMetalRows) * table.bytes;
  }
  t.scales_offset = t.table_offset[kScaleTable];
  t.zeros_offset = t.table_offset[kZeroTable];
  t.strip_bytes = round_up(end, 64);
}

}  // namespace

MetalTile4 metal_tile4(int64_t N, int64_t K, const Desc& desc) {
  const CanonicalShape s = canonical_shape(N, K, desc);
  MetalTile4 t{};
  t.shape = s;
  t.N = N;
  t.K = K;
  t.bits = s.bits;
  t.chunks = div_up(K, kChunkK);
  t.strips = div_up(N, kMetalRows);
  t.planes = lay_pair_planes(t.bits, [&t](int bits) { return round_up(t.chunks * 4 * bits, 16); });
  t.group_size = s.group_size;
  t.groups = s.groups;
  t.scale_rows = desc.scaling == Scaling::kBlock128 ? 1 : kMetalRows;
  t.scale_bytes = s.scale_bytes;
  t.zero_bytes = s.zero_bytes;
  lay_tables(t);
  t.perm_offset = t.strips * t.strip_bytes;
  t.total_bytes = t.perm_offset + (s.has_perm ? 4 * K : 0);
  return t;
}

void pack_strip4(const MetalTile4& t, const CanonicalConst& from, int64_t strip, uint8_t* to) {
  std::memset(to, 0, static_cast<size_t>(t.strip_bytes));
  const int64_t row_bytes = packed_row_bytes(t.K, t.bits);
  std::vector<uint8_t> codes(static_cast<size_t>(t.chunks * kChunkK));
  for (int row = 0; row < rows_of(t, strip).count; ++row) {
    unpack_row(from.packed + (strip * kMetalRows + row) * row_bytes, t.K, t.bits, codes.data());
    write_pairs(t.planes, codes.data(), t.chunks * kChunkK, to, place_of(row));
  }
  std::vector<uint8_t> scratch(static_cast<size_t>(table_scratch_bytes(t.shape)));
  pack_tables(t.shape, from, rows_of(t, strip), to, scratch.data(),
              [&t](int i, int64_t j, int n) { return entry_place(t, i, j, n); });
}

void unpack_strip4(const MetalTile4& t, const uint8_t* from, int64_t strip,
                   const CanonicalMutable& to) {
  const int64_t row_bytes = packed_row_bytes(t.K, t.bits);
  std::vector<uint8_t> codes(static_cast<size_t>(t.chunks * kChunkK));
  for (int row = 0; row < rows_of(t, strip).count; ++row) {
    read_pairs(t.planes, from, t.chunks * kChunkK, codes.data(), place_of(row));
    pack_row(codes.data(), t.K, t.bits, to.packed + (strip * kMetalRows + row) * row_bytes);
  }
  std::vector<uint8_t> scratch(static_cast<size_t>(table_scratch_bytes(t.shape)));
  unpack_tables(t.shape, from, rows_of(t, strip), to, scratch.data(),
                [&t](int i, int64_t j, int n) { return entry_place(t, i, j, n); });
}

}  // namespace lowbit
