// Every op, once, with its contract. python/lowbit/ops.py mirrors this file: wrapper, fake kernel and autograd per op,
// in the same order; docs/ops.md is its long form. A backend registers kernels for all of them (csrc/cpu, ...).
//
// Terms: W[N, K] weight, x[..., K] input, G = ceil(K / group_size). Canonical tensors are packed uint8
// [N, ceil(K * bits / 8)], scales [N, G] (or one per 128 x 128 block), zeros [N, G] (integer zeros as uint8, float zeros
// and offsets in the scales' dtype), perm int32 [K]. Scales of two levels have super_scales that they are multiplied by, and
// super_zeros that offsets are multiplied by (or, with a dynamic code book, one number added to every scale). `w` is one opaque uint8 tensor in the layout that `desc` names.
// `desc` is format, zeros, scales, scaling, perm, layout and group_size in one int (csrc/common/desc.h); `flags` are
// options (csrc/common/enums.h). An optional result that is absent comes as a tensor of no elements.

#include "op_namespace.h"

LOWBIT_LIBRARY(m) {
  // ---- canonical ----

  // Codes, scales and zeros of a float weight [N, K]. search: least squared error (weighted per column by importance)
  // instead of round-to-nearest; never worse on any group. super_scales fp32 [1]: the scale of all scales, for schemes
  // that have one; other scales of two levels, and blocks that run across rows, are read from files and never made.
  m.def(
      "quantize(Tensor weight, int desc, bool search, Tensor? importance, Tensor? "
      "super_scales=None) "
      "-> (Tensor packed, Tensor scales, Tensor zeros)");

  // W [N, K] in the original order of columns: computed in fp32, rounded once to out_dtype.
  m.def(
      "dequantize(Tensor packed, Tensor scales, Tensor? zeros, Tensor? perm, int N, int K, int "
      "desc, ScalarType out_dtype, Tensor? super_scales=None, Tensor? super_zeros=None) -> Tensor");
  m.def(
      "dequantize_out(Tensor packed, Tensor scales, Tensor? zeros, Tensor? perm, int N, int K, int "
      "desc, Tensor(a!) out, Tensor? super_scales=None, Tensor? super_zeros=None) -> ()");

  // To the kernel layout in desc, and its exact inverse.
  m.def(
      "pack(Tensor packed, Tensor scales, Tensor? zeros, Tensor? perm, int N, int K, int desc, "
      "Tensor? super_scales=None, Tensor? super_zeros=None) -> Tensor");
  m.def(
      "unpack(Tensor w, int N, int K, int desc) -> (Tensor packed, Tensor scales, Tensor zeros, "
      "Tensor perm, Tensor super_scales, Tensor super_zeros)");

  // Rows of W: out[..., K] = W[indices[...], :], computed in fp32, rounded once to out_dtype. w: of a kernel layout.
  m.def(
      "embedding(Tensor indices, Tensor w, int N, int K, int desc, ScalarType out_dtype) -> "
      "Tensor");

  // ---- hot ----

  // y[..., N] = x @ W.T + bias in x's dtype, summed in fp32. No autograd formula: it would double the cost of a call.
  m.def("gemm(Tensor x, Tensor w, Tensor? bias, int N, int K, int desc, int flags) -> Tensor");
  m.def(
      "gemm_out(Tensor x, Tensor w, Tensor? bias, int N, int K, int desc, int flags, Tensor(a!) "
      "out, Tensor? workspace) -> ()");

  // gemm with an autograd formula for x and bias (registered in Python).
  m.def("linear(Tensor x, Tensor w, Tensor? bias, int N, int K, int desc, int flags) -> Tensor");

  // dx[..., K] = dy[..., N] @ W, in dy's dtype.
  m.def("gemm_grad_input(Tensor dy, Tensor w, int N, int K, int desc, int flags) -> Tensor");

  // 8-bit activations: int8 per token (static or dynamic, symmetric or not) or float8_e4m3fn per token or per group of K.
  // x is multiplied by pre_scale[K] first. x ~ (xq - x_zeros) * x_scales.
  m.def(
      "quantize_activation(Tensor x, int format, int group_size, Tensor? scale, Tensor? zero, "
      "Tensor? pre_scale, bool symmetric) -> "
      "(Tensor xq, Tensor x_scales, Tensor x_zeros)");
  m.def(
      "quantize_activation_out(Tensor x, int format, int group_size, Tensor? scale, Tensor? zero, "
      "Tensor? pre_scale, bool symmetric, "
      "Tensor(a!) xq, Tensor(b!) x_scales, Tensor(c!)? x_zeros) -> ()");

  // y = ((xq - x_zeros) * x_scales) @ W.T + bias. int8 x integer formats is summed exactly in int32 over a
  // group, or over parts of it of 64 k or more (docs/numerics.md says which kernel does what).
  m.def(
      "gemm_a8(Tensor xq, Tensor x_scales, Tensor? x_zeros, Tensor w, Tensor? bias, int N, int K, "
      "int desc, int flags, "
      "ScalarType out_dtype) -> Tensor");
  m.def(
      "gemm_a8_out(Tensor xq, Tensor x_scales, Tensor? x_zeros, Tensor w, Tensor? bias, int N, int "
      "K, int desc, int flags, "
      "Tensor(a!) out, Tensor? workspace) -> ()");
}
