// What tests choose before a launch, and what they may ask afterwards. The C interface at the end is for ctypes.
#pragma once

#include <cstdint>

namespace lowbit::emulator {

// In which order threads (lanes of a warp, warps of a block) and blocks run between the points at which they meet. Code
// that is right gives the same bits in all of them.
enum class Order : int { kForward = 0, kReverse = 1, kRandom = 2 };

struct Settings {
  Order threads = Order::kForward;
  Order blocks = Order::kForward;
  uint64_t seed = 0;
  int workers = 1;  // CPU threads that run blocks; with 1 everything is repeatable
  uint8_t poison =
      0xff;  // what shared memory holds before anything is written: NaN in every float format
  int capability = 90;
  int sm_count =
      4;  // fewer than any device: small problems are then cut as large ones are on a real one
  int64_t shared_per_block = 227 * 1024;
  int64_t shared_per_sm = 228 * 1024;
};
Settings& settings();

// Sets capability, SMs and the shared memory that such a device has (csrc/cuda/device_model.cpp).
void set_device(int capability, int sm_count);

}  // namespace lowbit::emulator

#define LOWBIT_EMULATOR_API extern "C" __attribute__((visibility("default")))

// Of threads and blocks alike: "forward", "reverse" or "random".
LOWBIT_EMULATOR_API void lowbit_emulator_set_order(const char* order);
LOWBIT_EMULATOR_API void lowbit_emulator_set_orders(int threads, int blocks, uint64_t seed);
LOWBIT_EMULATOR_API void lowbit_emulator_set_workers(int workers);
LOWBIT_EMULATOR_API void lowbit_emulator_set_poison(int byte);
LOWBIT_EMULATOR_API void lowbit_emulator_set_device(int capability, int sm_count);
LOWBIT_EMULATOR_API void lowbit_emulator_set_shared(int64_t per_block);
// One line per kernel that ran since the last reset: launches, address within the library (hexadecimal), name.
LOWBIT_EMULATOR_API const char* lowbit_emulator_launches();
LOWBIT_EMULATOR_API void lowbit_emulator_reset_launches();

// Of a mutated build (mutant.h): switches a mutant on (-1: none) and forgets what was reached; whether a place was reached.
LOWBIT_EMULATOR_API void lowbit_emulator_set_mutant(int place);
LOWBIT_EMULATOR_API int lowbit_emulator_reached(int place);
