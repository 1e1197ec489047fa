// quantize, dequantize, pack, unpack on CUDA.

#include "cuda/tensor.h"
#include "formats/format_table.h"

namespace lowbit::cuda {
namespace {

// Canonical tensors to be written.
struct CanonicalResult {
  Tensor packed, scales, zeros, perm;

  CanonicalResult(const Desc& desc, const CanonicalShape& s, const Place& place)
      : packed(empty_on(place, {s.N, s.row_bytes}, ScalarType::Byte)),
        scales(empty_on(place, scales_shape(s), scale_scalar_type(desc.scale_dtype))),
        zeros(s.zero_bytes == 0 ? empty_on(place, {0}, ScalarType::Byte)
                                : empty_on(place, {s.N, s.groups}, zeros_scalar_type(desc))),
        perm(empty_on(place, {s.has_perm ? s.K : 0}, ScalarType::Int)) {}

  CanonicalOut pointers(const CanonicalShape& s) const {
    return {data_of<uint8_t>(packed), scales.mutable_data_ptr(),
            s.zero_bytes == 0 ? nullptr : zeros.mutable_data_ptr(),
            s.has_perm ? data_of<int32_t>(perm) : nullptr};
  }
};

CanonicalParams params_of(const CanonicalTensors& c) {
  CanonicalParams p = canonical_params(c.desc, c.shape);
  p.packed = c.data.packed;
  p.scales = c.data.scales;
  p.zeros = c.data.zeros;
  p.perm = c.data.perm;
  return p;
}

std::tuple<Tensor, Tensor, Tensor> quantize(const Tensor& weight, int64_t desc_bits, bool search,
                                            const OptionalTensor& importance) {
  const char* op = "lowbit::quantize";
  const Place place = place_of(weight, "weight");
  const Scope scope(op, place);
  LOWBIT_CHECK(weight.dim() == 2, op, ": weight has shape ", shape_string(weight),
               ", expected [N, K]");
  Rows rows = rows_of(op, "weight", weight, place);
  const Element element = float_element(op, "weight", weight);
  const Desc desc = decode_desc(desc_bits);
  LOWBIT_CHECK(!desc.has_perm, op,
               ": desc has a perm; quantize the permuted weight and give the perm to pack");
  const CanonicalShape shape = canonical_shape(rows.M, rows.K, desc);
  if (importance.has_value())
    check_plain(op, "importance", *importance, place, ScalarType::Float, {rows.K});
  if (rows.stride != rows.K) {  // the kernel reads rows that follow each other
    rows.keep = torch::stable::contiguous(weight);
    rows.data = const_data_of<uint8_t>(rows.keep);
  }
  const CanonicalResult result(desc, shape, place);
  QuantizeParams p{};
  p.weight = rows.data;
  p.type = element;
  p.importance = importance.has_value() ? const_data_of<float>(*importance) : nullptr;
  p.search = search;
  p.shape = canonical_params(desc, shape);
  p.to = result.pointers(shape);
  launch_quantize(p, scope.stream());
  return {result.packed, result.scales, result.zeros};
}

Tensor dequantize(const Tensor& packed, const Tensor& scales, const OptionalTensor& zeros,
                  const OptionalTensor& perm, int64_t N, int64_t K, int64_t desc,
                  ScalarType out_dtype) {
  const char* op = "lowbit::dequantize";
  const Place place = place_of(packed, "packed");
  const Scope scope(op, place);
  const CanonicalTensors c(op, packed, scales, zeros, perm, place, Values::kTrusted, N, K, desc);
  const Element element = float_element(op, "out_dtype", out_dtype);
  Tensor out = empty_on(place, {N, K}, out_dtype);
  launch_dequantize(params_of(c), out.mutable_data_ptr(), element, scope.stream());
  return out;
}

void dequantize_out(const Tensor& packed, const Tensor& scales, const OptionalTensor& zeros,
                    const OptionalTensor& perm, int64_t N, int64_t K, int64_t desc,
                    const Tensor& out) {
  const char* op = "lowbit::dequantize_out";
  const Place place = place_of(packed, "packed");
  const Scope scope(op, place);
  const CanonicalTensors c(op, packed, scales, zeros, perm, place, Values::kTrusted, N, K, desc);
  const Element element = float_element(op, "out", out);
  check_plain(op, "out", out, place, out.scalar_type(), {N, K});
  launch_dequantize(params_of(c), out.mutable_data_ptr(), element, scope.stream());
}

Tensor pack(const Tensor& packed, const Tensor& scales, const OptionalTensor& zeros,
            const OptionalTensor& perm, int64_t N, int64_t K, int64_t desc) {
  const char* op = "lowbit::pack";
  const Place place = place_of(packed, "packed");
  const Scope scope(op, place);
  const CanonicalTensors c(op, packed, scales, zeros, perm, place, Values::kTrusted, N, K, desc);
  LOWBIT_CHECK(c.desc.layout == Layout::kCudaTile64, op, ": desc asks for layout ",
               name_of(c.desc.layout), ", CUDA packs ", name_of(Layout::kCudaTile64));
  const CudaTile64 tile = cuda_tile64(N, K, c.desc);
  Tensor out = empty_on(place, {tile.total_bytes}, ScalarType::Byte);
  uint8_t* to = data_of<uint8_t>(out);
  launch_pack(params_of(c), weight_params(tile, c.desc, to), to, scope.stream());
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> unpack(const Tensor& w, int64_t N, int64_t K,
                                                  int64_t desc) {
  const char* op = "lowbit::unpack";
  const Place place = place_of(w, "w");
  const Scope scope(op, place);
  const Weight weight(op, w, place, N, K, desc);
  const CanonicalShape shape = canonical_shape(N, K, weight.desc);
  const CanonicalResult result(weight.desc, shape, place);
  launch_unpack(weight.params, canonical_params(weight.desc, shape), result.pointers(shape),
                scope.stream());
  return {result.packed, result.scales, result.zeros, result.perm};
}

}  // namespace

LOWBIT_IMPL(LOWBIT_CUDA_KEY, m) {
  m.impl("quantize", TORCH_BOX(&quantize));
  m.impl("dequantize", TORCH_BOX(&dequantize));
  m.impl("dequantize_out", TORCH_BOX(&dequantize_out));
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("unpack", TORCH_BOX(&unpack));
}

}  // namespace lowbit::cuda
