#include "metal/library.h"

#include <atomic>
#include <map>
#include <mutex>

#include "formats/format_table.h"

namespace lowbit::metal {
namespace {

// The suffixes that say what a variant was compiled for.
std::string format_of(const Pipeline& p) { return concat("_", format_info(p.variant.format).name); }
std::string element_of(const Pipeline& p) { return concat("_", element_name(p.variant.element)); }

AOTIMetalShaderLibraryHandle library_of(const char* op, const Variant& v) {
  // Alive until the process ends: pipelines are in use as long.
  static auto* libraries = new std::map<std::string, AOTIMetalShaderLibraryHandle>;
  const std::string key = concat(name_of(v.shader), " ", static_cast<int>(v.format), " ",
                                 v.has_element ? static_cast<int>(v.element) : -1);
  const auto found = libraries->find(key);
  if (found != libraries->end()) return found->second;
  AOTIMetalShaderLibraryHandle library = nullptr;
  LOWBIT_CHECK(
      aoti_torch_mps_create_shader_library(source_of(v).c_str(), &library) == AOTI_TORCH_SUCCESS,
      op, ": Metal's compiler refused the shader ", name_of(v.shader),
      "; torch has written why to stderr");
  libraries->emplace(key, library);
  return library;
}

constexpr int kFormats = 11, kElements = 3;
using Cache = std::atomic<AOTIMetalKernelFunctionHandle>[kShaderCount][kFormats][kElements]
                                                        [kKernelsPerShader];

// A load in the common case; compiling, which takes a moment, once per pipeline and process.
AOTIMetalKernelFunctionHandle function_of(const char* op, const Pipeline& p) {
  static Cache cache;
  static std::mutex mutex;
  auto& slot = cache[static_cast<int>(p.variant.shader)][static_cast<int>(p.variant.format)]
                    [p.variant.has_element ? static_cast<int>(p.variant.element) : 0][p.index];
  if (const auto function = slot.load(std::memory_order_acquire)) return function;
  std::lock_guard<std::mutex> lock(mutex);
  if (const auto function = slot.load(std::memory_order_acquire)) return function;
  AOTIMetalKernelFunctionHandle function = nullptr;
  LOWBIT_CHECK(aoti_torch_mps_get_kernel_function(library_of(op, p.variant), kernel_name(p).c_str(),
                                                  &function) == AOTI_TORCH_SUCCESS,
               op, ": torch has no pipeline for the kernel ", kernel_name(p),
               " and has written why to stderr");
  slot.store(function, std::memory_order_release);
  return function;
}

}  // namespace

std::string kernel_name(const Pipeline& p) {
  static const char* const rows[] = {"1", "2", "4", "8"};
  static const char* const packing[] = {"pack_codes", "pack_scales", "unpack_codes",
                                        "unpack_scales", "copy_ints"};
  switch (p.variant.shader) {
    case Shader::kStream:
      return concat("stream_m", rows[p.index % 4], format_of(p), p.index < 4 ? "" : "_affine",
                    element_of(p));
    case Shader::kMatrix:
      return concat("matrix_m", p.index == 0 ? 32 : 64, format_of(p), element_of(p));
    case Shader::kMatrixExact:
      return concat("matrix_exact", format_of(p));
    case Shader::kGrad:
      return concat("grad", format_of(p), element_of(p));
    case Shader::kGeneral:
      return p.index == 0 ? "general" : "general_grad";
    case Shader::kDequantize:
      return concat("dequantize", element_of(p));
    case Shader::kPack:
      return packing[p.index];
    case Shader::kQuantizeActivation:
      return p.index == 0 ? "quantize_activation_1" : "quantize_activation_8";
    case Shader::kPrepareRows:
      return concat("prepare_rows", element_of(p));
  }
  fail("no such shader");
}

Command::Command(const char* op, const Pipeline& pipeline)
    : op_(op), pipeline_(pipeline), function_(function_of(op, pipeline)) {}

Command& Command::word(int64_t value) {
  LOWBIT_CHECK(count_ < kMost, op_, ": more than ", kMost, " arguments");
  arguments_[count_++] = {nullptr, value};
  return *this;
}

Command& Command::tensor(const Tensor& tensor) {
  LOWBIT_CHECK(count_ < kMost, op_, ": more than ", kMost, " arguments");
  arguments_[count_++] = {tensor.get(), 0};
  return *this;
}

Command& Command::tensor(const OptionalTensor& tensor, const Tensor& absent) {
  return this->tensor(tensor.has_value() ? *tensor : absent);
}

// Runs on the queue of torch's stream, where no exception may pass.
void Command::encode(AOTIMetalKernelFunctionHandle function, void* given) noexcept {
  Command& c = *static_cast<Command*>(given);
  c.status_ = aoti_torch_mps_start_encoding(function);
  for (int i = 0; i < c.count_ && c.status_ == AOTI_TORCH_SUCCESS; ++i) {
    const auto index = static_cast<unsigned>(i);
    c.status_ = c.arguments_[i].tensor != nullptr
                    ? aoti_torch_mps_set_arg_tensor(function, index, c.arguments_[i].tensor)
                    : aoti_torch_mps_set_arg_int(function, index, c.arguments_[i].word);
  }
  if (c.status_ == AOTI_TORCH_SUCCESS) {
    c.status_ = aoti_torch_mps_dispatch_array_with_group_size(function, c.threads_, 3, c.group_, 3);
  }
}

void Command::run(uint32_t groups_x, uint32_t groups_y, int threads) {
  const auto width = static_cast<uint64_t>(threads);
  threads_[0] = groups_x * width;
  threads_[1] = groups_y;
  threads_[2] = group_[1] = group_[2] = 1;
  group_[0] = width;
  const AOTITorchError status = aoti_torch_mps_run_command_block(function_, &encode, this);
  LOWBIT_CHECK(status == AOTI_TORCH_SUCCESS && status_ == AOTI_TORCH_SUCCESS, op_,
               ": torch could not start the kernel ", kernel_name(pipeline_),
               " and has written why to stderr");
}

}  // namespace lowbit::metal
