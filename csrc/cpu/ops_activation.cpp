// quantize_activation on the CPU.

#include <algorithm>
#include <vector>

#include "cpu/isa.h"
#include "cpu/tensor.h"
#include "formats/format_table.h"
#include "op_namespace.h"

namespace lowbit {
namespace {

struct ActivationCall {
  Rows rows;
  RowSource source;
  QuantizeActivationJob job;  // what all rows share
  int64_t groups;
  bool has_zeros;  // int8 and not symmetric
};

ActivationCall check(const char* op, const Tensor& x, int64_t format_id, int64_t group_size,
                     const OptionalTensor& scale, const OptionalTensor& zero,
                     const OptionalTensor& pre_scale, bool symmetric) {
  const auto format = static_cast<Format>(format_id);
  LOWBIT_CHECK(format == Format::kInt8 || format == Format::kFp8E4m3, op, ": format=", format_id,
               " is not an activation format; expected int8 (6) or fp8_e4m3 (7)");
  const bool is_int8 = format == Format::kInt8;
  ActivationCall call{rows_of(op, "x", x), {}, {}, 1, is_int8 && !symmetric};
  const int64_t K = call.rows.K;
  LOWBIT_CHECK(K >= 1, op, ": x of shape ", shape_string(x), " has K=0");
  LOWBIT_CHECK(group_size == -1 || (group_size >= 8 && group_size % 8 == 0), op,
               ": group_size=", group_size, " is neither -1 nor a positive multiple of 8");
  LOWBIT_CHECK(!is_int8 || group_size == -1, op, ": group_size=", group_size,
               " with int8, which has one scale per token (-1)");
  LOWBIT_CHECK(is_int8 || symmetric, op, ": fp8 has no zeros, got symmetric=False");
  LOWBIT_CHECK(!zero.has_value() || (call.has_zeros && scale.has_value()), op,
               ": zero is given, but it needs a static scale, int8 and symmetric=False");
  LOWBIT_CHECK(!scale.has_value() || !call.has_zeros || zero.has_value(), op,
               ": a static scale with symmetric=False needs a static zero");
  if (scale.has_value()) {
    check_plain(op, "scale", *scale, ScalarType::Float, {1});
    const float value = *const_data_of<float>(*scale);
    LOWBIT_CHECK(value > 0.0f, op, ": static scale=", value, " is not positive");
    call.job.static_scale = const_data_of<float>(*scale);
  }
  if (zero.has_value()) {
    check_plain(op, "zero", *zero, ScalarType::Int, {1});
    const int32_t value = *const_data_of<int32_t>(*zero);
    LOWBIT_CHECK(value >= -128 && value <= 127, op, ": static zero=", value,
                 " is outside -128..127");
    call.job.static_zero = const_data_of<int32_t>(*zero);
  }
  call.source = {call.rows.data, float_element(op, "x", x), call.rows.stride, K, nullptr, nullptr};
  if (pre_scale.has_value()) {
    check_plain(op, "pre_scale", *pre_scale, ScalarType::Float, {K});
    call.source.pre_scale = const_data_of<float>(*pre_scale);
  }
  call.job.K = K;
  call.job.group_size = group_size == -1 ? K : group_size;
  call.job.format = is_int8 ? Element::kInt8 : Element::kFp8E4m3;
  call.job.symmetric = symmetric;
  call.groups = div_up(K, call.job.group_size);
  return call;
}

void run(const ActivationCall& call, uint8_t* codes, float* scales, int32_t* zeros) {
  const IsaKernels& isa = kernels();
  const int64_t K = call.job.K;
  parallel_items(call.rows.M, K * 4, [&](int64_t begin, int64_t end) {
    std::vector<float> values(static_cast<size_t>(K));
    QuantizeActivationJob job = call.job;
    for (int64_t m = begin; m < end; ++m) {
      isa.load_rows(call.source, m, m + 1, values.data(), K);
      job.x = values.data();
      job.codes = codes + m * K;
      job.scales = scales + m * call.groups;
      job.zeros = zeros == nullptr ? nullptr : zeros + m;
      isa.quantize_activation_row(job);
    }
  });
}

ScalarType code_type(const ActivationCall& call) {
  return call.job.format == Element::kInt8 ? ScalarType::Char : ScalarType::Float8_e4m3fn;
}

std::tuple<Tensor, Tensor, Tensor> quantize_activation(
    const Tensor& x, int64_t format, int64_t group_size, const OptionalTensor& scale,
    const OptionalTensor& zero, const OptionalTensor& pre_scale, bool symmetric) {
  const ActivationCall call = check("lowbit::quantize_activation", x, format, group_size, scale,
                                    zero, pre_scale, symmetric);
  Tensor codes = empty_cpu(with_last(x, call.job.K), code_type(call));
  Tensor scales = empty_cpu(with_last(x, call.groups), ScalarType::Float);
  Tensor zeros = call.has_zeros ? empty_cpu(with_last(x, 1), ScalarType::Int)
                                : empty_cpu({0}, ScalarType::Int);
  run(call, data_of<uint8_t>(codes), data_of<float>(scales),
      call.has_zeros ? data_of<int32_t>(zeros) : nullptr);
  return {codes, scales, zeros};
}

void quantize_activation_out(const Tensor& x, int64_t format, int64_t group_size,
                             const OptionalTensor& scale, const OptionalTensor& zero,
                             const OptionalTensor& pre_scale, bool symmetric, const Tensor& xq,
                             const Tensor& x_scales, const OptionalTensor& x_zeros) {
  const char* op = "lowbit::quantize_activation_out";
  const ActivationCall call = check(op, x, format, group_size, scale, zero, pre_scale, symmetric);
  check_plain(op, "xq", xq, code_type(call), with_last(x, call.job.K));
  check_plain(op, "x_scales", x_scales, ScalarType::Float, with_last(x, call.groups));
  LOWBIT_CHECK(x_zeros.has_value() == call.has_zeros, op, ": x_zeros is ",
               x_zeros.has_value() ? "given" : "absent", ", but the format ",
               call.has_zeros ? "has" : "has no", " zeros");
  if (x_zeros.has_value()) check_plain(op, "x_zeros", *x_zeros, ScalarType::Int, with_last(x, 1));
  run(call, data_of<uint8_t>(xq), data_of<float>(x_scales),
      x_zeros.has_value() ? data_of<int32_t>(*x_zeros) : nullptr);
}

}  // namespace

LOWBIT_IMPL(CPU, m) {
  m.impl("quantize_activation", TORCH_BOX(&quantize_activation));
  m.impl("quantize_activation_out", TORCH_BOX(&quantize_activation_out));
}

}  // namespace lowbit
