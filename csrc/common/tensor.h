// Between torch tensors and the plain pointers that kernels take: allocation, checks, element types. For all backends.
// Only the op boundary (csrc/<backend>/ops_*.cpp) includes this; nothing else sees torch. Each library compiles it for itself:
// no symbol with a torch type in its name leaves a library.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "common/check.h"
#include "common/desc.h"
#include "common/enums.h"
#include "packing/canonical.h"

namespace lowbit {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// A shape. Several are made in every call, so up to eight dimensions take no memory from the heap.
class Shape {
 public:
  explicit Shape(size_t dims) : dims_(dims), more_(dims > kInline ? dims : 0) {}
  Shape(std::initializer_list<int64_t> sizes) : Shape(sizes.begin(), sizes.size()) {}
  Shape(const int64_t* sizes, size_t dims) : Shape(dims) { std::copy_n(sizes, dims, data()); }

  size_t size() const { return dims_; }
  int64_t* data() { return more_.empty() ? few_ : more_.data(); }
  const int64_t* data() const { return more_.empty() ? few_ : more_.data(); }
  int64_t& operator[](size_t i) { return data()[i]; }
  int64_t operator[](size_t i) const { return data()[i]; }

 private:
  static constexpr size_t kInline = 8;
  size_t dims_;
  int64_t few_[kInline];
  std::vector<int64_t> more_;  // all of them, where they are more than eight
};

// The device that a call runs on, and the argument that said so: all others must be there too.
struct Place {
  int32_t type;   // a DeviceType of the C shim
  int32_t index;  // 0 on the CPU
  const char* said_by;
};
Place cpu_place();
Place place_of(const Tensor& tensor, const char* name);
std::string place_name(const Place& place);  // as torch writes it: "cpu", "cuda:0"

const char* dtype_name(ScalarType dtype);
std::string shape_string(const Tensor& tensor);

// fp32, fp16 or bf16; anything else throws "<op>: <name> is <dtype>, expected float32, float16 or bfloat16".
Element float_element(const char* op, const char* name, const Tensor& tensor);
Element float_element(const char* op, const char* name, ScalarType dtype);
ScalarType scale_scalar_type(ScaleDtype dtype);
// The tensors beside the codes, by kScaleTable and so on. An absent one is uint8 [0].
ScalarType table_scalar_type(const Desc& desc, int table);
Shape table_shape(const GroupTable& table);
Tensor empty_table(const Place& place, const CanonicalShape& shape, const Desc& desc, int table);

void check_place(const char* op, const char* name, const Tensor& tensor, const Place& place);
void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType dtype);
void check_shape(const char* op, const char* name, const Tensor& tensor, const Shape& shape);
// All of the above, and contiguous: tensors that are read as bytes.
void check_plain(const char* op, const char* name, const Tensor& tensor, const Place& place,
                 ScalarType dtype, const Shape& shape);

// Uninitialised and contiguous. The C call costs half of torch::stable::new_empty.
Tensor empty_on(const Place& place, const Shape& shape, ScalarType dtype);

// A tensor of shape [..., K] as a matrix of M rows: pointer, row stride, M. A copy is made (and kept) only when the
// leading dimensions cannot be walked with one stride.
struct Rows {
  Tensor keep;
  const uint8_t* data;
  int64_t M, K, stride;
};
Rows rows_of(const char* op, const char* name, const Tensor& tensor, const Place& place);

// The shape of `tensor` with its last dimension replaced.
Shape with_last(const Tensor& tensor, int64_t last);

template <class T>
T* data_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}
template <class T>
const T* const_data_of(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

}  // namespace lowbit
