// quantize_activation on Metal.

#include "metal/tensor.h"

namespace lowbit::metal {
namespace {

namespace mp = metal_params;

// One SIMD-group per scale up to here, eight beyond: 16 elements per lane.
constexpr int64_t kShort = 512;

struct Inputs {
  const OptionalTensor& scale;
  const OptionalTensor& zero;
  const OptionalTensor& pre_scale;
};

void run(const char* op, const ActivationCall& call, const Inputs& inputs, const Tensor& xq,
         const Tensor& scales, const OptionalTensor& zeros) {
  if (call.rows.M == 0) return;
  mp::Rows p{};
  p.M = checked_int(op, "M", call.rows.M);
  p.K = checked_int(op, "K", call.K);
  p.stride = checked_int(op, "the stride of x", call.rows.stride);
  p.group_size = checked_int(op, "group_size", call.group_size);
  p.groups = static_cast<int32_t>(call.groups);
  p.kinds = mp::make_kinds(ScaleDtype::kFloat32, ZeroKind::kNone, call.x, call.format,
                           Element::kFloat32, Format::kInt4);
  if (call.symmetric) p.kinds |= mp::kSymmetric;
  if (inputs.scale.has_value()) p.kinds |= mp::kStatic;
  if (inputs.zero.has_value()) p.kinds |= mp::kStaticZero;
  if (inputs.pre_scale.has_value()) p.kinds |= mp::kPreScale;
  const bool is_short = call.group_size <= kShort;
  Command(op,
          {{Shader::kQuantizeActivation, Format(0), false, Element::kFloat32}, is_short ? 0 : 1})
      .params(p)
      .tensor(call.rows.keep)
      .tensor(xq)
      .tensor(scales)
      .tensor(zeros, scales)
      .tensor(inputs.scale, scales)
      .tensor(inputs.zero, scales)
      .tensor(inputs.pre_scale, scales)
      .run(static_cast<uint32_t>(call.groups), static_cast<uint32_t>(call.rows.M),
           is_short ? 32 : 256);
}

std::tuple<Tensor, Tensor, Tensor> quantize_activation(
    const Tensor& x, int64_t format, int64_t group_size, const OptionalTensor& scale,
    const OptionalTensor& zero, const OptionalTensor& pre_scale, bool symmetric) {
  const char* op = "lowbit::quantize_activation";
  const Place place = place_of(x, "x");
  check_mps(op, place);
  const ActivationCall call = check_activation(op, x, place, Values::kTrusted, format, group_size,
                                               scale, zero, pre_scale, symmetric);
  Tensor codes = empty_on(place, with_last(x, call.K), call.code_type());
  Tensor scales = empty_on(place, with_last(x, call.groups), ScalarType::Float);
  Tensor zeros = call.has_zeros ? empty_on(place, with_last(x, 1), ScalarType::Int)
                                : empty_on(place, {0}, ScalarType::Int);
  run(op, call, {scale, zero, pre_scale}, codes, scales,
      call.has_zeros ? OptionalTensor(zeros) : OptionalTensor());
  return {codes, scales, zeros};
}

void quantize_activation_out(const Tensor& x, int64_t format, int64_t group_size,
                             const OptionalTensor& scale, const OptionalTensor& zero,
                             const OptionalTensor& pre_scale, bool symmetric, const Tensor& xq,
                             const Tensor& x_scales, const OptionalTensor& x_zeros) {
  const char* op = "lowbit::quantize_activation_out";
  const Place place = place_of(x, "x");
  check_mps(op, place);
  const ActivationCall call = check_activation(op, x, place, Values::kTrusted, format, group_size,
                                               scale, zero, pre_scale, symmetric);
  check_activation_out(op, call, x, place, xq, x_scales, x_zeros);
  run(op, call, {scale, zero, pre_scale}, xq, x_scales, x_zeros);
}

}  // namespace

LOWBIT_IMPL(LOWBIT_METAL_KEY, m) {
  m.impl("quantize_activation", TORCH_BOX(&quantize_activation));
  m.impl("quantize_activation_out", TORCH_BOX(&quantize_activation_out));
}

}  // namespace lowbit::metal
