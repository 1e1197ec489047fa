// Shaders on torch's Metal: compiled once per variant, found again in a table, encoded on torch's current MPS stream.
//
// Everything goes through torch's C interface (aoti_torch/c/shim_mps.h), in plain C++: the emulator implements the same functions
// on the CPU (tests/emulator/metal/shim.cpp). Or through a launcher (metal/launcher.h), where there is one.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim_mps.h>

#include <cstring>
#include <type_traits>

#include "common/tensor.h"
#include "metal/launcher.h"
#include "metal/params.h"
#include "metal/shaders.h"

namespace lowbit::metal {

// A kernel of a variant's source: `index` of those in the file, in the order of kernel_name's list.
struct Pipeline {
  Variant variant;
  int index;
};
inline constexpr int kKernelsPerShader = 8;

// What the source calls it: "stream_m4_int4_affine_bf16".
std::string kernel_name(const Pipeline& pipeline);

// One launch: words, then tensors, then run. Arguments take the next buffer each. Throws Error, with the op's name, where torch
// refuses; its C interface has written why to stderr then.
class Command {
 public:
  Command(const char* op, const Pipeline& pipeline);

  template <class Params>
  Command& params(const Params& params) {
    static_assert(std::is_trivially_copyable_v<Params> && sizeof(Params) % 8 == 0, "whole words");
    int64_t words[sizeof(Params) / 8];
    std::memcpy(words, &params, sizeof params);
    for (int64_t value : words) word(value);
    return *this;
  }
  Command& word(int64_t value);
  Command& tensor(const Tensor& tensor);
  // `absent` stands in where there is no tensor: every buffer is bound, and the kernel does not look at this one.
  Command& tensor(const OptionalTensor& tensor, const Tensor& absent);

  void run(uint32_t groups_x, uint32_t groups_y, int threads);

 private:
  static constexpr int kMost = 24;
  struct Argument {
    AtenTensorHandle tensor;  // null: the word
    int64_t word;
  };
  static void encode(AOTIMetalKernelFunctionHandle function, void* command) noexcept;
  void run_on_torch();
  void run_on(const Launcher& launcher);

  const char* op_;
  Pipeline pipeline_;
  Argument arguments_[kMost];
  int count_ = 0;
  uint64_t threads_[3], group_[3];
  AOTITorchError status_ = AOTI_TORCH_SUCCESS;
};

}  // namespace lowbit::metal
