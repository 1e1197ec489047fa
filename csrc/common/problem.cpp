#include "common/problem.h"

namespace lowbit {

const char* name_of(Op op) {
  static const char* const names[] = {"gemm", "gemm_a8", "gemm_grad_input"};
  return names[static_cast<int>(op)];
}

Op parse_op(const std::string& op) {
  if (op == "gemm" || op == "linear" || op == "gemm_out") return Op::kGemm;
  if (op == "gemm_a8" || op == "gemm_a8_out") return Op::kGemmA8;
  if (op == "gemm_grad_input") return Op::kGradInput;
  fail("op='", op, "' has no kernel table; expected gemm, linear, gemm_a8 or gemm_grad_input");
}

Element parse_dtype(const std::string& dtype) {
  if (dtype == "float32") return Element::kFloat32;
  if (dtype == "float16") return Element::kFloat16;
  if (dtype == "bfloat16") return Element::kBFloat16;
  if (dtype == "int8") return Element::kInt8;
  if (dtype == "float8_e4m3fn") return Element::kFp8E4m3;
  fail("dtype='", dtype, "' is not one of float32, float16, bfloat16, int8, float8_e4m3fn");
}

}  // namespace lowbit
