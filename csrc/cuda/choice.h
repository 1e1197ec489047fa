// Kernels by name: the one that is forced, and those that a sweep has found to be the fastest. Host code, no torch.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/problem.h"
#include "cuda/hopper_plan.h"

namespace lowbit::cuda {

// A kernel and, for those of Hopper, perhaps the plan that it is to have.
struct Choice {
  const char* kernel = nullptr;  // the name in kTiles; null: none
  HopperWish wish;
};

// Of "stream_m8", or "hopper_stream_m8:2x4". Throws Error where there is no such kernel.
Choice parse_choice(const std::string& text);

// What force_kernel() or, before the first call of it, LOWBIT_KERNEL said.
Choice forced_choice();

// ---- what a sweep has measured -----------------------------------------------------------------------------------------

// One line of a table: "gemm half int4 sm_90:132 8192x8192 1..8 hopper_stream_m8:1x2 9.31 stream_m8 12.1".
struct Measured {
  Op op;
  Element x;  // kBFloat16 stands for both 16-bit types
  Format format;
  int capability, sm_count;
  int64_t N, K, first, last;  // M, both included
  Choice choice;
  double us;
  std::string runner_up;
  double runner_up_us;
};

// The row of the shape nearest to the problem's, by the ratios of N and of K, on devices of this capability; null where none
// is near, or nothing was measured. Valid until load_tuning() is called.
const Measured* measured_for(const Problem& problem, const DeviceInfo& device);
// The plan of a row holds for that very shape and device.
HopperWish measured_wish(const Measured& row, const Problem& problem, const DeviceInfo& device);
std::string to_string(const Measured& row);

// Replaces the table by that of a text, or, where it is empty, by the one this library was built with (measured.inc; or
// LOWBIT_TUNING, a file). Throws Error with the number of a line that is no row. Not while ops run.
LOWBIT_API void load_tuning(const std::string& text);

}  // namespace lowbit::cuda
