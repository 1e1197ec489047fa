// One row per CPU kernel: what it takes, and the function that runs it. Dispatch, explain(), tests and docs read it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/check.h"
#include "common/desc.h"
#include "cpu/kernels/job.h"
#include "packing/cpu_tile16.h"

namespace lowbit {

enum class Op { kGemm, kGemmA8, kGradInput };

// What selection looks at. Pure data: no tensor, no device.
struct Problem {
  Op op = Op::kGemm;
  int64_t M = 1, N = 1, K = 1;
  Desc desc;
  Element x = Element::kBFloat16;
  bool grouped_x = false;  // gemm_a8: activation scales per 128 of K instead of per token
  int64_t flags = 0;
};

// What a kernel reads: fp32 rows, int8 codes with their sums, or bf16 rows.
enum class XForm { kFloats, kCodes, kBFloats };

struct KernelRow {
  Op op;
  const char* name;
  bool general;       // takes everything; LOWBIT_STRICT=1 refuses to run it
  const char* takes;  // one line for people
  XForm x;            // how the rows of x are prepared for it
  // Empty when the kernel can run the problem on that ISA, else why not.
  std::string (*refuse)(const Problem& problem, const CpuTile16& tile, const IsaKernels& isa);
  void (*gemm)(const IsaKernels& isa, const GemmJob& job, int64_t begin, int64_t end);
  void (*grad)(const IsaKernels& isa, const GradJob& job, int64_t begin, int64_t end);
};

const std::vector<KernelRow>& kernel_table();

// The first row that does not refuse. Rows stand in order of preference; the last of an op never refuses.
const KernelRow& select_kernel(const Problem& problem, const CpuTile16& tile,
                               const IsaKernels& isa);

struct KernelInfo {
  std::string op, name, isa, takes;
  bool general;
};
struct Verdict {
  std::string kernel, reason;  // an empty reason: this one runs
};

LOWBIT_API std::vector<KernelInfo> list_kernels();

// `device` is "cpu" or "cpu:<isa>", the latter as if that were the machine's best.
LOWBIT_API std::vector<Verdict> explain(const std::string& op, const std::string& device, int64_t M,
                                        int64_t N, int64_t K, int64_t desc,
                                        const std::string& dtype, int64_t flags);

}  // namespace lowbit
