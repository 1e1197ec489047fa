#include "common/explain.h"

#include "cpu/kernel_table.h"
#include "cpu/workspace.h"
#include "cuda/select.h"
#include "metal/select.h"

namespace lowbit {
namespace {

bool is_cuda(const std::string& device) {
  return device.rfind("cuda", 0) == 0 || device.rfind("sm_", 0) == 0;
}

bool is_metal(const std::string& device) {
  return device.rfind("mps", 0) == 0 || device.rfind("apple", 0) == 0;
}

Problem make_problem(const std::string& op, int64_t M, int64_t N, int64_t K, int64_t desc,
                     const std::string& dtype, int64_t flags) {
  LOWBIT_CHECK(M >= 0, "M=", M, " is negative");
  Problem problem;
  problem.op = parse_op(op);
  problem.M = M;
  problem.N = N;
  problem.K = K;
  problem.desc = decode_desc(desc);
  problem.x = parse_dtype(dtype);
  problem.flags = flags;
  return problem;
}

}  // namespace

std::vector<KernelInfo> list_kernels(bool compiled) {
  std::vector<KernelInfo> list = cpu_kernels(compiled);
  for (KernelInfo& row : cuda::kernels()) list.push_back(std::move(row));
  for (KernelInfo& row : metal::kernels()) list.push_back(std::move(row));
  return list;
}

std::vector<Verdict> explain(const std::string& op, const std::string& device, int64_t M, int64_t N,
                             int64_t K, int64_t desc, const std::string& dtype, int64_t flags) {
  const Problem problem = make_problem(op, M, N, K, desc, dtype, flags);
  if (is_cuda(device)) return cuda::explain(problem, cuda::device_model(device));
  if (is_metal(device)) return metal::explain(problem, metal::device_model(device));
  return explain_cpu(problem, device);
}

std::string describe_config(const std::string& op, const std::string& device, int64_t M, int64_t N,
                            int64_t K, int64_t desc, const std::string& dtype, int64_t flags) {
  const Problem problem = make_problem(op, M, N, K, desc, dtype, flags);
  if (M == 0) return {};
  if (is_metal(device)) {
    return to_string(
        metal::select(problem, metal_tile4(N, K, problem.desc), metal::device_model(device)));
  }
  if (!is_cuda(device)) return {};
  return to_string(
      cuda::select(problem, cuda_tile64(N, K, problem.desc), cuda::device_model(device)));
}

int64_t workspace_size(const std::string& op, int64_t M, int64_t N, int64_t K, int64_t desc,
                       const std::string& device) {
  LOWBIT_CHECK(op == "gemm_out" || op == "gemm_a8_out" || op == "gemm" || op == "gemm_a8", "op='",
               op, "' takes no workspace; gemm_out and gemm_a8_out do");
  LOWBIT_CHECK(M >= 0, "M=", M, " is negative");
  const Desc d = decode_desc(desc);
  if (d.layout == Layout::kCudaTile64)
    return cuda::workspace_size(parse_op(op), M, N, K, d, device);
  const bool reads =
      d.layout == Layout::kMetalTile4 ? is_metal(device) : device.rfind("cpu", 0) == 0;
  LOWBIT_CHECK(device.empty() || reads, "device='", device, "' does not read layout ",
               name_of(d.layout));
  if (d.layout == Layout::kMetalTile4) return 0;  // its kernels need none
  return cpu_workspace_size(M, N, K, d);
}

}  // namespace lowbit
