// Whether this process may use AMX: the CPU must have it, and Linux must grant its state to the process.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace lowbit {

// Empty when tiles can be used, else why not. The first call asks the kernel for permission, once per process.
const std::string& amx_refusal();

// The CPUID bits, by name.
std::vector<std::pair<std::string, bool>> amx_features();

}  // namespace lowbit
