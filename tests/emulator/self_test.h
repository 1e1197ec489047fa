// What the emulator's own tests share. test_emulator.py reads what they print.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/check.h"
#include "cuda/device.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

namespace lowbit::cuda {

// ---- planted mistakes: the same kernel right and wrong -----------------------------------------------------------------

struct Planted {
  const char* name;
  // Fills `out` with what the kernel computed.
  void (*run)(bool wrong, std::vector<float>& out);
};
extern const std::vector<Planted> kPlanted, kHopperPlanted, kWgmmaPlanted, kSharedPlanted;

// ---- checks against plain arithmetic; each throws Error with the first difference --------------------------------------

struct Check {
  const char* name;
  void (*run)();
};
extern const std::vector<Check> kExchangeChecks, kMatrixChecks, kNumberChecks, kWgmmaChecks;

struct Noise {
  uint64_t state = 1;
  uint32_t next() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state >> 32);
  }
};

}  // namespace lowbit::cuda
