// Everything one ISA provides. Included after V and codec-inl.h.
#include "cpu/kernels/epilogue-inl.h"
#include "cpu/kernels/gemm_dot-inl.h"
#if !defined(LOWBIT_NO_STREAM)
#include "cpu/kernels/gemm_stream-inl.h"
#endif
#include "cpu/kernels/panel-inl.h"
// clang-format off: each needs what stands above it
#include "cpu/kernels/gemm_panel-inl.h"
#include "cpu/kernels/grad_input-inl.h"
#include "cpu/kernels/rows-inl.h"
#define LOWBIT_HD
#define LOWBIT_UNROLL _Pragma("GCC unroll 16")
#include "quantize/rules-inl.h"
#include "cpu/kernels/quantize-inl.h"
#include "cpu/kernels/activation-inl.h"
#undef LOWBIT_HD
#undef LOWBIT_UNROLL
// clang-format on

#if defined(LOWBIT_NO_STREAM)
#define LOWBIT_STREAM nullptr
#else
#define LOWBIT_STREAM gemm_stream
#endif

static const IsaKernels kKernels = {
    LOWBIT_ISA_NAME, LOWBIT_STREAM,     gemm_panel, nullptr,        gemm_dot,
    grad_input,      load_rows,         store_row,  quantize_group, quantize_activation_row,
    dequantize_row,  2 * V::kStreamRows};
