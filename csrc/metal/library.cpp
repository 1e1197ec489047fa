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

// ---- torch's C interface -----------------------------------------------------------------------------------------------

struct Interface {
#define LOWBIT_MEMBER(name) decltype(&aoti_torch_mps_##name) name;
  LOWBIT_METAL_INTERFACE(LOWBIT_MEMBER)
#undef LOWBIT_MEMBER
};

const Interface& torch_interface() {
#if defined(LOWBIT_EMULATOR)
#define LOWBIT_FIND(name) &aoti_torch_mps_##name,
#else
#define LOWBIT_FIND(name) \
  reinterpret_cast<decltype(&aoti_torch_mps_##name)>(torch_function("aoti_torch_mps_" #name)),
  // Python has found a launcher then, or op by op the reason is this.
  LOWBIT_CHECK(has_metal_interface(),
               "this torch lacks the C interface to Metal: lowbit runs there by "
               "torch.mps.compile_shader, from Python");
#endif
  static const Interface found{LOWBIT_METAL_INTERFACE(LOWBIT_FIND)};
#undef LOWBIT_FIND
  return found;
}

std::string key_of(const Variant& v) {
  return concat(name_of(v.shader), " ", static_cast<int>(v.format), " ",
                v.has_element ? static_cast<int>(v.element) : -1);
}

AOTIMetalShaderLibraryHandle library_of(const char* op, const Variant& v) {
  // Alive until the process ends: pipelines are in use as long.
  static auto* libraries = new std::map<std::string, AOTIMetalShaderLibraryHandle>;
  const std::string key = key_of(v);
  const auto found = libraries->find(key);
  if (found != libraries->end()) return found->second;
  AOTIMetalShaderLibraryHandle library = nullptr;
  LOWBIT_CHECK(
      torch_interface().create_shader_library(source_of(v).c_str(), &library) == AOTI_TORCH_SUCCESS,
      op, ": Metal's compiler refused the shader ", name_of(v.shader),
      "; torch has written why to stderr");
  libraries->emplace(key, library);
  return library;
}

constexpr int kFormats = 16, kElements = 3;  // as many as params.h has bits for
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
  LOWBIT_CHECK(
      torch_interface().get_kernel_function(library_of(op, p.variant), kernel_name(p).c_str(),
                                            &function) == AOTI_TORCH_SUCCESS,
      op, ": torch has no pipeline for the kernel ", kernel_name(p),
      " and has written why to stderr");
  slot.store(function, std::memory_order_release);
  return function;
}

// ---- a launcher --------------------------------------------------------------------------------------------------------

// The number that it gave a variant's source.
int64_t source_for(const char* op, const Launcher& launcher, const Variant& v) {
  static auto* sources = new std::map<std::pair<const Launcher*, std::string>, int64_t>;
  static std::mutex mutex;
  std::lock_guard<std::mutex> lock(mutex);
  int64_t& source = (*sources)[{&launcher, key_of(v)}];
  if (source == 0) {
    const char* error = "";
    source = launcher.compile(source_of(v).c_str(), &error);
    LOWBIT_CHECK(source != 0, op, ": Metal's compiler refused the shader ", name_of(v.shader), ": ",
                 error);
  }
  return source;
}

}  // namespace

std::string kernel_name(const Pipeline& p) {
  static const char* const rows[] = {"1", "2", "4", "8"};
  static const char* const packing[] = {"pack_codes",   "pack_table", "unpack_codes",
                                        "unpack_table", "clear_ends", "copy_ints"};
  static const char* const encoders[] = {"int",      "int_zeros", "float_zeros", "offsets",
                                         "fp8_e4m3", "fp8_e5m2",  "fp4_e2m1",    "book"};
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
    case Shader::kQuantize:
      return concat("quantize_", encoders[p.index]);
    case Shader::kQuantizeSearch:
      return concat("quantize_search_", encoders[p.index]);
    case Shader::kQuantizeActivation:
      return p.index == 0 ? "quantize_activation_1" : "quantize_activation_8";
    case Shader::kPrepareRows:
      return concat("prepare_rows", element_of(p));
  }
  fail("no such shader");
}

Command::Command(const char* op, const Pipeline& pipeline) : op_(op), pipeline_(pipeline) {}

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
  const Interface& torch = torch_interface();
  c.status_ = torch.start_encoding(function);
  for (int i = 0; i < c.count_ && c.status_ == AOTI_TORCH_SUCCESS; ++i) {
    const auto index = static_cast<unsigned>(i);
    c.status_ = c.arguments_[i].tensor != nullptr
                    ? torch.set_arg_tensor(function, index, c.arguments_[i].tensor)
                    : torch.set_arg_int(function, index, c.arguments_[i].word);
  }
  if (c.status_ == AOTI_TORCH_SUCCESS)
    c.status_ = torch.dispatch_array_with_group_size(function, c.threads_, 3, c.group_, 3);
}

void Command::run_on_torch() {
  const AOTIMetalKernelFunctionHandle function = function_of(op_, pipeline_);
  const AOTITorchError status = torch_interface().run_command_block(function, &encode, this);
  LOWBIT_CHECK(status == AOTI_TORCH_SUCCESS && status_ == AOTI_TORCH_SUCCESS, op_,
               ": torch could not start the kernel ", kernel_name(pipeline_),
               " and has written why to stderr");
}

void Command::run_on(const Launcher& launcher) {
  const int64_t source = source_for(op_, launcher, pipeline_.variant);
  void* tensors[kMost] = {};
  int64_t words[kMost] = {};
  for (int i = 0; i < count_; ++i) {
    words[i] = arguments_[i].word;
    if (arguments_[i].tensor == nullptr) continue;
    AtenTensorHandle copy = nullptr;
    LOWBIT_CHECK(aoti_torch_new_tensor_handle(arguments_[i].tensor, &copy) == AOTI_TORCH_SUCCESS,
                 op_, ": torch could not share a tensor");
    tensors[i] = copy;
  }
  const char* error = "";
  LOWBIT_CHECK(launcher.launch(source, kernel_name(pipeline_).c_str(), count_, tensors, words,
                               threads_, group_, &error) == 0,
               op_, ": torch could not start the kernel ", kernel_name(pipeline_), ": ", error);
}

void Command::run(uint32_t groups_x, uint32_t groups_y, int threads) {
  const auto width = static_cast<uint64_t>(threads);
  threads_[0] = groups_x * width;
  threads_[1] = groups_y;
  threads_[2] = group_[1] = group_[2] = 1;
  group_[0] = width;
  if (const Launcher* other = launcher())
    run_on(*other);
  else
    run_on_torch();
}

}  // namespace lowbit::metal
