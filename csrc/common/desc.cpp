#include "common/desc.h"

#include "formats/format_table.h"

namespace lowbit {
namespace {

constexpr int64_t kMaxGroupSize = (int64_t{1} << 24) - 1;

// Combinations that no formula gives a meaning to.
void validate(const Desc& d) {
  const FormatInfo& info = format_info(d.format);  // throws on an unknown format
  const int zero_kind = static_cast<int>(d.zero_kind);
  LOWBIT_CHECK(zero_kind >= 0 && zero_kind <= 3, "zero_kind=", zero_kind,
               " is not one of 0..3 (none, int, float, offset)");
  LOWBIT_CHECK(info.is_integer || d.zero_kind == ZeroKind::kNone, "format ", info.name,
               " is a code book and has no zeros, got zero_kind=", name_of(d.zero_kind));
  const int dtype = static_cast<int>(d.scale_dtype);
  LOWBIT_CHECK(dtype >= 0 && dtype <= 4, "scale_dtype=", dtype, " is not one of 0..4");
  LOWBIT_CHECK(dtype <= 2, "scale_dtype=", name_of(d.scale_dtype),
               " is reserved: no kernel takes it yet (use float32, float16 or bfloat16)");
  const int scaling = static_cast<int>(d.scaling);
  LOWBIT_CHECK(scaling >= 0 && scaling <= 3, "scaling=", scaling, " is not one of 0..3");
  LOWBIT_CHECK(scaling <= 1, "scaling=", name_of(d.scaling),
               " is reserved: no kernel takes it yet");
  const int layout = static_cast<int>(d.layout);
  LOWBIT_CHECK(layout >= 0 && layout <= 3, "layout=", layout,
               " is not one of 0 (canonical), 1 (cpu_tile16), 2 (cuda_tile64), 3 (metal_tile4)");
  LOWBIT_CHECK(d.group_size == -1 || (d.group_size >= 8 && d.group_size % 8 == 0),
               "group_size=", d.group_size, " is neither -1 nor a positive multiple of 8");
  LOWBIT_CHECK(d.group_size <= kMaxGroupSize, "group_size=", d.group_size, " exceeds ",
               kMaxGroupSize);
  if (d.scaling == Scaling::kBlock128) {
    LOWBIT_CHECK(info.bits == 8 && !info.is_integer,
                 "128x128 block scaling takes fp8 formats, got ", info.name);
    LOWBIT_CHECK(d.group_size == 128, "128x128 block scaling needs group_size=128, got ",
                 d.group_size);
  }
}

}  // namespace

const char* name_of(ZeroKind kind) {
  static const char* const names[] = {"none", "int", "float", "offset"};
  return names[static_cast<int>(kind)];
}

const char* name_of(ScaleDtype dtype) {
  static const char* const names[] = {"float32", "float16", "bfloat16", "e8m0", "e4m3"};
  return names[static_cast<int>(dtype)];
}

const char* name_of(Scaling scaling) {
  static const char* const names[] = {"group", "block128", "two_level", "flat"};
  return names[static_cast<int>(scaling)];
}

const char* name_of(Layout layout) {
  static const char* const names[] = {"canonical", "cpu_tile16", "cuda_tile64", "metal_tile4"};
  return names[static_cast<int>(layout)];
}

int64_t encode_desc(const Desc& d) {
  validate(d);
  const int64_t group = d.group_size == -1 ? 0 : d.group_size;
  return static_cast<int64_t>(d.format) | static_cast<int64_t>(d.zero_kind) << 8 |
         static_cast<int64_t>(d.scale_dtype) << 12 | static_cast<int64_t>(d.scaling) << 16 |
         static_cast<int64_t>(d.has_perm) << 20 | static_cast<int64_t>(d.layout) << 24 |
         group << 32;
}

Desc decode_desc(int64_t bits) {
  LOWBIT_CHECK(bits >= 0 && (bits >> 56) == 0 && ((bits >> 21) & 7) == 0, "desc=", bits,
               " has bits set that mean nothing: build it with Scheme.desc() or _C.make_desc()");
  Desc d;
  d.format = static_cast<Format>(bits & 0xff);
  d.zero_kind = static_cast<ZeroKind>((bits >> 8) & 0xf);
  d.scale_dtype = static_cast<ScaleDtype>((bits >> 12) & 0xf);
  d.scaling = static_cast<Scaling>((bits >> 16) & 0xf);
  d.has_perm = ((bits >> 20) & 1) != 0;
  d.layout = static_cast<Layout>((bits >> 24) & 0xff);
  const int64_t group = (bits >> 32) & kMaxGroupSize;
  d.group_size = group == 0 ? -1 : group;
  validate(d);
  return d;
}

std::string to_string(const Desc& d) {
  return concat(format_info(d.format).name, " group_size=", d.group_size,
                " zeros=", name_of(d.zero_kind), " scales=", name_of(d.scale_dtype),
                " scaling=", name_of(d.scaling), d.has_perm ? " perm" : "",
                " layout=", name_of(d.layout));
}

}  // namespace lowbit
