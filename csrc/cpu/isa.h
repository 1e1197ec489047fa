// Which instruction sets this CPU has and which one the kernels use.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "common/check.h"
#include "cpu/kernels/amx.h"
#include "cpu/kernels/job.h"

namespace lowbit {

// Names of the levels this machine can run, best first; the last is "portable".
LOWBIT_API std::vector<std::string> isa_levels();

// All that are compiled in, best first.
std::vector<std::string> compiled_isa_levels();

// The level in use: the best one, or what LOWBIT_ISA or set_isa asked for.
LOWBIT_API std::string current_isa();
LOWBIT_API void set_isa(const std::string& name);

// Levels that this build has and this machine cannot run, with the reason; AMX is the one whose reason is not obvious.
LOWBIT_API std::vector<std::pair<std::string, std::string>> isa_refusals();

// One more level, with the tile kernels given on top of this machine's best AVX-512 one; null removes it. It runs when
// named and is never chosen by itself: tests register AMX's kernels on a software model of the tile instructions.
LOWBIT_API void set_extra_isa(const std::string& name, const AmxKernels* tiles);

// What the CPU and the operating system offer, by name.
LOWBIT_API std::vector<std::pair<std::string, bool>> cpu_features();

const IsaKernels& kernels();  // of the level in use
LOWBIT_API const IsaKernels* kernels_of(
    const std::string& level);  // any level compiled in, or null

}  // namespace lowbit
