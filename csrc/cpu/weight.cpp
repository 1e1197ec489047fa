#include "cpu/weight.h"

namespace lowbit {

ScalarType zeros_scalar_type(const Desc& desc) {
  return desc.zero_kind == ZeroKind::kInt ? ScalarType::Byte : scale_scalar_type(desc.scale_dtype);
}

std::vector<int64_t> scales_shape(const CanonicalShape& shape) {
  return {shape.scale_rows, shape.groups};
}

PackedWeight::PackedWeight(const char* op, const Tensor& w, int64_t N, int64_t K, int64_t desc_bits)
    : desc(decode_desc(desc_bits)) {
  LOWBIT_CHECK(desc.layout == Layout::kCpuTile16, op, ": the weight's layout is ",
               name_of(desc.layout), ", the CPU kernels read ", name_of(Layout::kCpuTile16),
               "; pack it for this device");
  tile = cpu_tile16(N, K, desc);
  check_plain(op, "w", w, ScalarType::Byte, {tile.total_bytes});
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

CanonicalTensors::CanonicalTensors(const char* op, const Tensor& packed, const Tensor& scales,
                                   const OptionalTensor& zeros, const OptionalTensor& perm,
                                   int64_t N, int64_t K, int64_t desc_bits)
    : desc(decode_desc(desc_bits)), shape(canonical_shape(N, K, desc)), data{} {
  check_plain(op, "packed", packed, ScalarType::Byte, {N, shape.row_bytes});
  check_plain(op, "scales", scales, scale_scalar_type(desc.scale_dtype), scales_shape(shape));
  LOWBIT_CHECK(zeros.has_value() == (desc.zero_kind != ZeroKind::kNone), op, ": zeros are ",
               zeros.has_value() ? "given" : "absent",
               ", but desc says zeros=", name_of(desc.zero_kind));
  LOWBIT_CHECK(perm.has_value() == desc.has_perm, op, ": perm is ",
               perm.has_value() ? "given" : "absent", ", but desc says it is ",
               desc.has_perm ? "there" : "not");
  data.packed = const_data_of<uint8_t>(packed);
  data.scales = const_data_of<uint8_t>(scales);
  if (zeros.has_value()) {
    check_plain(op, "zeros", *zeros, zeros_scalar_type(desc), {N, shape.groups});
    data.zeros = const_data_of<uint8_t>(*zeros);
  }
  if (perm.has_value()) {
    check_plain(op, "perm", *perm, ScalarType::Int, {K});
    data.perm = const_data_of<int32_t>(*perm);
    // An index outside K would read or write out of bounds later, so this value is checked on every pack: it is cheap.
    for (int64_t k = 0; k < K; ++k)
      LOWBIT_CHECK(data.perm[k] >= 0 && data.perm[k] < K, op, ": perm[", k, "]=", data.perm[k],
                   " is outside 0..", K - 1);
  }
}

}  // namespace lowbit
