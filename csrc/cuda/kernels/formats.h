// Which instantiations exist: all formats and both 16-bit types, or, for builds of the emulator that repeat every test
// under a sanitizer or a mutation, a format of one plane, of two and of bytes (which may have 128x128 blocks) in bf16.
#pragma once

#include <type_traits>

#include "common/enums.h"
#include "cuda/code_values.cuh"
#include "cuda/float16.cuh"
#include "cuda/runtime.h"

#if defined(LOWBIT_EMULATOR_ONE_FORMAT)
#define LOWBIT_FOR_INT34(X) X(Format::kInt3) X(Format::kInt4)
#define LOWBIT_FOR_INT256(X)
#define LOWBIT_FOR_BYTES(X) X(Format::kFp8E4m3)
#define LOWBIT_FOR_FP4_BOOKS(X)
#else
#define LOWBIT_FOR_INT34(X) X(Format::kInt3) X(Format::kInt4)
#define LOWBIT_FOR_INT256(X) X(Format::kInt2) X(Format::kInt5) X(Format::kInt6)
#define LOWBIT_FOR_BYTES(X) X(Format::kInt8) X(Format::kFp8E4m3) X(Format::kFp8E5m2)
#define LOWBIT_FOR_FP4_BOOKS(X) X(Format::kFp4E2m1) X(kBookCodec)
#endif

#define LOWBIT_FOR_EACH_FORMAT(X) \
  LOWBIT_FOR_INT34(X) LOWBIT_FOR_INT256(X) LOWBIT_FOR_BYTES(X) LOWBIT_FOR_FP4_BOOKS(X)

namespace lowbit::cuda {

// What launchers report, in CUDA's numbers, where this build has no kernel: cudaErrorInvalidDeviceFunction.
inline constexpr int kNotCompiled = 98;

// Calls run(Float16{}) or run(BFloat16{}).
template <class Run>
void with_type(const char* name, Element type, Run run) {
#if !defined(LOWBIT_EMULATOR_ONE_FORMAT)
  if (type == Element::kFloat16) return run(Float16{});
#endif
  if (type != Element::kBFloat16) check_launch(name, kNotCompiled);
  run(BFloat16{});
}

// Calls run(std::integral_constant<Format, codec_of(format)>{}).
template <class Run>
void with_format(const char* name, Format format, Run run) {
  switch (codec_of(format)) {
#define LOWBIT_CASE(known) \
  case known:              \
    return run(std::integral_constant<Format, known>{});
    LOWBIT_FOR_EACH_FORMAT(LOWBIT_CASE)
#undef LOWBIT_CASE
    default:
      check_launch(name, kNotCompiled);
  }
}

}  // namespace lowbit::cuda
