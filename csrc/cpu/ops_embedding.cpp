// embedding on the CPU: rows of a packed weight, decoded one by one.

#include <vector>

#include "common/op_checks.h"
#include "cpu/isa.h"
#include "cpu/kernels/general.h"
#include "cpu/scratch.h"
#include "cpu/weight.h"
#include "op_namespace.h"

namespace lowbit {
namespace {

// Reads an index of either dtype that torch's embeddings take.
struct Indices {
  const void* data;
  bool wide;
  int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

Indices check_indices(const char* op, const Tensor& indices, int64_t count, int64_t N) {
  check_place(op, "indices", indices, cpu_place());
  const ScalarType type = indices.scalar_type();
  LOWBIT_CHECK(type == ScalarType::Long || type == ScalarType::Int, op, ": indices are ",
               dtype_name(type), ", expected int64 or int32");
  const Indices found{indices.const_data_ptr(), type == ScalarType::Long};
  for (int64_t i = 0; i < count; ++i) {
    LOWBIT_CHECK(found[i] >= 0 && found[i] < N, op, ": index ", found[i], " at position ", i,
                 " is not a row of a weight of N=", N);
  }
  return found;
}

// What a thread needs to decode a row.
class RowDecoder {
 public:
  explicit RowDecoder(const PackedWeight& w)
      : w_(w),
        codes_(static_cast<size_t>(w.view.K_padded)),
        values_(static_cast<size_t>(w.view.K)),
        scales_(static_cast<size_t>(w.view.groups)),
        zeros_(scales_.size()),
        original_(w.perm != nullptr ? values_.size() : 0) {}

  void operator()(int64_t n, Element dtype, uint8_t* out) {
    const WeightView& v = w_.view;
    row_codes(v, n, codes_.data());
    row_groups(v, n, scales_.data(), zeros_.data());
    const DequantizeJob job{codes_.data(), scales_.data(), zeros_.data(),
                            v.K,           v.group_size,   v.zero_kind == ZeroKind::kOffset,
                            v.code,        values_.data()};
    const IsaKernels& isa = kernels();
    isa.dequantize_row(job);
    const float* row = values_.data();
    if (w_.perm != nullptr) {
      for (int64_t k = 0; k < v.K; ++k)
        original_[static_cast<size_t>(w_.perm[k])] = values_[static_cast<size_t>(k)];
      row = original_.data();
    }
    isa.store_row(row, v.K, dtype, out);
  }

 private:
  const PackedWeight& w_;
  std::vector<uint8_t> codes_;
  std::vector<float> values_, scales_, zeros_, original_;
};

Tensor embedding(const Tensor& indices, const Tensor& w, int64_t N, int64_t K, int64_t desc,
                 ScalarType out_dtype) {
  const char* op = "lowbit::embedding";
  const PackedWeight weight(op, w, N, K, desc);
  const Element element = float_element(op, "out_dtype", out_dtype);
  const Tensor flat = indices.is_contiguous() ? indices : torch::stable::contiguous(indices);
  const int64_t count = flat.numel();
  const Indices rows = check_indices(op, flat, count, N);
  Shape shape(static_cast<size_t>(indices.dim()) + 1);
  for (int64_t d = 0; d < indices.dim(); ++d) shape[static_cast<size_t>(d)] = indices.size(d);
  shape[static_cast<size_t>(indices.dim())] = K;
  Tensor out = empty_on(cpu_place(), shape, out_dtype);
  uint8_t* to = data_of<uint8_t>(out);
  const int64_t row_bytes = K * (element == Element::kFloat32 ? 4 : 2);
  parallel_items(count, 2 * K, [&](int64_t begin, int64_t end) {
    RowDecoder decode(weight);
    for (int64_t i = begin; i < end; ++i) decode(rows[i], element, to + i * row_bytes);
  });
  return out;
}

}  // namespace

LOWBIT_IMPL(CPU, m) { m.impl("embedding", TORCH_BOX(&embedding)); }

}  // namespace lowbit
