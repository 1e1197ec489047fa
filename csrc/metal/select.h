// Which shader serves a problem on an Apple GPU, and how its work is cut. Pure functions of the problem and the device, part of
// liblowbit_ops everywhere: they answer for any device, on machines without Metal too.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/problem.h"
#include "packing/metal_tile4.h"

namespace lowbit::metal {

// What selection must know of a GPU. `family` is Apple's: 7 is M1, 8 M2, 9 M3 and M4, 10 M5.
struct DeviceInfo {
  int family;
  int cores;
};

// "apple9", "apple9:40" (40 cores), either with "mps:" before it; "mps" and "mps:0" are kDefaultModel. Throws Error for other
// text, and for families before 7, which have no 8x8 matrices.
LOWBIT_API DeviceInfo device_model(const std::string& name);
inline constexpr const char* kDefaultModel = "apple7:8";

// From the name that the machine gives its chip, such as "Apple M3 Max". Names that are not known count as the first: what it
// runs, all run.
LOWBIT_API DeviceInfo chip_model(const std::string& brand);

// This machine's GPU, or what LOWBIT_METAL_MODEL says ("apple9:40"); the default model where there is none. Asked once.
LOWBIT_API const DeviceInfo& this_device();
LOWBIT_API std::string model_name(const DeviceInfo& device);  // "apple9:40"

enum class Kernel { kStream, kMatrix, kMatrixExact, kGrad, kGeneral, kGeneralGrad };

// One kernel in one tile shape, for one op.
struct KernelRow {
  Op op;
  Kernel kernel;
  const char* name;
  int tokens;    // rows of x per threadgroup
  bool general;  // takes everything; LOWBIT_STRICT=1 refuses to run it
  const char* takes;
  // Whether the kernel cannot run the problem at all; fills in why.
  bool (*refuse)(const KernelRow& row, const Problem& problem, const MetalTile4& weight,
                 const Why& why);
  // Whether it stands aside for a faster one.
  bool (*defer)(const KernelRow& row, const Problem& problem, const Why& why);

  int strips() const { return tokens <= 2 ? 2 : 1; }  // of a SIMD-group (stream)
};

// In order of preference for each op; the last of an op never refuses.
const std::vector<KernelRow>& kernel_table();

// What runs.
struct Config {
  const KernelRow* row;
  int split;      // SIMD-groups that share a strip's K (stream)
  bool prepares;  // rows of x are gathered or widened first
  uint32_t groups[3];
  int threads;  // of a threadgroup
};
LOWBIT_API std::string to_string(const Config& config);

// For M >= 1. Throws Error where a forced kernel refuses.
LOWBIT_API Config select(const Problem& problem, const MetalTile4& weight,
                         const DeviceInfo& device);

// As cuda/select.h has it: restricts selection to the row of this name, until called with "". Whether there is such a row.
LOWBIT_API bool force_kernel(const std::string& name);

// For common/explain.h.
std::vector<KernelInfo> kernels();
std::vector<Verdict> explain(const Problem& problem, const DeviceInfo& device);

}  // namespace lowbit::metal
