// Shapes of the canonical tensors: what checkpoints and state_dict hold.
#pragma once

#include <cstdint>

#include "common/desc.h"
#include "formats/format_table.h"
#include "formats/scale_table.h"
#include "packing/bitstream.h"

namespace lowbit {

// Which entries of a canonical tensor belong to the groups of one row of W.
struct Entries {
  int64_t first, count;
};

// One of the tensors beside the codes, seen from W: group g of row n is described by its entry
// entries(n).first + ((g + phase(n)) >> shift).
//
// Kernel layouts hold a row of entries for each row of W, and in that order g >> fine_shift describes group g. Where entries
// run on across rows, rows begin in the midst of them: fine entries are then so short that one never does.
struct GroupTable {
  enum class Rows {
    kOwn,     // `count` entries for every row
    kBlock,   // `count` entries for every 128 rows
    kShared,  // one entry for all
    kFlat     // entries run on across rows: one for every 2^shift groups of the whole of W
  };
  Rows rows;
  int bits;   // of an entry in the canonical tensor; 0: there is no such tensor
  int bytes;  // of an entry in a kernel layout; 0: none, or in the high half of the scale's byte
  int64_t count;       // entries that a row uses, at most
  int64_t total;       // entries of the tensor
  int64_t N, groups;   // groups: of one row of W
  int shift;           // large where one entry serves all groups of a row
  int fine_shift;      // the same in a kernel layout
  int64_t fine_count;  // and the entries that a row has there

  bool present() const { return bits > 0; }
  int64_t phase(int64_t n) const {
    return fine_shift == shift ? 0 : n * groups & ((int64_t{1} << shift) - 1);
  }
  // Which of the row's entries its fine entry j repeats.
  int64_t entry_of(int64_t n, int64_t j) const { return ((j << fine_shift) + phase(n)) >> shift; }
  Entries entries(int64_t n) const;
  // Whether row n is the first one to use an entry: who writes it where several do.
  bool owns(int64_t n, int64_t entry) const;
  // The shape of the canonical tensor.
  LOWBIT_API int64_t tensor_rows() const;  // 0: one dimension
  int64_t tensor_columns() const {
    return tensor_rows() == 0 ? total : (count * bits + 7) / 8 / unit();
  }
  int unit() const { return bits > 8 ? bits / 8 : 1; }  // bytes of an element of the tensor
};

enum : int { kScaleTable, kZeroTable, kSuperTable, kSuperZeroTable, kTableCount };

struct CanonicalShape {
  int64_t N, K;
  int bits;
  int64_t
      group_size;  // in elements of K, never -1; where blocks run across rows: what lies within both
  int64_t groups;     // G = ceil(K / group_size)
  int64_t row_bytes;  // packed[N, row_bytes]
  int scale_bytes;    // per scale in a kernel layout
  int zero_bytes;  // per zero or offset; 0 when there are none, or where they share the scales' bytes
  bool has_perm;
  GroupTable tables[kTableCount];

  const GroupTable& scales() const { return tables[kScaleTable]; }
  const GroupTable& zeros() const { return tables[kZeroTable]; }
  // Offsets of 4 bits stand in the high halves of the bytes of their scales.
  bool zeros_in_scales() const { return zeros().present() && zeros().bytes == 0; }
};

// Throws Error when N, K and the group size do not fit together.
LOWBIT_API CanonicalShape canonical_shape(int64_t N, int64_t K, const Desc& desc);

// Raw pointers to canonical tensors of such a shape; absent ones are null. tables: in the order of CanonicalShape's.
struct CanonicalConst {
  const uint8_t* packed;
  const uint8_t* tables[kTableCount];
  const int32_t* perm;
};
struct CanonicalMutable {
  uint8_t* packed;
  uint8_t* tables[kTableCount];
  int32_t* perm;
};

// Bytes that the entries of a row take, of any of the tables.
LOWBIT_API int64_t table_scratch_bytes(const CanonicalShape& shape);

// The entries that row n uses, `bytes` (or, of 4 bits, one byte) each, into `to`; and back, those that the row owns.
void read_entries(const GroupTable& table, const uint8_t* canonical, int64_t n, uint8_t* to);
void write_entries(const GroupTable& table, const uint8_t* from, int64_t n, uint8_t* canonical);

// Scales, and zeros or offsets, of row n for each of its groups, as the formulas use them: two fp32 numbers per group.
// `scratch` holds the entries of one table.
LOWBIT_API void row_scales(const CanonicalShape& shape, const Desc& desc,
                           const CanonicalConst& from, int64_t n, float* scales, float* zeros,
                           uint8_t* scratch);

}  // namespace lowbit
