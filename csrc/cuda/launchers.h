// Every kernel that the op boundary can start, by plain function. Implemented in csrc/cuda/kernels/*.cu, one file (or one
// file per group of formats) each. None allocates or waits; all throw Error when a launch is refused.
#pragma once

#include <cstdint>

#include "cuda/params.h"
#include "cuda/runtime.h"

namespace lowbit::cuda {

// ---- canonical tensors (packing/canonical.h) ---------------------------------------------------------------------------

struct CanonicalParams {
  const uint8_t* packed;
  const void* scales;
  const void* zeros;         // uint8 zeros, float zeros or offsets; or null
  const float* super_scale;  // of all scales; or null
  const int32_t* perm;       // or null
  int64_t N, K, row_bytes, group_size, groups;
  Format format;
  int32_t bits;
  ZeroKind zero_kind;
  ScaleDtype scale_dtype;
  bool blocks128;  // scales[ceil(N/128), ceil(K/128)]
};

// W[N, K] in `type`, columns in the original order.
void launch_dequantize(const CanonicalParams& from, void* to, Element type, Stream stream);

// Canonical -> cuda_tile64, and back. `w.data` is written by the first.
void launch_pack(const CanonicalParams& from, const WeightParams& w, uint8_t* to, Stream stream);
struct CanonicalOut {
  uint8_t* packed;
  void* scales;
  void* zeros;
  float* super_scale;
  int32_t* perm;
};
void launch_unpack(const WeightParams& w, const CanonicalParams& shape, const CanonicalOut& to,
                   Stream stream);

struct QuantizeParams {
  const void* weight;  // [N, K], row stride K
  Element type;
  const float* importance;  // [K], or null
  bool search;
  CanonicalParams shape;  // sizes and format; its pointers are not used
  CanonicalOut to;        // packed, scales, zeros
};
void launch_quantize(const QuantizeParams& p, Stream stream);

struct QuantizeActivationParams {
  const void* x;  // [M, K], row stride `stride`
  int64_t M, K, stride;
  Element type;        // of x
  Element format;      // kInt8 or kFp8E4m3
  int64_t group_size;  // never -1; K where one scale per token
  bool symmetric;
  const float* static_scale;   // one element, or null
  const int32_t* static_zero;  // one element, or null
  const float* pre_scale;      // [K], or null
  void* xq;                    // [M, K]
  float* x_scales;             // [M, ceil(K / group_size)]
  int32_t* x_zeros;            // [M], or null
};
void launch_quantize_activation(const QuantizeActivationParams& p, Stream stream);

// ---- GEMM --------------------------------------------------------------------------------------------------------------

// Rows of x as the GEMM kernels want them where they are not: gathered by perm, padded with zeros to `columns`, at a
// 16-byte aligned row stride. `to` is [M, columns] of x's element type. In order, every 16 bytes are as codec/bytes.cuh has
// them.
enum class RowOrder { kPlain, kBytes };
void launch_prepare_rows(const RowsParams& x, int64_t K, const int32_t* perm, RowOrder order,
                         void* to, int64_t columns, Stream stream);

// One function per row of the kernel table (select.h). `tile` is the row's index in kTiles (tiles.h).
void launch_hopper_stream(const GemmParams& p, int tile, Stream stream);  // for sm_90a
void launch_stream(const GemmParams& p, int tile, Stream stream);
void launch_hopper_matrix(const GemmParams& p, int tile, Stream stream);
void launch_matrix(const GemmParams& p, int tile, Stream stream);
void launch_hopper_a8_int(const GemmParams& p, int tile, Stream stream);
void launch_hopper_a8_fp8(const GemmParams& p, int tile, Stream stream);
void launch_a8_int(const GemmParams& p, int tile, Stream stream);
void launch_a8_fp8(const GemmParams& p, int tile, Stream stream);
void launch_a8_decode(const GemmParams& p, int tile, Stream stream);
// dx: x is dy [M, N], y is dx [M, K] in packed column order.
void launch_grad(const GemmParams& p, int tile, Stream stream);
// Everything else: gemm, gemm_a8 (x.scales set) and, with `grad`, gemm_grad_input. Gathers (scatters) by perm itself.
void launch_general(const GemmParams& p, Stream stream);
void launch_general_grad(const GemmParams& p, Stream stream);

// Columns of dx back into the original order: to[m, perm[k]] = from[m, k].
void launch_scatter_columns(const void* from, int64_t M, int64_t K, const int32_t* perm,
                            Element type, void* to, Stream stream);

}  // namespace lowbit::cuda
