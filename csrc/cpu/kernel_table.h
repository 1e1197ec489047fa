// One row per CPU kernel: what it takes, and the function that runs it. Dispatch, explain(), tests and docs read it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/problem.h"
#include "cpu/kernels/job.h"
#include "packing/cpu_tile16.h"

namespace lowbit {

// What a kernel reads: fp32 rows, int8 codes with their sums, bf16 rows, rows split into int8 planes, or tiles of bf16 or
// of int8 with their sums.
enum class XForm { kFloats, kCodes, kBFloats, kPlanes, kTiles, kCodeTiles };

struct KernelRow {
  Op op;
  const char* name;
  bool general;       // takes everything; LOWBIT_STRICT=1 refuses to run it
  const char* takes;  // one line for people
  XForm x;            // how the rows of x are prepared for it
  // Whether the kernel cannot run the problem on that ISA, and why. Asked on every call, so it makes no string unless
  // `why` has a place for one.
  bool (*refuse)(const Problem& problem, const CpuTile16& tile, const IsaKernels& isa,
                 const Why& why);
  void (*gemm)(const IsaKernels& isa, const GemmJob& job, int64_t begin, int64_t end);
  void (*grad)(const IsaKernels& isa, const GradJob& job, int64_t begin, int64_t end);
};

LOWBIT_API const std::vector<KernelRow>& kernel_table();

inline bool reads_tiles(const KernelRow& row) {
  return row.x == XForm::kTiles || row.x == XForm::kCodeTiles;
}

// How many bf16 values add up to one of x, exactly: what kTiles splits it into.
int tile_planes(Element x);

// The first row that does not refuse. Rows stand in order of preference; the last of an op never refuses.
const KernelRow& select_kernel(const Problem& problem, const CpuTile16& tile,
                               const IsaKernels& isa);

// What lists and explanations ask of this backend (common/explain.h). `device` is "cpu" or "cpu:<isa>", the latter as if
// that were the machine's best. `compiled`: the kernels of every instruction set in this build, not only of this machine's.
std::vector<KernelInfo> cpu_kernels(bool compiled);
std::vector<Verdict> explain_cpu(const Problem& problem, const std::string& device);

}  // namespace lowbit
