// Which instruction sets this CPU has and which one the kernels use.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "common/check.h"
#include "cpu/kernels/job.h"

namespace lowbit {

// Names of the levels this machine can run, best first; the last is "portable".
LOWBIT_API std::vector<std::string> isa_levels();

// The level in use: the best one, or what LOWBIT_ISA or set_isa asked for.
LOWBIT_API std::string current_isa();
LOWBIT_API void set_isa(const std::string& name);

// What the CPU and the operating system offer, by name.
LOWBIT_API std::vector<std::pair<std::string, bool>> cpu_features();

const IsaKernels& kernels();                             // of the level in use
const IsaKernels* kernels_of(const std::string& level);  // any level compiled in, or null

}  // namespace lowbit
