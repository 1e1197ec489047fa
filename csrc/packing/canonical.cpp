#include "packing/canonical.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "common/check.h"
#include "common/half.h"

namespace lowbit {
namespace {

constexpr int kOneForAll = 30;  // a shift beyond any number of groups

int log2_of(int64_t power) {
  int log = 0;
  while (int64_t{1} << log < power) ++log;
  return log;
}

GroupTable own_table(const CanonicalShape& s, int bits, int64_t every) {
  const int shift = every == -1 ? kOneForAll : log2_of(every);
  const int64_t count = every == -1 ? 1 : div_up(s.groups, every);
  const int bytes = (bits + 7) / 8;
  if (every == -1)
    return {GroupTable::Rows::kShared, bits, bytes, 1, 1, s.N, s.groups, shift, shift, 1};
  return {
      GroupTable::Rows::kOwn, bits, bytes, count, s.N * count, s.N, s.groups, shift, shift, count};
}

// Of scales, whose groups are what K and a block have in common: where a block is several groups, a row is an odd number of
// them, and its fine entries are single groups.
GroupTable flat_table(const CanonicalShape& s, int bits, int64_t every) {
  const int shift = log2_of(every);
  int fine_shift = 0;
  while (fine_shift < shift && (s.groups >> fine_shift) % 2 == 0) ++fine_shift;
  // A row that starts in the middle of an entry ends in one more.
  const int64_t count =
      fine_shift < shift ? (s.groups - 1 + every - 1) / every + 1 : s.groups / every;
  const int64_t total = div_up(s.N * s.groups, every);
  return {GroupTable::Rows::kFlat, bits, bits / 8, count, total, s.N, s.groups, shift, fine_shift,
          s.groups >> fine_shift};
}

GroupTable scale_table_of(const CanonicalShape& s, const Desc& d) {
  const int bits = scale_info(d.scale_dtype).bits;
  if (d.scaling == Scaling::kFlat) return flat_table(s, bits, d.group_size / s.group_size);
  GroupTable t = own_table(s, bits, 1);
  if (d.scaling == Scaling::kBlock128) {
    t.rows = GroupTable::Rows::kBlock;
    t.total = div_up(s.N, 128) * s.groups;
  }
  return t;
}

void lay_tables(CanonicalShape& s, const Desc& d) {
  s.tables[kScaleTable] = scale_table_of(s, d);
  const int scale_bits = s.scales().bits;
  if (d.zero_kind != ZeroKind::kNone) {
    const int bits = d.zero_kind == ZeroKind::kInt ? 8 : scale_bits;
    s.tables[kZeroTable] = own_table(s, bits, 1);
    if (bits == 4) s.tables[kZeroTable].bytes = 0;
  }
  if (!d.two_levels()) return;
  const int bits = scale_info(d.super_dtype).bits;
  GroupTable& supers = s.tables[kSuperTable];
  if (d.scaling == Scaling::kFlat && d.super_groups != -1) {
    supers = flat_table(s, bits, d.super_groups * (d.group_size / s.group_size));
  } else {
    supers = own_table(s, bits, d.super_groups);
  }
  if (d.scale_dtype == ScaleDtype::kDynamic8) {
    s.tables[kSuperZeroTable] = own_table(s, bits, -1);  // what is added to every scale
  } else if (d.zero_kind == ZeroKind::kOffset) {
    s.tables[kSuperZeroTable] = supers;
  }
}

}  // namespace

Entries GroupTable::entries(int64_t n) const {
  switch (rows) {
    case Rows::kOwn:
      return {n * count, count};
    case Rows::kBlock:
      return {n / 128 * count, count};
    case Rows::kShared:
      return {0, 1};
    default: {
      const int64_t first = n * groups >> shift;
      return {first, (((n + 1) * groups - 1) >> shift) - first + 1};
    }
  }
}

bool GroupTable::owns(int64_t n, int64_t entry) const {
  if (n == 0) return true;
  const Entries before = entries(n - 1);
  return entry >= before.first + before.count;
}

int64_t GroupTable::tensor_rows() const {
  if (rows == Rows::kOwn) return N;
  return rows == Rows::kBlock ? div_up(N, 128) : 0;
}

CanonicalShape canonical_shape(int64_t N, int64_t K, const Desc& desc) {
  LOWBIT_CHECK(N >= 1 && K >= 1, "a weight needs N >= 1 and K >= 1, got N=", N, " K=", K);
  // Bounds that keep every byte count below 2^62, so that no later product can overflow.
  LOWBIT_CHECK(N <= (int64_t{1} << 28) && K <= (int64_t{1} << 28), "N=", N, " K=", K,
               " exceed the supported 2^28");
  const FormatInfo& info = format_info(desc.format);
  const bool within_row = desc.scaling == Scaling::kGroup || desc.scaling == Scaling::kTwoLevel;
  LOWBIT_CHECK(!within_row || desc.group_size <= round_up(K, 8), "group_size=", desc.group_size,
               " exceeds K=", K, "; use -1 for one group over all of K");
  CanonicalShape s{};
  s.N = N;
  s.K = K;
  s.bits = info.bits;
  s.group_size = desc.group_size == -1            ? K
                 : desc.scaling == Scaling::kFlat ? std::gcd(K, desc.group_size)
                                                  : desc.group_size;
  s.groups = div_up(K, s.group_size);
  s.row_bytes = packed_row_bytes(K, info.bits);
  s.has_perm = desc.has_perm;
  lay_tables(s, desc);
  s.scale_bytes = s.scales().bytes;
  s.zero_bytes = s.zeros().bytes;
  return s;
}

int64_t table_scratch_bytes(const CanonicalShape& shape) {
  int64_t bytes = 0;
  for (const GroupTable& t : shape.tables) bytes = std::max(bytes, t.count * 4);
  return bytes;
}

void read_entries(const GroupTable& t, const uint8_t* canonical, int64_t n, uint8_t* to) {
  const Entries e = t.entries(n);
  if (t.bits < 8) {
    unpack_row(canonical + n * packed_row_bytes(t.count, t.bits), t.count, t.bits, to);
  } else {
    std::memcpy(to, canonical + e.first * t.bytes, static_cast<size_t>(e.count * t.bytes));
  }
}

void write_entries(const GroupTable& t, const uint8_t* from, int64_t n, uint8_t* canonical) {
  const Entries e = t.entries(n);
  if (t.bits < 8) {
    pack_row(from, t.count, t.bits, canonical + n * packed_row_bytes(t.count, t.bits));
    return;
  }
  const int64_t begin = t.owns(n, e.first) ? 0 : t.owns(n, e.first + e.count - 1) ? 1 : e.count;
  std::memcpy(canonical + (e.first + begin) * t.bytes, from + begin * t.bytes,
              static_cast<size_t>((e.count - begin) * t.bytes));
}

namespace {

// body(decode): decode(stored) is the value of an entry. One choice for a whole row.
template <class Body>
void with_values(ScaleDtype dtype, const Body& body) {
  if (const float* code = scale_info(dtype).code) {
    body([code](const uint8_t* stored) { return code[*stored]; });
  } else if (dtype == ScaleDtype::kFloat32) {
    body([](const uint8_t* stored) {
      float value;
      std::memcpy(&value, stored, 4);
      return value;
    });
  } else {
    const bool half = dtype == ScaleDtype::kFloat16;
    body([half](const uint8_t* stored) {
      uint16_t bits;
      std::memcpy(&bits, stored, 2);
      return half ? to_float(Half{bits}) : to_float(BFloat16{bits});
    });
  }
}

// values[g] = combine(values[g], the entry for group g), for every group of row n.
template <class Combine>
void combine_values(const GroupTable& t, ScaleDtype dtype, const uint8_t* canonical, int64_t n,
                    float* values, uint8_t* scratch, const Combine& combine) {
  read_entries(t, canonical, n, scratch);
  const int64_t phase = t.phase(n);
  const int bytes = t.bytes == 0 ? 1 : t.bytes;
  with_values(dtype, [&](const auto& decode) {
    for (int64_t g = 0; g < t.groups; ++g)
      values[g] = combine(values[g], decode(scratch + ((g + phase) >> t.shift) * bytes));
  });
}

}  // namespace

void row_scales(const CanonicalShape& s, const Desc& d, const CanonicalConst& from, int64_t n,
                float* scales, float* zeros, uint8_t* scratch) {
  const auto multiply = [](float a, float b) { return a * b; };
  const auto add = [](float a, float b) { return a + b; };
  const auto take = [](float, float b) { return b; };
  combine_values(s.scales(), d.scale_dtype, from.tables[kScaleTable], n, scales, scratch, take);
  if (d.two_levels())
    combine_values(s.tables[kSuperTable], d.super_dtype, from.tables[kSuperTable], n, scales,
                   scratch, multiply);
  if (d.scale_dtype == ScaleDtype::kDynamic8)
    combine_values(s.tables[kSuperZeroTable], d.super_dtype, from.tables[kSuperZeroTable], n,
                   scales, scratch, add);
  if (d.zero_kind == ZeroKind::kInt) {
    const uint8_t* stored = from.tables[kZeroTable] + n * s.groups;
    std::copy_n(stored, s.groups, zeros);
  } else if (d.zero_kind != ZeroKind::kNone) {
    combine_values(s.zeros(), d.scale_dtype, from.tables[kZeroTable], n, zeros, scratch, take);
    if (s.tables[kSuperZeroTable].present())
      combine_values(s.tables[kSuperZeroTable], d.super_dtype, from.tables[kSuperZeroTable], n,
                     zeros, scratch, multiply);
  } else if (format_info(d.format).is_integer) {
    std::fill_n(zeros, s.groups, static_cast<float>(1 << (s.bits - 1)));
  } else {
    std::fill_n(zeros, s.groups, 0.0f);
  }
}

}  // namespace lowbit
