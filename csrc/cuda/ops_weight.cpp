// quantize, dequantize, pack, unpack on CUDA.

#include "cuda/tensor.h"
#include "formats/format_table.h"

namespace lowbit::cuda {
namespace {

// What the kernels here make and read: scales of one number each, with one above all of them or none. The CPU does the rest.
void check_scales(const char* op, const Desc& desc) {
  const bool one = !desc.two_levels() || desc.super_groups == -1;
  LOWBIT_CHECK(one && !scale_info(desc.scale_dtype).needs_super && desc.scaling != Scaling::kFlat &&
                   desc.super_dtype == ScaleDtype::kFloat32,
               op, ": ", to_string(desc), " is not read here on CUDA: do it on the CPU");
}

// Canonical tensors to be written.
struct CanonicalResult {
  Tensor packed, scales, zeros, super_scales, perm;

  CanonicalResult(const Desc& desc, const CanonicalShape& s, const Place& place)
      : packed(empty_on(place, {s.N, s.row_bytes}, ScalarType::Byte)),
        scales(empty_table(place, s, desc, kScaleTable)),
        zeros(empty_table(place, s, desc, kZeroTable)),
        super_scales(empty_table(place, s, desc, kSuperTable)),
        perm(empty_on(place, {s.has_perm ? s.K : 0}, ScalarType::Int)) {}

  CanonicalOut pointers(const CanonicalShape& s) const {
    return {data_of<uint8_t>(packed), scales.mutable_data_ptr(),
            s.zero_bytes == 0 ? nullptr : zeros.mutable_data_ptr(), data_of<float>(super_scales),
            s.has_perm ? data_of<int32_t>(perm) : nullptr};
  }
};

CanonicalParams params_of(const CanonicalTensors& c) {
  CanonicalParams p = canonical_params(c.desc, c.shape);
  p.packed = c.data.packed;
  p.scales = c.data.tables[kScaleTable];
  p.zeros = c.data.tables[kZeroTable];
  p.super_scale = reinterpret_cast<const float*>(c.data.tables[kSuperTable]);
  p.perm = c.data.perm;
  return p;
}

std::tuple<Tensor, Tensor, Tensor> quantize(const Tensor& weight, int64_t desc_bits, bool search,
                                            const OptionalTensor& importance,
                                            const OptionalTensor& super_scales) {
  const char* op = "lowbit::quantize";
  const Place place = place_of(weight, "weight");
  const Scope scope(op, place);
  QuantizeCall call = check_quantize(op, weight, place, desc_bits, importance, super_scales);
  const Desc& desc = call.desc;
  const CanonicalShape& shape = call.shape;
  Rows& rows = call.rows;
  check_scales(op, desc);
  LOWBIT_CHECK(!call.has_super, op, ": ", to_string(desc),
               " is not quantized on CUDA: do it on the CPU");
  if (rows.stride != rows.K) {  // the kernel reads rows that follow each other
    rows.keep = torch::stable::contiguous(weight);
    rows.data = const_data_of<uint8_t>(rows.keep);
  }
  const CanonicalResult result(desc, shape, place);
  QuantizeParams p{};
  p.weight = rows.data;
  p.type = call.element;
  p.importance = importance.has_value() ? const_data_of<float>(*importance) : nullptr;
  p.search = search;
  p.shape = canonical_params(desc, shape);
  p.to = result.pointers(shape);
  launch_quantize(p, scope.stream());
  return {result.packed, result.scales, result.zeros};
}

Tensor dequantize(const Tensor& packed, const Tensor& scales, const OptionalTensor& zeros,
                  const OptionalTensor& perm, int64_t N, int64_t K, int64_t desc,
                  ScalarType out_dtype, const OptionalTensor& super_scales,
                  const OptionalTensor& super_zeros) {
  const char* op = "lowbit::dequantize";
  const Place place = place_of(packed, "packed");
  const Scope scope(op, place);
  check_scales(op, decode_desc(desc));
  const CanonicalTensors c(op, packed, scales, zeros, perm, super_scales, super_zeros, place,
                           Values::kTrusted, N, K, desc);
  const Element element = float_element(op, "out_dtype", out_dtype);
  Tensor out = empty_on(place, {N, K}, out_dtype);
  launch_dequantize(params_of(c), out.mutable_data_ptr(), element, scope.stream());
  return out;
}

void dequantize_out(const Tensor& packed, const Tensor& scales, const OptionalTensor& zeros,
                    const OptionalTensor& perm, int64_t N, int64_t K, int64_t desc,
                    const Tensor& out, const OptionalTensor& super_scales,
                    const OptionalTensor& super_zeros) {
  const char* op = "lowbit::dequantize_out";
  const Place place = place_of(packed, "packed");
  const Scope scope(op, place);
  check_scales(op, decode_desc(desc));
  const CanonicalTensors c(op, packed, scales, zeros, perm, super_scales, super_zeros, place,
                           Values::kTrusted, N, K, desc);
  const Element element = float_element(op, "out", out);
  check_plain(op, "out", out, place, out.scalar_type(), {N, K});
  launch_dequantize(params_of(c), out.mutable_data_ptr(), element, scope.stream());
}

Tensor pack(const Tensor& packed, const Tensor& scales, const OptionalTensor& zeros,
            const OptionalTensor& perm, int64_t N, int64_t K, int64_t desc,
            const OptionalTensor& super_scales, const OptionalTensor& super_zeros) {
  const char* op = "lowbit::pack";
  const Place place = place_of(packed, "packed");
  const Scope scope(op, place);
  check_scales(op, decode_desc(desc));
  const CanonicalTensors c(op, packed, scales, zeros, perm, super_scales, super_zeros, place,
                           Values::kTrusted, N, K, desc);
  LOWBIT_CHECK(c.desc.layout == Layout::kCudaTile64, op, ": desc asks for layout ",
               name_of(c.desc.layout), ", CUDA packs ", name_of(Layout::kCudaTile64));
  const CudaTile64 tile = cuda_tile64(N, K, c.desc);
  Tensor out = empty_on(place, {tile.total_bytes}, ScalarType::Byte);
  uint8_t* to = data_of<uint8_t>(out);
  launch_pack(params_of(c), weight_params(tile, c.desc, to), to, scope.stream());
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> unpack(const Tensor& w, int64_t N,
                                                                  int64_t K, int64_t desc) {
  const char* op = "lowbit::unpack";
  const Place place = place_of(w, "w");
  const Scope scope(op, place);
  check_scales(op, decode_desc(desc));
  const Weight weight(op, w, place, N, K, desc);
  const CanonicalShape shape = canonical_shape(N, K, weight.desc);
  const CanonicalResult result(weight.desc, shape, place);
  launch_unpack(weight.params, canonical_params(weight.desc, shape), result.pointers(shape),
                scope.stream());
  return {result.packed,       result.scales,
          result.zeros,        result.perm,
          result.super_scales, empty_table(place, shape, weight.desc, kSuperZeroTable)};
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
