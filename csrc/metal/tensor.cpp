#include "metal/tensor.h"

namespace lowbit::metal {
void check_mps(const char* op, const Place& place) {
#if defined(LOWBIT_EMULATOR)
  const int32_t wanted = aoti_torch_device_type_cpu();
#else
  const int32_t wanted = aoti_torch_device_type_mps();
#endif
  LOWBIT_CHECK(place.type == wanted, op, ": ", place.said_by, " is on ", place_name(place),
               " while another argument is on mps: move all arguments to one device");
}

bool starts_at(const Tensor& tensor, int64_t bytes) {
#if defined(LOWBIT_EMULATOR)
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % static_cast<uintptr_t>(bytes) == 0;
#else
  int64_t offset = 0;
  return aoti_torch_get_storage_offset(tensor.get(), &offset) == AOTI_TORCH_SUCCESS &&
         offset * static_cast<int64_t>(tensor.element_size()) % bytes == 0;
#endif
}

Weight::Weight(const char* op, const Tensor& w, const Place& place, int64_t N, int64_t K,
               int64_t desc_bits)
    : desc(decode_desc(desc_bits)), tile{}, data(w) {
  LOWBIT_CHECK(desc.layout == Layout::kMetalTile4, op, ": the weight's layout is ",
               name_of(desc.layout), ", the Metal kernels read ", name_of(Layout::kMetalTile4),
               "; pack it for this device");
  tile = metal_tile4(N, K, desc);
  check_plain(op, "w", w, place, ScalarType::Byte, {tile.total_bytes});
  // torch's own tensors do; one that is sliced out of a larger buffer may not.
  LOWBIT_CHECK(starts_at(w, 16), op, ": w must start on a 16-byte boundary");
}

metal_params::Gemm gemm_params(const MetalTile4& tile, const Desc& desc) {
  // canonical_shape keeps N and K below 2^28, so everything counted in 32 bits fits.
  metal_params::Gemm p{};
  p.N = static_cast<int32_t>(tile.N);
  p.K = static_cast<int32_t>(tile.K);
  p.chunks = static_cast<int32_t>(tile.chunks);
  p.group_size = static_cast<int32_t>(tile.group_size);
  p.group_shift = -1;
  for (int shift = 3; shift < 31; ++shift) {
    if (tile.group_size == int64_t{1} << shift) p.group_shift = shift;
  }
  p.strip_bytes = static_cast<uint32_t>(tile.strip_bytes);
  p.high_plane = static_cast<uint32_t>(tile.planes.offset[1]);
  p.scales_offset = static_cast<uint32_t>(tile.scales_offset);
  p.zeros_offset = static_cast<uint32_t>(tile.zeros_offset);
  p.strips = static_cast<int32_t>(tile.strips);
  p.split = 1;
  p.x_groups = 1;
  p.perm_low = static_cast<uint32_t>(tile.perm_offset);
  p.perm_high = static_cast<uint32_t>(tile.perm_offset >> 32);
  if (tile.scale_rows == 1) p.kinds |= metal_params::kOneScale;
  p.supers_offset = static_cast<uint32_t>(tile.table_offset[kSuperTable]);
  p.super_zeros_offset = static_cast<uint32_t>(tile.table_offset[kSuperZeroTable]);
  const GroupTable& supers = tile.shape.tables[kSuperTable];
  p.super_shift = supers.present() ? supers.fine_shift : metal_params::kNoSupers;
  p.super_dtype = static_cast<int32_t>(desc.super_dtype);
  return p;
}

int32_t rows_of_table(const GroupTable& table) {
  using Rows = GroupTable::Rows;
  static_assert(static_cast<int>(Rows::kOwn) == metal_params::kOwnRows &&
                    static_cast<int>(Rows::kBlock) == metal_params::kBlockRows &&
                    static_cast<int>(Rows::kShared) == metal_params::kSharedRows &&
                    static_cast<int>(Rows::kFlat) == metal_params::kFlatRows,
                "shaders have the same names");
  return static_cast<int32_t>(table.rows);
}

metal_params::Canonical canonical_params(const Desc& desc, const CanonicalShape& shape) {
  metal_params::Canonical p{};
  p.N = static_cast<int32_t>(shape.N);
  p.K = static_cast<int32_t>(shape.K);
  p.group_size = static_cast<int32_t>(shape.group_size);
  p.groups = static_cast<int32_t>(shape.groups);
  p.row_bytes = static_cast<int32_t>(shape.row_bytes);
  p.kinds = metal_params::make_kinds(desc.scale_dtype, desc.zero_kind, Element::kFloat32,
                                     Element::kFloat32, Element::kFloat32, desc.format);
  int32_t tables[kTableCount];
  for (int i = 0; i < kTableCount; ++i) {
    const GroupTable& table = shape.tables[i];
    tables[i] = table.present() ? metal_params::make_table(rows_of_table(table), table.bits,
                                                           table.shift, desc.super_dtype)
                                : 0;
  }
  p.tables = tables[kScaleTable] | tables[kZeroTable] << 16;
  p.super_tables = tables[kSuperTable] | tables[kSuperZeroTable] << 16;
  return p;
}

int32_t checked_int(const char* op, const char* what, int64_t value) {
  LOWBIT_CHECK(value >= 0 && value < (int64_t{1} << 31), op, ": ", what, "=", value,
               " exceeds 2^31 - 1");
  return static_cast<int32_t>(value);
}

}  // namespace lowbit::metal
