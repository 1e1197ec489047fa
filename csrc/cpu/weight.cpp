#include "cpu/weight.h"

#include "cpu/weight_view.h"

namespace lowbit {
PackedWeight::PackedWeight(const char* op, const Tensor& w, int64_t N, int64_t K, int64_t desc_bits)
    : desc(decode_desc(desc_bits)) {
  LOWBIT_CHECK(desc.layout == Layout::kCpuTile16, op, ": the weight's layout is ",
               name_of(desc.layout), ", the CPU kernels read ", name_of(Layout::kCpuTile16),
               "; pack it for this device");
  tile = cpu_tile16(N, K, desc);
  check_plain(op, "w", w, cpu_place(), ScalarType::Byte, {tile.total_bytes});
  view = weight_view(tile, desc, const_data_of<uint8_t>(w));
  // A workspace-sliced weight may start anywhere, but perm_offset is a multiple of 64 and tensors are 4-byte aligned.
  perm = desc.has_perm ? reinterpret_cast<const int32_t*>(view.data + tile.perm_offset) : nullptr;
  LOWBIT_CHECK(perm == nullptr || reinterpret_cast<uintptr_t>(perm) % 4 == 0, op,
               ": w with a perm must start on a 4-byte boundary");
}

}  // namespace lowbit
