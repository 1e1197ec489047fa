#include "cpu/weight_view.h"

namespace lowbit {
namespace {

WeightView::Table table_view(const CpuTile16& tile, int i) {
  const GroupTable& table = tile.shape.tables[i];
  if (!table.present()) return {};
  return {tile.table_offset[i], table.fine_shift};
}

}  // namespace

WeightView weight_view(const CpuTile16& tile, const Desc& desc, const uint8_t* data) {
  const CanonicalShape& s = tile.shape;
  WeightView view;
  view.data = data;
  view.format = desc.format;
  view.zero_kind = desc.zero_kind;
  view.scale_dtype = desc.scale_dtype;
  view.scale_bytes = s.scale_bytes;
  view.zero_bytes = s.zero_bytes;
  view.scales_per_group = tile.scales_per_group;
  view.N = s.N;
  view.K = s.K;
  view.K_padded = tile.K_padded;
  view.group_size = s.group_size;
  view.groups = s.groups;
  view.kb = tile.kb;
  view.block_bytes = tile.block_bytes;
  view.strip_bytes = tile.strip_bytes;
  view.scales_offset = tile.scales_offset;
  view.zeros_offset = tile.zeros_offset;
  view.bits = s.bits;
  view.code = format_info(desc.format).code;
  view.exact16 = format_info(desc.format).exact16;
  view.tile = &tile;
  view.plain = scale_info(desc.scale_dtype).is_float();
  view.super_dtype = desc.super_dtype;
  view.supers = table_view(tile, kSuperTable);
  view.super_zeros = table_view(tile, kSuperZeroTable);
  view.scale_code = scale_info(desc.scale_dtype).code;
  return view;
}

}  // namespace lowbit
