#include "cpu/tensor.h"

#include <cstdlib>
#include <new>

namespace lowbit {
namespace {

int32_t shim_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return aoti_torch_dtype_float32();
    case ScalarType::Half:
      return aoti_torch_dtype_float16();
    case ScalarType::BFloat16:
      return aoti_torch_dtype_bfloat16();
    case ScalarType::Byte:
      return aoti_torch_dtype_uint8();
    case ScalarType::Char:
      return aoti_torch_dtype_int8();
    case ScalarType::Int:
      return aoti_torch_dtype_int32();
    case ScalarType::Float8_e4m3fn:
      return aoti_torch_dtype_float8_e4m3fn();
    default:
      fail("no tensor of dtype ", dtype_name(dtype), " is ever made here");
  }
}

std::string shape_string(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += concat(i == 0 ? "" : ", ", shape[i]);
  return text + "]";
}

std::vector<int64_t> sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

// Kept per thread so that a decode step allocates nothing; larger needs go to the heap and back.
constexpr int64_t kThreadBufferBytes = 1 << 20;

struct ThreadBuffer {
  uint8_t* data = nullptr;
  bool taken = false;  // an op called from inside another op's callback must not share it
  ~ThreadBuffer() { std::free(data); }
};
thread_local ThreadBuffer thread_buffer;

void* aligned(int64_t bytes) {
  void* memory = std::aligned_alloc(64, static_cast<size_t>((bytes + 63) / 64 * 64));
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace

const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Float8_e4m3fn:
      return "float8_e4m3fn";
    case ScalarType::Float8_e5m2:
      return "float8_e5m2";
    default:
      return torch::headeronly::toString(dtype);
  }
}

std::string shape_string(const Tensor& tensor) { return shape_string(sizes_of(tensor)); }

Element float_element(const char* op, const char* name, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return Element::kFloat32;
    case ScalarType::Half:
      return Element::kFloat16;
    case ScalarType::BFloat16:
      return Element::kBFloat16;
    default:
      fail(op, ": ", name, " is ", dtype_name(dtype), ", expected float32, float16 or bfloat16");
  }
}

Element float_element(const char* op, const char* name, const Tensor& tensor) {
  return float_element(op, name, tensor.scalar_type());
}

ScalarType scale_scalar_type(ScaleDtype dtype) {
  return dtype == ScaleDtype::kFloat32   ? ScalarType::Float
         : dtype == ScaleDtype::kFloat16 ? ScalarType::Half
                                         : ScalarType::BFloat16;
}

void check_cpu(const char* op, const char* name, const Tensor& tensor) {
  LOWBIT_CHECK(tensor.is_cpu(), op, ": ", name,
               " is not on the CPU while another argument is; move all arguments to one device");
}

void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType dtype) {
  const ScalarType found = tensor.scalar_type();
  LOWBIT_CHECK(found == dtype, op, ": ", name, " is ", dtype_name(found), ", expected ",
               dtype_name(dtype));
}

void check_shape(const char* op, const char* name, const Tensor& tensor,
                 const std::vector<int64_t>& shape) {
  const auto sizes = tensor.sizes();
  bool same = sizes.size() == shape.size();
  for (size_t i = 0; same && i < shape.size(); ++i) same = sizes[i] == shape[i];
  LOWBIT_CHECK(same, op, ": ", name, " has shape ", shape_string(tensor), ", expected ",
               shape_string(shape));
}

void check_plain(const char* op, const char* name, const Tensor& tensor, ScalarType dtype,
                 const std::vector<int64_t>& shape) {
  check_cpu(op, name, tensor);
  check_dtype(op, name, tensor, dtype);
  check_shape(op, name, tensor, shape);
  LOWBIT_CHECK(tensor.is_contiguous(), op, ": ", name, " is not contiguous");
}

Tensor empty_cpu(const std::vector<int64_t>& shape, ScalarType dtype) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= shape[i] > 1 ? shape[i] : 1;
  }
  static const int32_t cpu = aoti_torch_device_type_cpu();
  AtenTensorHandle handle = nullptr;
  const AOTITorchError status =
      aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
                               shim_dtype(dtype), cpu, 0, &handle);
  LOWBIT_CHECK(status == AOTI_TORCH_SUCCESS, "could not allocate a ", dtype_name(dtype),
               " tensor of shape ", shape_string(shape));
  return Tensor(handle);
}

Rows rows_of(const char* op, const char* name, const Tensor& tensor) {
  const int64_t dims = tensor.dim();
  LOWBIT_CHECK(dims >= 1, op, ": ", name, " is a scalar, expected shape [..., K]");
  check_cpu(op, name, tensor);
  Rows rows{tensor, nullptr, 1, tensor.size(dims - 1), 0};
  bool walkable = tensor.is_contiguous();
  rows.stride = rows.K;
  if (!walkable && dims == 2 && (rows.K == 1 || tensor.stride(1) == 1)) {
    walkable = true;
    rows.stride = tensor.stride(0);
  }
  if (!walkable) rows.keep = torch::stable::contiguous(tensor);
  for (int64_t d = 0; d + 1 < dims; ++d) rows.M *= tensor.size(d);
  rows.data = static_cast<const uint8_t*>(rows.keep.const_data_ptr());
  return rows;
}

std::vector<int64_t> with_last(const Tensor& tensor, int64_t last) {
  std::vector<int64_t> shape = sizes_of(tensor);
  shape.back() = last;
  return shape;
}

Scratch::Scratch(int64_t bytes, const OptionalTensor& workspace, const char* op) {
  if (workspace.has_value()) {
    check_cpu(op, "workspace", *workspace);
    check_dtype(op, "workspace", *workspace, ScalarType::Byte);
    LOWBIT_CHECK(workspace->is_contiguous(), op, ": workspace is not contiguous");
    // 63 bytes more than the pieces, because a tensor need not start on a 64-byte boundary.
    LOWBIT_CHECK(workspace->numel() >= bytes + 63 || bytes == 0, op, ": workspace has ",
                 workspace->numel(), " bytes, expected at least ", bytes + 63);
    const auto address = reinterpret_cast<uintptr_t>(workspace->mutable_data_ptr());
    next_ = reinterpret_cast<uint8_t*>((address + 63) / 64 * 64);
  } else if (bytes <= kThreadBufferBytes && !thread_buffer.taken) {
    if (thread_buffer.data == nullptr)
      thread_buffer.data = static_cast<uint8_t*>(aligned(kThreadBufferBytes));
    thread_buffer.taken = uses_thread_buffer_ = true;
    next_ = thread_buffer.data;
  } else {
    heap_ = aligned(bytes > 0 ? bytes : 64);
    next_ = static_cast<uint8_t*>(heap_);
  }
}

Scratch::~Scratch() {
  if (uses_thread_buffer_) thread_buffer.taken = false;
  std::free(heap_);
}

}  // namespace lowbit
