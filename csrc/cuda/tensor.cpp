#include "cuda/tensor.h"

#include <algorithm>

#include "formats/format_table.h"

namespace lowbit::cuda {

void check_cuda(const char* op, const Place& place) {
#if defined(LOWBIT_EMULATOR)
  const int32_t wanted = aoti_torch_device_type_cpu();
#else
  const int32_t wanted = aoti_torch_device_type_cuda();
#endif
  LOWBIT_CHECK(place.type == wanted, op, ": ", place.said_by, " is on ", place_name(place),
               " while another argument is on a GPU: move all arguments to one device");
}

namespace {

// Before the guard, which would take an index of another kind of device for one of its own.
int32_t checked_index(const char* op, const Place& place) {
  check_cuda(op, place);
  return place.index;
}

}  // namespace

#if defined(LOWBIT_EMULATOR)
Scope::Scope(const char* op, const Place& place) : device_(&device_info(checked_index(op, place))) {
  check_capability(op, *device_);
}
#else
Scope::Scope(const char* op, const Place& place)
    : guard_(checked_index(op, place)), device_(&device_info(place.index)) {
  check_capability(op, *device_);
  LOWBIT_CHECK(aoti_torch_get_current_cuda_stream(place.index, &stream_) == AOTI_TORCH_SUCCESS, op,
               ": torch has no current stream for ", place_name(place));
}
#endif

Weight::Weight(const char* op, const Tensor& w, const Place& place, int64_t N, int64_t K,
               int64_t desc_bits)
    : desc(decode_desc(desc_bits)), tile{}, params{} {
  LOWBIT_CHECK(desc.layout == Layout::kCudaTile64, op, ": the weight's layout is ",
               name_of(desc.layout), ", the CUDA kernels read ", name_of(Layout::kCudaTile64),
               "; pack it for this device");
  tile = cuda_tile64(N, K, desc);
  check_plain(op, "w", w, place, ScalarType::Byte, {tile.total_bytes});
  const uint8_t* data = const_data_of<uint8_t>(w);
  // torch's own tensors do; one that is sliced out of a larger buffer may not.
  LOWBIT_CHECK(reinterpret_cast<uintptr_t>(data) % 16 == 0, op,
               ": w must start on a 16-byte boundary");
  params = weight_params(tile, desc, data);
  if (has_book(desc.format)) std::copy_n(format_info(desc.format).code, 16, params.levels);
}

CanonicalParams canonical_params(const Desc& desc, const CanonicalShape& shape) {
  CanonicalParams p{};
  p.N = shape.N;
  p.K = shape.K;
  p.row_bytes = shape.row_bytes;
  p.group_size = shape.group_size;
  p.groups = shape.groups;
  p.format = desc.format;
  p.bits = shape.bits;
  p.zero_kind = desc.zero_kind;
  p.scale_dtype = desc.scale_dtype;
  p.blocks128 = desc.scaling == Scaling::kBlock128;
  return p;
}

Workspace::Workspace(const char* op, const Config& config, const OptionalTensor& given,
                     const Place& place, Stream stream)
    // No tensor without a handle: where nothing is allocated, `own_` is the caller's, or a handle to nothing.
    : own_(given.has_value() ? *given : Tensor()) {
  if (given.has_value()) {
    check_place(op, "workspace", *given, place);
    check_dtype(op, "workspace", *given, ScalarType::Byte);
    LOWBIT_CHECK(given->is_contiguous(), op, ": workspace is not contiguous");
  }
  if (config.workspace_bytes == 0) return;
  const int64_t bytes = config.workspace_bytes + kWorkspaceSlack;
  if (given.has_value()) {
    LOWBIT_CHECK(given->numel() >= bytes, op, ": workspace has ", given->numel(),
                 " bytes, expected at least ", bytes);
  } else {
    own_ = empty_on(place, {bytes}, ScalarType::Byte);
  }
  const auto address = reinterpret_cast<uintptr_t>(own_.mutable_data_ptr());
  base_ = reinterpret_cast<uint8_t*>((address + 255) / 256 * 256);
  if (!given.has_value() && config.shares_tiles) {
    const Schedule& s = config.schedule;
    fill_zero(base_, int64_t{s.tiles_n} * s.tiles_m * config.boxes.blocks() * 4, stream);
  }
}

}  // namespace lowbit::cuda
