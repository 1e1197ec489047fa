#include "packing/cpu_tile16.h"

#include <algorithm>
#include <cstring>

#include "packing/tables.h"

namespace lowbit {
namespace {

// Vector kernels walk halves of blocks, which no group may straddle. Where they do not run, a block is as short as the
// group asks for.
int block_k(const CanonicalShape& shape, const Desc& desc) {
  const bool short_groups = desc.group_size != -1 && shape.group_size % 16 != 0;
  return short_groups && shape.group_size % 8 == 0 ? 8 : 32;
}

// Short blocks leave part of their bytes unused rather than share them.
int block_vectors(int bits, int kb) {
  const int quads = kb / 4, whole = whole_quads(bits);
  return std::min(bits, static_cast<int>(div_up(quads, whole)));
}

void lay_tables(CpuTile16& t) {
  int64_t end = t.blocks * t.block_bytes;
  for (int i = 0; i < kTableCount; ++i) {
    const GroupTable& table = t.shape.tables[i];
    if (i == kZeroTable && t.shape.zeros_in_scales()) {
      t.table_offset[i] = t.table_offset[kScaleTable];
      continue;
    }
    const int lanes = i == kScaleTable ? t.scales_per_group : kTileRows;
    t.table_offset[i] = end;
    end = round_up(end + table.fine_count * lanes * table.bytes, 16);
  }
  t.scales_offset = t.table_offset[kScaleTable];
  t.zeros_offset = t.table_offset[kZeroTable];
  t.strip_bytes = round_up(end, kVectorBytes);
}

int64_t entry_place(const CpuTile16& t, int i, int64_t j, int n) {
  const int bytes = t.shape.tables[i].bytes == 0 ? 1 : t.shape.tables[i].bytes;
  const int lanes = i == kScaleTable ? t.scales_per_group : kTileRows;
  return t.table_offset[i] + (j * lanes + n) * bytes;
}

StripRows rows_of(const CpuTile16& t, int64_t strip) {
  const int64_t first = strip * kTileRows;
  return {first, static_cast<int>(std::min<int64_t>(kTileRows, t.shape.N - first))};
}

}  // namespace

CpuTile16 cpu_tile16(int64_t N, int64_t K, const Desc& desc) {
  CpuTile16 t{};
  t.shape = canonical_shape(N, K, desc);
  t.kb = block_k(t.shape, desc);
  t.block_bytes = block_vectors(t.shape.bits, t.kb) * kVectorBytes;
  t.blocks = div_up(K, t.kb);
  t.K_padded = t.blocks * t.kb;
  t.strips = div_up(N, kTileRows);
  t.scales_per_group = desc.scaling == Scaling::kBlock128 ? 1 : kTileRows;
  lay_tables(t);
  t.perm_offset = t.strips * t.strip_bytes;
  t.total_bytes = t.perm_offset + (t.shape.has_perm ? 4 * K : 0);
  return t;
}

int64_t pack_scratch_bytes(const CpuTile16& t) {
  return std::max(t.K_padded * kTileRows, table_scratch_bytes(t.shape));
}

void pack_strip(const CpuTile16& t, const CanonicalConst& from, int64_t strip, uint8_t* to,
                uint8_t* scratch) {
  const CanonicalShape& s = t.shape;
  std::memset(to, 0, static_cast<size_t>(t.strip_bytes));
  std::memset(scratch, 0, static_cast<size_t>(t.K_padded * kTileRows));
  const int rows = rows_of(t, strip).count;
  for (int n = 0; n < rows; ++n) {
    unpack_row(from.packed + (strip * kTileRows + n) * s.row_bytes, s.K, s.bits,
               scratch + n * t.K_padded);
  }
  for (int64_t block = 0; block < t.blocks; ++block) {
    for (int quad = 0; quad < t.kb / 4; ++quad) {
      const uint8_t* codes = scratch + block * t.kb + quad * 4;
      for (const CodePiece& piece : code_pieces(s.bits, quad).piece) {
        const unsigned mask = (1u << piece.bits) - 1u;
        uint8_t* vector = to + block * t.block_bytes + piece.vector * kVectorBytes;
        for (int n = 0; n < rows && piece.bits > 0; ++n) {
          for (int j = 0; j < 4; ++j) {
            const unsigned part = (codes[n * t.K_padded + j] >> piece.position) & mask;
            vector[4 * n + j] = static_cast<uint8_t>(vector[4 * n + j] | part << piece.shift);
          }
        }
      }
    }
  }
  pack_tables(s, from, rows_of(t, strip), to, scratch,
              [&t](int i, int64_t j, int n) { return entry_place(t, i, j, n); });
}

void unpack_strip(const CpuTile16& t, const uint8_t* from, int64_t strip,
                  const CanonicalMutable& to, uint8_t* scratch) {
  const CanonicalShape& s = t.shape;
  const int rows = rows_of(t, strip).count;
  for (int n = 0; n < rows; ++n) {
    for (int64_t k = 0; k < s.K; ++k) scratch[k] = static_cast<uint8_t>(tile16_code(t, from, n, k));
    pack_row(scratch, s.K, s.bits, to.packed + (strip * kTileRows + n) * s.row_bytes);
  }
  unpack_tables(s, from, rows_of(t, strip), to, scratch,
                [&t](int i, int64_t j, int n) { return entry_place(t, i, j, n); });
}

}  // namespace lowbit
