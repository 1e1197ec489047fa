#include "common/desc.h"

#include "formats/format_table.h"
#include "formats/scale_table.h"

namespace lowbit {
namespace {

constexpr int64_t kMaxGroupSize = (int64_t{1} << 24) - 1;
constexpr int64_t kMaxSuperGroups = int64_t{1} << 13;
constexpr int64_t kEveryAll = 15;  // in the field of super_groups: -1

bool is_power_of_two(int64_t n) { return n > 0 && (n & (n - 1)) == 0; }

void validate_supers(const Desc& d) {
  const ScaleInfo& scales = scale_info(d.scale_dtype);
  LOWBIT_CHECK(d.two_levels() || !scales.needs_super, "scale_dtype=", scales.name,
               " is a code without a size of its own: it needs super scales");
  LOWBIT_CHECK(d.two_levels() == (d.scaling == Scaling::kTwoLevel) || d.scaling == Scaling::kFlat,
               "scaling=", name_of(d.scaling), " with super_groups=", d.super_groups,
               ": super scales go with two_level and flat");
  if (!d.two_levels()) {
    LOWBIT_CHECK(d.super_dtype == ScaleDtype::kFloat32, "super_dtype=", name_of(d.super_dtype),
                 " without super scales");
    return;
  }
  LOWBIT_CHECK(scales.bits <= 8 && d.scale_dtype != ScaleDtype::kE8m0, "scale_dtype=", scales.name,
               " takes no super scales");
  LOWBIT_CHECK(scale_info(d.super_dtype).is_float(), "super_dtype=", name_of(d.super_dtype),
               " is not one of float32, float16, bfloat16");
  LOWBIT_CHECK(d.super_groups == -1 || (is_power_of_two(d.super_groups) && d.super_groups > 1 &&
                                        d.super_groups <= kMaxSuperGroups),
               "super_groups=", d.super_groups, " is neither -1 nor a power of two from 2 to ",
               kMaxSuperGroups);
}

void validate_scales(const Desc& d) {
  const int dtype = static_cast<int>(d.scale_dtype), scaling = static_cast<int>(d.scaling);
  const ScaleInfo& scales = scale_info(d.scale_dtype);  // throws on an unknown dtype
  LOWBIT_CHECK(scaling >= 0 && scaling <= 3, "scaling=", scaling, " is not one of 0..3");
  validate_supers(d);
  const bool given = d.zero_kind == ZeroKind::kFloat || d.zero_kind == ZeroKind::kOffset;
  LOWBIT_CHECK(
      !given || scales.is_float() || (d.zero_kind == ZeroKind::kOffset && scales.is_integer()),
      "zero_kind=", name_of(d.zero_kind), " has zeros in the dtype of the scales, which ",
      scales.name, " (", dtype, ") cannot hold");
  if (d.scaling != Scaling::kFlat) return;
  LOWBIT_CHECK(d.zero_kind == ZeroKind::kNone && !d.has_perm,
               "scaling=flat has neither zeros nor perm, got zero_kind=", name_of(d.zero_kind),
               d.has_perm ? ", perm" : "");
  LOWBIT_CHECK(scales.bits % 8 == 0,
               "scaling=flat has scales of whole bytes, got scale_dtype=", scales.name);
  LOWBIT_CHECK(d.group_size >= 8 && is_power_of_two(d.group_size),
               "scaling=flat has group_size=", d.group_size,
               ", which is not a power of two from 8 on");
}

// Combinations that no formula gives a meaning to.
void validate(const Desc& d) {
  const FormatInfo& info = format_info(d.format);  // throws on an unknown format
  const int zero_kind = static_cast<int>(d.zero_kind);
  LOWBIT_CHECK(zero_kind >= 0 && zero_kind <= 3, "zero_kind=", zero_kind,
               " is not one of 0..3 (none, int, float, offset)");
  LOWBIT_CHECK(info.is_integer || d.zero_kind == ZeroKind::kNone, "format ", info.name,
               " is a code book and has no zeros, got zero_kind=", name_of(d.zero_kind));
  validate_scales(d);
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

const char* name_of(ScaleDtype dtype) { return scale_info(dtype).name; }

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
  int64_t every = d.super_groups == -1 ? kEveryAll : 0;
  while (every < kEveryAll && d.super_groups >> every > 0) ++every;
  return static_cast<int64_t>(d.format) | static_cast<int64_t>(d.zero_kind) << 8 |
         static_cast<int64_t>(d.scale_dtype) << 12 | static_cast<int64_t>(d.scaling) << 16 |
         static_cast<int64_t>(d.has_perm) << 20 | static_cast<int64_t>(d.super_dtype) << 21 |
         static_cast<int64_t>(d.layout) << 24 | group << 32 | every << 56;
}

Desc decode_desc(int64_t bits) {
  LOWBIT_CHECK(bits >= 0 && (bits >> 60) == 0 && ((bits >> 23) & 1) == 0, "desc=", bits,
               " has bits set that mean nothing: build it with Scheme.desc() or _C.make_desc()");
  Desc d;
  d.format = static_cast<Format>(bits & 0xff);
  d.zero_kind = static_cast<ZeroKind>((bits >> 8) & 0xf);
  d.scale_dtype = static_cast<ScaleDtype>((bits >> 12) & 0xf);
  d.scaling = static_cast<Scaling>((bits >> 16) & 0xf);
  d.has_perm = ((bits >> 20) & 1) != 0;
  d.super_dtype = static_cast<ScaleDtype>((bits >> 21) & 3);
  d.layout = static_cast<Layout>((bits >> 24) & 0xff);
  const int64_t group = (bits >> 32) & kMaxGroupSize;
  d.group_size = group == 0 ? -1 : group;
  const int64_t every = bits >> 56;
  d.super_groups = every == kEveryAll ? -1 : every == 0 ? 0 : int64_t{1} << (every - 1);
  validate(d);
  return d;
}

std::string to_string(const Desc& d) {
  return concat(
      format_info(d.format).name, " group_size=", d.group_size, " zeros=", name_of(d.zero_kind),
      " scales=", name_of(d.scale_dtype), " scaling=", name_of(d.scaling),
      d.two_levels() ? concat(" super_groups=", d.super_groups, " supers=", name_of(d.super_dtype))
                     : std::string(),
      d.has_perm ? " perm" : "", " layout=", name_of(d.layout));
}

}  // namespace lowbit
