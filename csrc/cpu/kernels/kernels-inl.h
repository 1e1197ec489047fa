// Everything one ISA provides. Included after V and codec-inl.h.
// clang-format off: each needs what stands above it
#include "cpu/kernels/epilogue-inl.h"
#include "cpu/kernels/zeros-inl.h"
#include "cpu/kernels/segment-inl.h"
#include "cpu/kernels/prefetch-inl.h"
#include "cpu/kernels/gemm_dot-inl.h"
#if !defined(LOWBIT_NO_STREAM)
#include "cpu/kernels/gemm_stream-inl.h"
#endif
#include "cpu/kernels/expand-inl.h"
#include "cpu/kernels/panel-inl.h"
#include "cpu/kernels/gemm_panel-inl.h"
#include "cpu/kernels/grad_input-inl.h"
#include "cpu/kernels/rows-inl.h"
#define LOWBIT_HD
#define LOWBIT_UNROLL _Pragma("GCC unroll 16")
#include "quantize/native-inl.h"
#include "quantize/rules-inl.h"
#include "quantize/search-inl.h"
#include "cpu/kernels/quantize-inl.h"
#include "cpu/kernels/activation-inl.h"
#undef LOWBIT_HD
#undef LOWBIT_UNROLL
// clang-format on

static IsaKernels make_kernels() {
  IsaKernels table{};
  table.isa = LOWBIT_ISA_NAME;
#if !defined(LOWBIT_NO_STREAM)
  table.gemm_stream = gemm_stream;
  table.stream_rows = 2 * V::kStreamRows;
#endif
#if defined(LOWBIT_PLANES)
  table.planes = LOWBIT_PLANES();
#endif
  table.gemm_panel = gemm_panel;
  table.gemm_dot = gemm_dot;
  table.grad_input = grad_input;
  table.load_rows = load_rows;
  table.store_row = store_row;
  table.quantize_group = quantize_group;
  table.quantize_activation_row = quantize_activation_row;
  table.dequantize_row = dequantize_row;
  table.expand_scales = expand_scales;
  return table;
}

static const IsaKernels kKernels = make_kernels();
