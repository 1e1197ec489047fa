// What the op boundary of CUDA shares: where a call runs, packed weights, and the workspace.
//
// With LOWBIT_EMULATOR the same files make ops that run on CPU tensors, where the emulator (tests/emulator) executes the
// kernels: no stream, no device guard, device 0.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "common/op_checks.h"
#include "cuda/launchers.h"
#include "cuda/select.h"
#include "cuda/weight_params.h"
#include "op_namespace.h"
#include "packing/cuda_tile64.h"

#if defined(LOWBIT_EMULATOR)
#define LOWBIT_CUDA_KEY CPU
#else
#define LOWBIT_CUDA_KEY CUDA
#endif

namespace lowbit::cuda {

// The device is current and `stream` is torch's current one for as long as this lives. Throws Error, with the op's name,
// where `place` is no device that the kernels run on.
class Scope {
 public:
  Scope(const char* op, const Place& place);
  Scope(const Scope&) = delete;
  Scope& operator=(const Scope&) = delete;

  Stream stream() const { return stream_; }
  const DeviceInfo& device() const { return *device_; }

 private:
#if !defined(LOWBIT_EMULATOR)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  Stream stream_ = nullptr;
  const DeviceInfo* device_;
};

// Throws Error unless `place` is a CUDA device (the CPU, in the emulator).
void check_cuda(const char* op, const Place& place);

// A packed weight: geometry, and what kernels are given.
struct Weight {
  Desc desc;
  CudaTile64 tile;
  WeightParams params;

  // Checks `w` against (N, K, desc) and throws with both sides' values.
  Weight(const char* op, const Tensor& w, const Place& place, int64_t N, int64_t K,
         int64_t desc_bits);
};

// Canonical tensors of a shape without pointers; the caller fills in those that its kernel reads.
CanonicalParams canonical_params(const Desc& desc, const CanonicalShape& shape);

// Memory for one call, cut into the pieces that a Config names. The first kCounterBytes are counters: zero before and after
// every kernel, wherever the rest of an earlier call's pieces lay.
class Workspace {
 public:
  Workspace(const char* op, const Config& config, const OptionalTensor& given, const Place& place,
            Stream stream);

  uint32_t* counters() const { return reinterpret_cast<uint32_t*>(base_); }
  uint8_t* partials() const { return base_ + kCounterBytes; }
  uint8_t* prepared(const Config& config) const { return partials() + config.partial_bytes; }
  uint8_t* unordered(const Config& config) const {
    return prepared(config) + config.prepared_bytes;
  }

 private:
  Tensor own_;
  uint8_t* base_ = nullptr;
};

}  // namespace lowbit::cuda
