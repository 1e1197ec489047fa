#include "common/strict.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace lowbit {
namespace {

std::atomic<int> setting{-1};

}  // namespace

bool strict() {
  int now = setting.load(std::memory_order_relaxed);
  if (now < 0) {
    const char* value = std::getenv("LOWBIT_STRICT");
    now = value != nullptr && *value != '\0' && std::strcmp(value, "0") != 0;
    setting.store(now, std::memory_order_relaxed);
  }
  return now != 0;
}

void set_strict(bool on) { setting.store(on, std::memory_order_relaxed); }

}  // namespace lowbit
