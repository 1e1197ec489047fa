#include "cpu/weight.h"

namespace lowbit {

PackedWeight::PackedWeight(const char* op, const Tensor& w, int64_t N, int64_t K, int64_t desc_bits)
    : desc(decode_desc(desc_bits)) {
  LOWBIT_CHECK(desc.layout == Layout::kCpuTile16, op, ": the weight's layout is ",
               name_of(desc.layout), ", the CPU kernels read ", name_of(Layout::kCpuTile16),
               "; pack it for this device");
  tile = cpu_tile16(N, K, desc);
  check_plain(op, "w", w, cpu_place(), ScalarType::Byte, {tile.total_bytes});
  const CanonicalShape& s = tile.shape;
  view.data = const_data_of<uint8_t>(w);
  view.format = desc.format;
  view.zero_kind = desc.zero_kind;
  view.scale_dtype = desc.scale_dtype;
  view.scale_bytes = s.scale_bytes;
  view.zero_bytes = s.zero_bytes;
  view.scales_per_group = tile.scales_per_group;
  view.N = N;
  view.K = K;
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
  view.tile = &tile;
  // A workspace-sliced weight may start anywhere, but perm_offset is a multiple of 64 and tensors are 4-byte aligned.
  perm = desc.has_perm ? reinterpret_cast<const int32_t*>(view.data + tile.perm_offset) : nullptr;
  LOWBIT_CHECK(perm == nullptr || reinterpret_cast<uintptr_t>(perm) % 4 == 0, op,
               ": w with a perm must start on a 4-byte boundary");
}

}  // namespace lowbit
