// From a weight's geometry and desc to what kernels are given. Host code, no torch.
#pragma once

#include <cstdint>

#include "cuda/params.h"
#include "packing/cuda_tile64.h"

namespace lowbit::cuda {

inline WeightParams weight_params(const CudaTile64& tile, const Desc& desc, const uint8_t* data) {
  WeightParams w{};
  w.data = data;
  w.strip_bytes = tile.strip_bytes;
  // canonical_shape keeps N and K below 2^28, so everything counted in 32 bits fits.
  w.N = static_cast<int32_t>(tile.N);
  w.K = static_cast<int32_t>(tile.K);
  w.tiles = static_cast<int32_t>(tile.tiles);
  w.strips = static_cast<int32_t>(tile.strips);
  w.tile_bytes = static_cast<int32_t>(tile.tile_bytes);
  w.codes_bytes = tile.codes_bytes;
  w.group_size = static_cast<int32_t>(tile.group_size);
  w.groups = static_cast<int32_t>(tile.groups);
  w.groups_per_tile = tile.groups_per_tile;
  w.scale_row_bytes = tile.scale_row_bytes;
  w.zero_row_bytes = tile.zero_row_bytes;
  w.scales_offset = tile.scales_offset;
  w.zeros_offset = tile.zeros_offset;
  w.scale_dtype = desc.scale_dtype;
  w.zero_kind = desc.zero_kind;
  w.format = desc.format;
  w.bits = tile.bits;
  w.one_scale = tile.one_scale;
  w.plain = tile.plain;
  w.shared_super = desc.super_groups == -1;
  w.super_dtype = desc.super_dtype;
  const auto table = [&tile](int i) -> WeightParams::Table {
    const GroupTable& t = tile.shape.tables[i];
    return {tile.table_offset[i], t.fine_shift, kStripRows * t.bytes};
  };
  w.supers = table(kSuperTable);
  w.super_zeros = table(kSuperZeroTable);
  w.stored = {w.scale_dtype, w.scale_row_bytes, w.zero_row_bytes};
  w.perm = desc.has_perm ? reinterpret_cast<const int32_t*>(data + tile.perm_offset) : nullptr;
  return w;
}

// As fast kernels get it: with the floats that they make of the scales.
inline WeightParams as_floats(const WeightParams& w) {
  WeightParams floats = w;
  if (w.plain) return floats;
  const FloatRows rows = float_rows(w.scale_dtype, w.zero_kind, w.one_scale, w.zero_row_bytes);
  floats.scale_dtype = rows.dtype;
  floats.scale_row_bytes = rows.scale_bytes;
  floats.zero_row_bytes = rows.zero_bytes;
  return floats;
}

}  // namespace lowbit::cuda
