// Division and rounding that go up, for host and device.
#pragma once

#include <cstdint>

namespace lowbit {

constexpr int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return div_up(a, b) * b; }

}  // namespace lowbit
