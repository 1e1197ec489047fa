// The tensors beside the codes into a strip of a kernel layout, and back: the same for every layout but for where an entry
// stands. Offsets of 4 bits (GroupTable::bytes is 0) come after the scales, whose bytes they complete.
#pragma once

#include <cstdint>
#include <cstring>

#include "packing/canonical.h"

namespace lowbit {

// A strip's rows of W.
struct StripRows {
  int64_t first;
  int count;
};

// place(table, j, n): bytes from the start of a strip to fine entry j (canonical.h) of its row n.
template <class Place>
void pack_tables(const CanonicalShape& s, const CanonicalConst& from, const StripRows& rows,
                 uint8_t* to, uint8_t* scratch, const Place& place) {
  for (int i = 0; i < kTableCount; ++i) {
    const GroupTable& table = s.tables[i];
    const bool shared = table.rows == GroupTable::Rows::kBlock;  // one row of entries for the strip
    const int64_t bytes = table.bytes == 0 ? 1 : table.bytes;
    for (int n = 0; table.present() && n < (shared ? 1 : rows.count); ++n) {
      const int64_t row = rows.first + n;
      read_entries(table, from.tables[i], row, scratch);
      for (int64_t j = 0; j < table.fine_count; ++j) {
        uint8_t* entry = to + place(i, j, n);
        const uint8_t* value = scratch + table.entry_of(row, j) * bytes;
        if (table.bytes == 0) {
          *entry = static_cast<uint8_t>(*entry | *value << 4);
        } else {
          std::memcpy(entry, value, static_cast<size_t>(bytes));
        }
      }
    }
  }
}

template <class Place>
void unpack_tables(const CanonicalShape& s, const uint8_t* from, const StripRows& rows,
                   const CanonicalMutable& to, uint8_t* scratch, const Place& place) {
  for (int i = 0; i < kTableCount; ++i) {
    const GroupTable& table = s.tables[i];
    const bool shared = table.rows == GroupTable::Rows::kBlock;
    const int64_t bytes = table.bytes == 0 ? 1 : table.bytes;
    const int shift = table.bytes == 0 ? 4 : 0, mask = table.bits == 4 ? 15 : 255;
    for (int n = 0; table.present() && n < (shared ? 1 : rows.count); ++n) {
      const int64_t row = rows.first + n;
      for (int64_t j = 0; j < table.fine_count; ++j) {
        uint8_t* value = scratch + table.entry_of(row, j) * bytes;
        std::memcpy(value, from + place(i, j, n), static_cast<size_t>(bytes));
        if (table.bits < 8) *value = static_cast<uint8_t>(*value >> shift & mask);
      }
      write_entries(table, scratch, row, to.tables[i]);
    }
  }
}

}  // namespace lowbit
