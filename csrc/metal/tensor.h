// What the op boundary of Metal shares: where a call runs, and packed weights.
//
// With LOWBIT_EMULATOR the same files make ops that run on CPU tensors, where the emulator executes the shaders.
#pragma once

#include "common/op_checks.h"
#include "metal/library.h"
#include "metal/select.h"
#include "op_namespace.h"
#include "packing/metal_tile4.h"

#if defined(LOWBIT_EMULATOR)
#define LOWBIT_METAL_KEY CPU
#else
#define LOWBIT_METAL_KEY MPS
#endif

namespace lowbit::metal {

// Throws Error unless `place` is an MPS device (the CPU, in the emulator).
void check_mps(const char* op, const Place& place);

// Whether a tensor starts at a multiple of `bytes`, as its buffer does. Data pointers of MPS tensors are no addresses.
bool starts_at(const Tensor& tensor, int64_t bytes);

// A packed weight.
struct Weight {
  Desc desc;
  MetalTile4 tile;
  Tensor data;

  // Checks `w` against (N, K, desc) and throws with both sides' values.
  Weight(const char* op, const Tensor& w, const Place& place, int64_t N, int64_t K,
         int64_t desc_bits);
};

// The fields that depend on the weight alone.
metal_params::Gemm gemm_params(const MetalTile4& tile, const Desc& desc);
metal_params::Canonical canonical_params(const Desc& desc, const CanonicalShape& shape);
int32_t rows_of_table(const GroupTable& table);  // a TableRows
// Rows of a matrix, which kernels count in 32 bits.
int32_t checked_int(const char* op, const char* what, int64_t value);

}  // namespace lowbit::metal
