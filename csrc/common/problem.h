// What selection looks at, and what it answers: plain data, the same for every backend.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/check.h"
#include "common/desc.h"

namespace lowbit {

enum class Op { kGemm, kGemmA8, kGradInput };

// No tensor, no device.
struct Problem {
  Op op = Op::kGemm;
  int64_t M = 1, N = 1, K = 1;
  Desc desc;
  Element x = Element::kBFloat16;
  bool grouped_x = false;  // gemm_a8: activation scales per 128 of K instead of per token
  int64_t flags = 0;
  bool x_aligned = true;  // CUDA: rows of x start on 16-byte boundaries; else they are copied first
  bool x_zeros = false;   // gemm_a8: activations have zeros
};

// Why a kernel does not take a problem. Selection itself only wants to know whether, and passes no string to fill.
class Why {
 public:
  explicit Why(std::string* text = nullptr) : text_(text) {}
  // Always true, so that a refusal is one line: `if (...) return why("M=", M, " exceeds ...");`
  template <class... Args>
  bool operator()(const Args&... args) const {
    if (text_ != nullptr) *text_ = concat(args...);
    return true;
  }

 private:
  std::string* text_;
};

struct KernelInfo {
  std::string backend, op, name, isa, takes;
  bool general;
};
struct Verdict {
  std::string kernel, reason;  // an empty reason: this one runs
};

const char* name_of(Op op);
Op parse_op(const std::string& op);             // "linear" is "gemm", "gemm_out" too, ...
Element parse_dtype(const std::string& dtype);  // "bfloat16", "int8", ...

}  // namespace lowbit
