// The checks of the ops' arguments, before any work: the same on every backend. `place` is where the call runs.
#pragma once

#include "common/tensor.h"

namespace lowbit {

// Whether values are looked at, which on a GPU would wait for it: entries of perm, a static scale and zero.
enum class Values { kChecked, kTrusted };

void check_flags(const char* op, int64_t flags);
void check_bias(const char* op, const OptionalTensor& bias, const Place& place, int64_t N);
// "x of shape [3, 100] has K=100 in its last dimension, the weight has K=128"
void check_columns(const char* op, const char* name, const Tensor& tensor, int64_t found,
                   const char* letter, int64_t expected);
// A contiguous float tensor of x's shape with `columns` in the last place.
void check_out(const char* op, const Tensor& out, const Place& place, const Tensor& x,
               int64_t columns);

// Activations of gemm_a8.
struct QuantizedRows {
  Rows rows;
  Element element;       // int8 or fp8
  const float* scales;   // [M, groups]
  int64_t groups;        // 1, or ceil(K / 128)
  const int32_t* zeros;  // [M], or null
};
QuantizedRows check_quantized(const char* op, const Tensor& xq, const Tensor& x_scales,
                              const OptionalTensor& x_zeros, const Place& place, int64_t K);

// Canonical tensors as pointers.
struct CanonicalTensors {
  Desc desc;
  CanonicalShape shape;
  CanonicalConst data;

  CanonicalTensors(const char* op, const Tensor& packed, const Tensor& scales,
                   const OptionalTensor& zeros, const OptionalTensor& perm,
                   const OptionalTensor& super_scales, const OptionalTensor& super_zeros,
                   const Place& place, Values values, int64_t N, int64_t K, int64_t desc_bits);
};

// Arguments of quantize. Throws where the quantizer does not know the scheme too.
struct QuantizeCall {
  Rows rows;  // of the weight
  Element element;
  Desc desc;
  CanonicalShape shape;
  bool has_super;  // a scale of all scales
};
QuantizeCall check_quantize(const char* op, const Tensor& weight, const Place& place,
                            int64_t desc_bits, const OptionalTensor& importance,
                            const OptionalTensor& super_scales);

// Arguments of quantize_activation.
struct ActivationCall {
  Rows rows;
  Element x = Element::kFloat32;    // of the input
  Element format = Element::kInt8;  // or fp8
  int64_t K = 0;
  int64_t group_size = 0;  // never -1
  int64_t groups = 1;
  bool symmetric = true;
  bool has_zeros = false;               // int8 and not symmetric
  const float* static_scale = nullptr;  // or null, as the others
  const int32_t* static_zero = nullptr;
  const float* pre_scale = nullptr;

  ScalarType code_type() const {
    return format == Element::kInt8 ? ScalarType::Char : ScalarType::Float8_e4m3fn;
  }
};
ActivationCall check_activation(const char* op, const Tensor& x, const Place& place, Values values,
                                int64_t format, int64_t group_size, const OptionalTensor& scale,
                                const OptionalTensor& zero, const OptionalTensor& pre_scale,
                                bool symmetric);
void check_activation_out(const char* op, const ActivationCall& call, const Tensor& x,
                          const Place& place, const Tensor& xq, const Tensor& x_scales,
                          const OptionalTensor& x_zeros);

}  // namespace lowbit
