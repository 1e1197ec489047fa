// The ops of lowbit from C++: quantize a weight, pack it, multiply, and hold the product against
// dequantize + matmul. Linking liblowbit_ops registers the ops; they are called by name, through
// PyTorch's dispatcher.
//
//   engine            exit status 0 when the products are right
//   engine damage     flips one bit of the packed weight first: the check fails, exit status 1

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <optional>
#include <tuple>

using at::Tensor;
using Absent = std::optional<Tensor>;  // an argument that may be absent

// As the schemas in docs/ops.md, to the letter: the compiler cannot compare the two.
using Quantize = std::tuple<Tensor, Tensor, Tensor>(const Tensor& weight, int64_t desc, bool search,
                                                    const Absent& importance,
                                                    const Absent& super_scales);
using Dequantize = Tensor(const Tensor& packed, const Tensor& scales, const Absent& zeros,
                          const Absent& perm, int64_t N, int64_t K, int64_t desc,
                          at::ScalarType out_dtype, const Absent& super_scales,
                          const Absent& super_zeros);
using Pack = Tensor(const Tensor& packed, const Tensor& scales, const Absent& zeros,
                    const Absent& perm, int64_t N, int64_t K, int64_t desc,
                    const Absent& super_scales, const Absent& super_zeros);
using Gemm = Tensor(const Tensor& x, const Tensor& w, const Absent& bias, int64_t N, int64_t K,
                    int64_t desc, int64_t flags);
using GemmOut = void(const Tensor& x, const Tensor& w, const Absent& bias, int64_t N, int64_t K,
                     int64_t desc, int64_t flags, Tensor& out, const Absent& workspace);

// Looks the op up by name, under a lock: once per op, not once per call.
template <class Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// int4 (3) with bf16 scales (2), one per 128 weights; the bits of desc are drawn in docs/format.md.
// The layout is 0 for canonical tensors; for packed ones that of the device, 1 on the CPU.
constexpr int64_t make_desc(int64_t layout) {
  return 3 | int64_t{2} << 12 | layout << 24 | int64_t{128} << 32;
}

// The bound of docs/numerics.md for each y: (K + 6) u sum_k |x_k| |w_nk|, and y's own rounding.
bool within_bound(const Tensor& y, const Tensor& x, const Tensor& W) {
  const double u = std::ldexp(1.0, -24);
  const Tensor x64 = x.to(at::kDouble), W64 = W.to(at::kDouble);
  const Tensor exact = at::matmul(x64, W64.t());
  const Tensor size = at::matmul(x64.abs(), W64.abs().t());
  const Tensor bound = size * ((static_cast<double>(W.size(1)) + 6) * u) + exact.abs() * u;
  const Tensor part = (y.to(at::kDouble) - exact).abs() / bound;
  std::printf("largest error: %.2g of the bound\n", part.max().item<double>());
  return part.le(1).all().item<bool>();  // false where there is a NaN
}

int main(int argc, char** argv) {
  const auto quantize = find_op<Quantize>("lowbit::quantize");
  const auto dequantize = find_op<Dequantize>("lowbit::dequantize");
  const auto pack = find_op<Pack>("lowbit::pack");
  const auto gemm = find_op<Gemm>("lowbit::gemm");
  const auto gemm_out = find_op<GemmOut>("lowbit::gemm_out");
  const Absent none;

  const int64_t M = 4, N = 192, K = 512, flags = 0;
  constexpr int64_t canonical = make_desc(0), desc = make_desc(1);
  at::manual_seed(0);

  // Once, when a weight is loaded. An engine reads packed and scales from a checkpoint.
  const auto [packed, scales, zeros] =
      quantize.call(at::randn({N, K}), canonical, false, none, none);
  const Tensor w = pack.call(packed, scales, none, none, N, K, desc, none, none);
  if (argc > 1 && std::strcmp(argv[1], "damage") == 0) w.data_ptr<uint8_t>()[0] ^= 8;

  // For every token.
  const Tensor x = at::randn({M, K});
  const Tensor y = gemm.call(x, w, none, N, K, desc, flags);
  Tensor out = at::empty({M, N});
  gemm_out.call(x, w, none, N, K, desc, flags, out, none);

  const Tensor W =
      dequantize.call(packed, scales, none, none, N, K, canonical, at::kFloat, none, none);
  const bool right = within_bound(y, x, W) && at::equal(y, out);
  std::printf("%s\n", right ? "right" : "WRONG");

  // What does not fit is refused before any work, with the values in the message.
  try {
    gemm.call(at::randn({M, K + 8}), w, none, N, K, desc, flags);
  } catch (const std::exception& error) {
    std::printf("refused: %s\n", error.what());
    return right ? 0 : 1;
  }
  return 1;
}
