#include "common/tensor.h"

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
    case ScalarType::Float8_e8m0fnu:
      return torch_dtype_float8_e8m0fnu();
    default:
      fail("no tensor of dtype ", dtype_name(dtype), " is ever made here");
  }
}

std::string shape_string(const Shape& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += concat(i == 0 ? "" : ", ", shape[i]);
  return text + "]";
}

Shape sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return Shape(sizes.data(), sizes.size());
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
    case ScalarType::Float8_e8m0fnu:
      return "float8_e8m0fnu";
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
  switch (dtype) {
    case ScaleDtype::kFloat32:
      return ScalarType::Float;
    case ScaleDtype::kFloat16:
      return ScalarType::Half;
    case ScaleDtype::kBFloat16:
      return ScalarType::BFloat16;
    case ScaleDtype::kE8m0:
      return ScalarType::Float8_e8m0fnu;
    case ScaleDtype::kE4m3:
      return ScalarType::Float8_e4m3fn;
    default:
      return ScalarType::Byte;  // codes
  }
}

ScalarType table_scalar_type(const Desc& desc, int table) {
  if (table == kScaleTable) return scale_scalar_type(desc.scale_dtype);
  if (table != kZeroTable) return scale_scalar_type(desc.super_dtype);
  return desc.zero_kind == ZeroKind::kInt ? ScalarType::Byte : scale_scalar_type(desc.scale_dtype);
}

Shape table_shape(const GroupTable& table) {
  if (!table.present()) return {0};
  if (table.tensor_rows() == 0) return {table.tensor_columns()};
  return {table.tensor_rows(), table.tensor_columns()};
}

Tensor empty_table(const Place& place, const CanonicalShape& shape, const Desc& desc, int table) {
  const GroupTable& t = shape.tables[table];
  return empty_on(place, table_shape(t),
                  t.present() ? table_scalar_type(desc, table) : ScalarType::Byte);
}

Place cpu_place() {
  static const int32_t cpu = aoti_torch_device_type_cpu();
  return {cpu, 0, "another argument"};
}

Place place_of(const Tensor& tensor, const char* name) {
  Place place{0, 0, name};
  aoti_torch_get_device_type(tensor.get(), &place.type);
  // There is one CPU, whose index is -1 or 0.
  if (place.type != cpu_place().type) aoti_torch_get_device_index(tensor.get(), &place.index);
  return place;
}

std::string place_name(const Place& place) {
  if (place.type == aoti_torch_device_type_cpu()) return "cpu";
  if (place.type == aoti_torch_device_type_cuda()) return concat("cuda:", place.index);
  if (place.type == aoti_torch_device_type_mps()) return "mps";
  if (place.type == aoti_torch_device_type_meta()) return "meta";
  return concat("device type ", place.type, ", index ", place.index);
}

void check_place(const char* op, const char* name, const Tensor& tensor, const Place& place) {
  const Place found = place_of(tensor, name);
  LOWBIT_CHECK(found.type == place.type && found.index == place.index, op, ": ", name, " is on ",
               place_name(found), ", ", place.said_by, " is on ", place_name(place),
               ": move all arguments to one device");
}

void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType dtype) {
  const ScalarType found = tensor.scalar_type();
  LOWBIT_CHECK(found == dtype, op, ": ", name, " is ", dtype_name(found), ", expected ",
               dtype_name(dtype));
}

void check_shape(const char* op, const char* name, const Tensor& tensor, const Shape& shape) {
  const auto sizes = tensor.sizes();
  bool same = sizes.size() == shape.size();
  for (size_t i = 0; same && i < shape.size(); ++i) same = sizes[i] == shape[i];
  LOWBIT_CHECK(same, op, ": ", name, " has shape ", shape_string(tensor), ", expected ",
               shape_string(shape));
}

void check_plain(const char* op, const char* name, const Tensor& tensor, const Place& place,
                 ScalarType dtype, const Shape& shape) {
  check_place(op, name, tensor, place);
  check_dtype(op, name, tensor, dtype);
  check_shape(op, name, tensor, shape);
  LOWBIT_CHECK(tensor.is_contiguous(), op, ": ", name, " is not contiguous");
}

Tensor empty_on(const Place& place, const Shape& shape, ScalarType dtype) {
  Shape strides(shape.size());
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= shape[i] > 1 ? shape[i] : 1;
  }
  AtenTensorHandle handle = nullptr;
  const AOTITorchError status =
      aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
                               shim_dtype(dtype), place.type, place.index, &handle);
  LOWBIT_CHECK(status == AOTI_TORCH_SUCCESS, "could not allocate a ", dtype_name(dtype),
               " tensor of shape ", shape_string(shape));
  return Tensor(handle);
}

Rows rows_of(const char* op, const char* name, const Tensor& tensor, const Place& place) {
  const auto sizes = tensor.sizes();
  const size_t dims = sizes.size();
  LOWBIT_CHECK(dims >= 1, op, ": ", name, " is a scalar, expected shape [..., K]");
  check_place(op, name, tensor, place);
  Rows rows{tensor, nullptr, 1, sizes[dims - 1], 0};
  bool walkable = tensor.is_contiguous();
  rows.stride = rows.K;
  if (!walkable && dims == 2 && (rows.K == 1 || tensor.stride(1) == 1)) {
    walkable = true;
    rows.stride = tensor.stride(0);
  }
  if (!walkable) rows.keep = torch::stable::contiguous(tensor);
  for (size_t d = 0; d + 1 < dims; ++d) rows.M *= sizes[d];
  rows.data = static_cast<const uint8_t*>(rows.keep.const_data_ptr());
  return rows;
}

Shape with_last(const Tensor& tensor, int64_t last) {
  Shape shape = sizes_of(tensor);
  shape[shape.size() - 1] = last;
  return shape;
}

}  // namespace lowbit
