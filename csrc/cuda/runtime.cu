// runtime.h on the CUDA runtime, which is linked statically.

#include "cuda/runtime.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <shared_mutex>
#include <utility>

#include "common/check.h"
#include "cuda/tensor_map.h"

namespace lowbit::cuda {
namespace {

constexpr int kMaxDevices = 64;

std::string version_text(int version) { return concat(version / 1000, ".", version % 1000 / 10); }

// What to say where the CUDA runtime only says that something is wrong with the installation.
std::string words_of(cudaError_t status) {
  switch (status) {
    case cudaErrorInsufficientDriver:
      return concat("the NVIDIA driver supports CUDA ", version_text(driver_version()),
                    " and lowbit was built with CUDA ", version_text(runtime_version()),
                    ": install a newer driver (lowbit info says which)");
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorUnsupportedPtxVersion:
      return concat("this build of lowbit has no code for the device (", cudaGetErrorString(status),
                    "; lowbit info lists what it was compiled for)");
    default:
      return cudaGetErrorString(status);
  }
}

void check(const char* what, cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next, innocent call would report it again
  fail(what, ": ", words_of(status));
}

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check("asking for a device's attributes", cudaDeviceGetAttribute(&value, name, device));
  return value;
}

DeviceInfo ask(int device) {
  DeviceInfo info{};
  info.capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
                    attribute(cudaDevAttrComputeCapabilityMinor, device);
  info.sm_count = attribute(cudaDevAttrMultiProcessorCount, device);
  info.shared_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  info.shared_per_sm = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
#if defined(LOWBIT_HOPPER)
  info.hopper = info.capability == 90;
#endif
  return info;
}

}  // namespace

const DeviceInfo& device_info(int device) {
  static DeviceInfo known[kMaxDevices];
  static std::once_flag asked[kMaxDevices];
  LOWBIT_CHECK(device >= 0 && device < kMaxDevices, "device index ", device, " is outside 0..",
               kMaxDevices - 1);
  std::call_once(asked[device], [device] { known[device] = ask(device); });
  return known[device];
}

bool dependent_launches() {
  static const bool allowed = [] {
    const char* value = std::getenv("LOWBIT_DEPENDENT_LAUNCH");
    return value == nullptr || std::strcmp(value, "0") != 0;
  }();
  return allowed;
}

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int runtime_version() { return CUDART_VERSION; }

void fill_zero(void* data, int64_t bytes, Stream stream) {
  check("filling with zeros",
        cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream)));
}

// The limit belongs to a kernel on one device, and setting it costs a call into the driver: it is only ever raised.
void allow_shared(const char* name, const void* kernel, int64_t bytes) {
  static std::shared_mutex mutex;
  static std::map<std::pair<const void*, int>, int64_t> allowed;
  int device = 0;
  check(name, cudaGetDevice(&device));
  const std::pair<const void*, int> key(kernel, device);
  {
    const std::shared_lock<std::shared_mutex> lock(mutex);
    const auto found = allowed.find(key);
    if (found != allowed.end() && found->second >= bytes) return;
  }
  const std::unique_lock<std::shared_mutex> lock(mutex);
  int64_t& limit = allowed[key];
  if (limit >= bytes) return;
  check(name, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(bytes)));
  limit = bytes;
}

// The driver's own function, asked for by name: this library links no libcuda.
using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

static EncodeTiled encode_tiled(const char* name) {
  static std::once_flag asked;
  static void* found = nullptr;
  std::call_once(asked, [] {
    cudaDriverEntryPointQueryResult result{};
    void* function = nullptr;
    const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                                12000, cudaEnableDefault, &result);
    if (status == cudaSuccess && result == cudaDriverEntryPointSuccess) found = function;
  });
  LOWBIT_CHECK(found != nullptr, name, ": the NVIDIA driver (for CUDA ",
               version_text(driver_version()), ") has no cuTensorMapEncodeTiled");
  return reinterpret_cast<EncodeTiled>(found);
}

TensorMap make_tensor_map(const char* name, const Matrix& m) {
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap), "an opaque one of the same size");
  TensorMap map{};
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(m.columns), static_cast<cuuint64_t>(m.rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(m.row_bytes)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(kBoxBytes / m.element_bytes),
                            static_cast<cuuint32_t>(m.box_rows)};
  const cuuint32_t every[] = {1, 1};
  // Integers of the elements' width: what the bits mean is no concern of a copy, and outside they are zeros.
  const CUtensorMapDataType type =
      m.element_bytes == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16;
  const CUresult status = encode_tiled(name)(
      reinterpret_cast<CUtensorMap*>(&map), type, 2, const_cast<void*>(m.data), sizes, strides, box,
      every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  LOWBIT_CHECK(status == CUDA_SUCCESS, name, ": the driver refuses a tensor map of ", m.rows, " x ",
               m.columns, " elements of ", m.element_bytes, " bytes, ", m.row_bytes,
               " bytes a row (status ", static_cast<int>(status), ")");
  return map;
}

void check_launch(const char* name, int status) { check(name, static_cast<cudaError_t>(status)); }

}  // namespace lowbit::cuda
