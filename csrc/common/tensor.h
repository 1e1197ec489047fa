// Between torch tensors and the plain pointers that kernels take: allocation, checks, element types, threads.
// Only the op boundary (cpu/ops_*.cpp) includes this; nothing else sees torch.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "common/check.h"
#include "common/desc.h"
#include "cpu/kernels/job.h"

namespace lowbit {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

const char* dtype_name(ScalarType dtype);
std::string shape_string(const Tensor& tensor);

// fp32, fp16 or bf16; anything else throws "<op>: <name> is <dtype>, expected float32, float16 or bfloat16".
Element float_element(const char* op, const char* name, const Tensor& tensor);
Element float_element(const char* op, const char* name, ScalarType dtype);
ScalarType scale_scalar_type(ScaleDtype dtype);

void check_cpu(const char* op, const char* name, const Tensor& tensor);
void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType dtype);
void check_shape(const char* op, const char* name, const Tensor& tensor,
                 const std::vector<int64_t>& shape);
// All of the above, and contiguous: tensors that are read as bytes.
void check_plain(const char* op, const char* name, const Tensor& tensor, ScalarType dtype,
                 const std::vector<int64_t>& shape);

// Uninitialised and contiguous, on the CPU. The C call costs half of torch::stable::new_empty.
Tensor empty_cpu(const std::vector<int64_t>& shape, ScalarType dtype);

// A tensor of shape [..., K] as a matrix of M rows: pointer, row stride, M. A copy is made (and kept) only when the
// leading dimensions cannot be walked with one stride.
struct Rows {
  Tensor keep;
  const uint8_t* data;
  int64_t M, K, stride;
};
Rows rows_of(const char* op, const char* name, const Tensor& tensor);

// The shape of `tensor` with its last dimension replaced.
std::vector<int64_t> with_last(const Tensor& tensor, int64_t last);

template <class T>
T* data_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}
template <class T>
const T* const_data_of(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

// Work in units of about one multiply-add; below this a thread costs more than it gains.
inline constexpr int64_t kGrainWork = int64_t{1} << 18;

// body(begin, end) over [0, count), where one item costs `work` units. Must not throw.
template <class Body>
void parallel_items(int64_t count, int64_t work, const Body& body) {
  const int64_t grain = work >= kGrainWork ? 1 : (kGrainWork + work - 1) / (work > 0 ? work : 1);
  if (count <= grain) {  // spares the call into libtorch
    if (count > 0) body(0, count);
    return;
  }
  torch::stable::parallel_for(0, count, grain, body);
}

// Memory for one call: the caller's workspace, a buffer the thread keeps (small), or the heap.
class Scratch {
 public:
  Scratch(int64_t bytes, const OptionalTensor& workspace, const char* op);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // The next piece, aligned to 64 bytes. The pieces together must fit `bytes` (each rounded up to 64).
  template <class T>
  T* take(int64_t count) {
    uint8_t* piece = next_;
    next_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return reinterpret_cast<T*>(piece);
  }

 private:
  uint8_t* next_;
  void* heap_ = nullptr;
  bool uses_thread_buffer_ = false;
};

}  // namespace lowbit
