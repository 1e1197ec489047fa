#include "common/introspect.h"

#include "common/desc.h"
#include "formats/format_table.h"
#include "formats/scale_table.h"
#include "packing/cpu_tile16.h"
#include "packing/cuda_tile64.h"
#include "packing/metal_tile4.h"

// What CMake says of the CUDA library beside this one: what built it, or why there is none.
#ifndef LOWBIT_CUDA_VERSION
#define LOWBIT_CUDA_VERSION ""
#endif
#ifndef LOWBIT_CUDA_ARCHS
#define LOWBIT_CUDA_ARCHS ""
#endif
#ifndef LOWBIT_CUDA_ABSENT_REASON
#define LOWBIT_CUDA_ABSENT_REASON "this build has no CUDA library"
#endif

#define LOWBIT_STRINGIFY_(text) #text
#define LOWBIT_STRINGIFY(text) LOWBIT_STRINGIFY_(text)

namespace lowbit {
namespace {

template <class Enum>
EnumValues named(std::initializer_list<Enum> values) {
  EnumValues result;
  for (Enum value : values) result.emplace_back(name_of(value), static_cast<int64_t>(value));
  return result;
}

}  // namespace

std::vector<FormatRow> list_formats() {
  std::vector<FormatRow> rows;
  for (const FormatInfo& info : format_table()) {
    FormatRow row{
        static_cast<int>(info.format), info.name, info.bits, info.is_integer, info.max, {}};
    if (info.code != nullptr) row.code.assign(info.code, info.code + (1 << info.bits));
    rows.push_back(std::move(row));
  }
  return rows;
}

std::vector<ScaleRow> list_scales() {
  std::vector<ScaleRow> rows;
  for (const ScaleInfo& info : scale_table()) {
    ScaleRow row{static_cast<int>(info.dtype), info.name, info.bits, info.needs_super, {}};
    if (info.code != nullptr) row.code.assign(info.code, info.code + (1 << info.bits));
    rows.push_back(std::move(row));
  }
  return rows;
}

std::vector<std::pair<std::string, EnumValues>> list_enums() {
  EnumValues formats;
  for (const FormatInfo& info : format_table())
    formats.emplace_back(info.name, static_cast<int64_t>(info.format));
  EnumValues scale_dtypes;
  for (const ScaleInfo& info : scale_table())
    scale_dtypes.emplace_back(info.name, static_cast<int64_t>(info.dtype));
  return {
      {"format", formats},
      {"zero_kind", named({ZeroKind::kNone, ZeroKind::kInt, ZeroKind::kFloat, ZeroKind::kOffset})},
      {"scale_dtype", scale_dtypes},
      {"scaling", named({Scaling::kGroup, Scaling::kBlock128, Scaling::kTwoLevel, Scaling::kFlat})},
      {"layout",
       named({Layout::kCanonical, Layout::kCpuTile16, Layout::kCudaTile64, Layout::kMetalTile4})},
      {"flags", {{"batch_invariant", kBatchInvariant}}},
  };
}

CanonicalShapes canonical_shapes(int64_t N, int64_t K, int64_t desc) {
  const CanonicalShape s = canonical_shape(N, K, decode_desc(desc));
  CanonicalShapes shapes{{N, s.row_bytes}, {}, {}, {}, {}, {}};
  std::vector<int64_t>* const tables[] = {&shapes.scales, &shapes.zeros, &shapes.super_scales,
                                          &shapes.super_zeros};
  for (int i = 0; i < kTableCount; ++i) {
    const GroupTable& table = s.tables[i];
    if (!table.present()) continue;
    *tables[i] = {table.tensor_columns()};
    if (table.tensor_rows() > 0) tables[i]->insert(tables[i]->begin(), table.tensor_rows());
  }
  if (s.has_perm) shapes.perm = {K};
  return shapes;
}

int64_t packed_size(int64_t N, int64_t K, int64_t desc) {
  const Desc d = decode_desc(desc);
  if (d.layout == Layout::kCpuTile16) return cpu_tile16(N, K, d).total_bytes;
  if (d.layout == Layout::kCudaTile64) return cuda_tile64(N, K, d).total_bytes;
  if (d.layout == Layout::kMetalTile4) return metal_tile4(N, K, d).total_bytes;
  fail("layout ", name_of(d.layout),
       " is not a kernel layout; canonical weights are several tensors");
}

int64_t preferred_layout(const std::string& device_type, int64_t desc) {
  decode_desc(desc);
  if (device_type == "cpu") return static_cast<int64_t>(Layout::kCpuTile16);
  // "sm_90" too: what explain() calls a CUDA device that is not here.
  if (device_type == "cuda" || device_type.rfind("sm_", 0) == 0)
    return static_cast<int64_t>(Layout::kCudaTile64);
  // "apple9" likewise.
  if (device_type == "mps" || device_type.rfind("apple", 0) == 0)
    return static_cast<int64_t>(Layout::kMetalTile4);
  fail("no kernels for device '", device_type, "' in this build; have: cpu, cuda, mps");
}

std::vector<std::pair<std::string, std::string>> build_info() {
#if defined(__clang__)
  const std::string compiler = std::string("clang ") + __clang_version__;
#else
  const std::string compiler = std::string("gcc ") + __VERSION__;
#endif
  return {{"version", LOWBIT_VERSION},
          {"compiler", compiler},
          {"flags", LOWBIT_BUILD_FLAGS},
          {"build_type", LOWBIT_BUILD_TYPE},
          {"abi_target", "2.11"},
          {"built_with_torch", LOWBIT_BUILT_WITH_TORCH},
          {"cuda", LOWBIT_CUDA_VERSION},
          {"cuda_archs", LOWBIT_CUDA_ARCHS},
          {"cuda_absent", LOWBIT_CUDA_ABSENT_REASON},
          {"op_namespace", LOWBIT_STRINGIFY(LOWBIT_OP_NAMESPACE)}};
}

}  // namespace lowbit
