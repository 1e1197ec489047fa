// Questions about kernels, answered for every backend without running one: `device` says which.
//
//   "cpu", "cpu:avx2"                      this machine's best instruction set, or that one
//   "sm_90", "sm_90:114", "cuda:sm_90"     a CUDA device of that compute capability (and number of multiprocessors)
//   "apple9", "apple9:40", "mps:apple9"    an Apple GPU of that family (and number of cores)
//   "mps", "mps:0"                         the default model of an Apple GPU
//   "cuda", "cuda:0"                       the default model of a CUDA device; Python puts a real one in its place
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/problem.h"

namespace lowbit {

// Of this machine, or all that are compiled in.
LOWBIT_API std::vector<KernelInfo> list_kernels(bool compiled);

// Every kernel of the op on that device, in order of preference, with why it was refused.
LOWBIT_API std::vector<Verdict> explain(const std::string& op, const std::string& device, int64_t M,
                                        int64_t N, int64_t K, int64_t desc,
                                        const std::string& dtype, int64_t flags);

// How the chosen kernel cuts its work, for people; empty on the CPU, which has nothing to choose.
LOWBIT_API std::string describe_config(const std::string& op, const std::string& device, int64_t M,
                                       int64_t N, int64_t K, int64_t desc, const std::string& dtype,
                                       int64_t flags);

// Bytes of a uint8 workspace tensor for op "gemm_out" or "gemm_a8_out". The layout in desc says which backend; for CUDA
// an empty device, and "cuda", mean enough for every device that has a model.
LOWBIT_API int64_t workspace_size(const std::string& op, int64_t M, int64_t N, int64_t K,
                                  int64_t desc, const std::string& device);

}  // namespace lowbit
