// Tile kernels for CPUs with AMX. The level takes everything else from avx512vnni (csrc/cpu/isa.cpp).
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>

#include "cpu/kernels/amx.h"

namespace lowbit {
namespace isa_amx {
// clang-format off: V first, then what is written against it, each after what it needs
#include "cpu/kernels/simd_avx512.h"
#include "cpu/kernels/codec-inl.h"
#include "cpu/kernels/epilogue-inl.h"
#include "cpu/kernels/zeros-inl.h"
#include "cpu/kernels/segment-inl.h"
#include "cpu/kernels/rows-inl.h"
#include "cpu/kernels/amx_panels-inl.h"
#include "cpu/kernels/decode_bf16-inl.h"
#include "cpu/kernels/amx_pack-inl.h"
#include "cpu/kernels/amx_tiles-inl.h"
#include "cpu/kernels/gemm_amx-inl.h"
// clang-format on

static const AmxKernels kTileKernels = {gemm_codes, gemm_weights, gemm_i8, pack_floats, pack_codes};
}  // namespace isa_amx

const AmxKernels& amx_kernels() { return isa_amx::kTileKernels; }

}  // namespace lowbit
#endif
