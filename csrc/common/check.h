// Host-side checks: one macro, one exception type, messages that print values.
//
// The text reaches Python unchanged (RuntimeError from an op, ValueError from `_C`), so it never carries a file
// or a line. Checks run before any work; nothing may throw inside a parallel region.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

// Marks the few functions of liblowbit_ops that `_C` calls; everything else is hidden.
#define LOWBIT_API __attribute__((visibility("default")))

namespace lowbit {

// A RuntimeError where torch translates it (ops), a ValueError where `_C` does.
class LOWBIT_API Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

template <class... Args>
std::string concat(const Args&... args) {
  std::ostringstream out;
  (out << ... << args);
  return out.str();
}

template <class... Args>
[[noreturn]] void fail(const Args&... args) {
  throw Error(concat(args...));
}

}  // namespace lowbit

#define LOWBIT_CHECK(condition, ...)         \
  do {                                       \
    if (__builtin_expect(!(condition), 0)) { \
      ::lowbit::fail(__VA_ARGS__);           \
    }                                        \
  } while (false)
