// quantize_activation on CUDA.

#include "cuda/tensor.h"

namespace lowbit::cuda {
namespace {

void run(const ActivationCall& call, void* xq, float* scales, int32_t* zeros, Stream stream) {
  if (call.rows.M == 0) return;
  QuantizeActivationParams p{};
  p.x = call.rows.data;
  p.M = call.rows.M;
  p.K = call.K;
  p.stride = call.rows.stride;
  p.type = call.x;
  p.format = call.format;
  p.group_size = call.group_size;
  p.symmetric = call.symmetric;
  p.static_scale = call.static_scale;
  p.static_zero = call.static_zero;
  p.pre_scale = call.pre_scale;
  p.xq = xq;
  p.x_scales = scales;
  p.x_zeros = zeros;
  launch_quantize_activation(p, stream);
}

std::tuple<Tensor, Tensor, Tensor> quantize_activation(
    const Tensor& x, int64_t format, int64_t group_size, const OptionalTensor& scale,
    const OptionalTensor& zero, const OptionalTensor& pre_scale, bool symmetric) {
  const char* op = "lowbit::quantize_activation";
  const Place place = place_of(x, "x");
  const Scope scope(op, place);
  const ActivationCall call = check_activation(op, x, place, Values::kTrusted, format, group_size,
                                               scale, zero, pre_scale, symmetric);
  Tensor codes = empty_on(place, with_last(x, call.K), call.code_type());
  Tensor scales = empty_on(place, with_last(x, call.groups), ScalarType::Float);
  Tensor zeros = call.has_zeros ? empty_on(place, with_last(x, 1), ScalarType::Int)
                                : empty_on(place, {0}, ScalarType::Int);
  run(call, codes.mutable_data_ptr(), data_of<float>(scales),
      call.has_zeros ? data_of<int32_t>(zeros) : nullptr, scope.stream());
  return {codes, scales, zeros};
}

void quantize_activation_out(const Tensor& x, int64_t format, int64_t group_size,
                             const OptionalTensor& scale, const OptionalTensor& zero,
                             const OptionalTensor& pre_scale, bool symmetric, const Tensor& xq,
                             const Tensor& x_scales, const OptionalTensor& x_zeros) {
  const char* op = "lowbit::quantize_activation_out";
  const Place place = place_of(x, "x");
  const Scope scope(op, place);
  const ActivationCall call = check_activation(op, x, place, Values::kTrusted, format, group_size,
                                               scale, zero, pre_scale, symmetric);
  check_activation_out(op, call, x, place, xq, x_scales, x_zeros);
  run(call, xq.mutable_data_ptr(), data_of<float>(x_scales),
      x_zeros.has_value() ? data_of<int32_t>(*x_zeros) : nullptr, scope.stream());
}

}  // namespace

LOWBIT_IMPL(LOWBIT_CUDA_KEY, m) {
  m.impl("quantize_activation", TORCH_BOX(&quantize_activation));
  m.impl("quantize_activation_out", TORCH_BOX(&quantize_activation_out));
}

}  // namespace lowbit::cuda
