// quantize_activation on the CPU.

#include <algorithm>
#include <vector>

#include "common/op_checks.h"
#include "cpu/isa.h"
#include "cpu/scratch.h"
#include "op_namespace.h"

namespace lowbit {
namespace {

void run(const ActivationCall& call, uint8_t* codes, float* scales, int32_t* zeros) {
  const IsaKernels& isa = kernels();
  const int64_t K = call.K;
  const RowSource source{call.rows.data, call.x, call.rows.stride, K, nullptr, call.pre_scale};
  parallel_items(call.rows.M, K * 4, [&](int64_t begin, int64_t end) {
    std::vector<float> values(static_cast<size_t>(K));
    QuantizeActivationJob job{};
    job.K = K;
    job.group_size = call.group_size;
    job.format = call.format;
    job.symmetric = call.symmetric;
    job.static_scale = call.static_scale;
    job.static_zero = call.static_zero;
    for (int64_t m = begin; m < end; ++m) {
      isa.load_rows(source, m, m + 1, values.data(), K);
      job.x = values.data();
      job.codes = codes + m * K;
      job.scales = scales + m * call.groups;
      job.zeros = zeros == nullptr ? nullptr : zeros + m;
      isa.quantize_activation_row(job);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> quantize_activation(
    const Tensor& x, int64_t format, int64_t group_size, const OptionalTensor& scale,
    const OptionalTensor& zero, const OptionalTensor& pre_scale, bool symmetric) {
  const Place cpu = cpu_place();
  const ActivationCall call =
      check_activation("lowbit::quantize_activation", x, cpu, Values::kChecked, format, group_size,
                       scale, zero, pre_scale, symmetric);
  Tensor codes = empty_on(cpu, with_last(x, call.K), call.code_type());
  Tensor scales = empty_on(cpu, with_last(x, call.groups), ScalarType::Float);
  Tensor zeros = call.has_zeros ? empty_on(cpu, with_last(x, 1), ScalarType::Int)
                                : empty_on(cpu, {0}, ScalarType::Int);
  run(call, data_of<uint8_t>(codes), data_of<float>(scales),
      call.has_zeros ? data_of<int32_t>(zeros) : nullptr);
  return {codes, scales, zeros};
}

void quantize_activation_out(const Tensor& x, int64_t format, int64_t group_size,
                             const OptionalTensor& scale, const OptionalTensor& zero,
                             const OptionalTensor& pre_scale, bool symmetric, const Tensor& xq,
                             const Tensor& x_scales, const OptionalTensor& x_zeros) {
  const char* op = "lowbit::quantize_activation_out";
  const ActivationCall call = check_activation(op, x, cpu_place(), Values::kChecked, format,
                                               group_size, scale, zero, pre_scale, symmetric);
  check_activation_out(op, call, x, cpu_place(), xq, x_scales, x_zeros);
  run(call, data_of<uint8_t>(xq), data_of<float>(x_scales),
      x_zeros.has_value() ? data_of<int32_t>(*x_zeros) : nullptr);
}

}  // namespace

LOWBIT_IMPL(CPU, m) {
  m.impl("quantize_activation", TORCH_BOX(&quantize_activation));
  m.impl("quantize_activation_out", TORCH_BOX(&quantize_activation_out));
}

}  // namespace lowbit
