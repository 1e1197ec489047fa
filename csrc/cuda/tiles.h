// The shapes in which GEMM kernels cut their work: one row per kernel and shape, read by the kernels (as template
// arguments), by selection and by the tests. Host and device; no code that runs.
#pragma once

#include <cstdint>

namespace lowbit::cuda {

enum class Kernel : int {
  kHopperStream,
  kStream,
  kMatrix,
  kHopperMatrix,
  kHopperA8Int,
  kHopperA8Fp8,
  kA8Int,
  kA8Fp8,
  kA8Decode,
  kGrad,
  kGeneral,
  kGeneralGrad
};

struct Tile {
  Kernel kernel;
  const char* name;  // of the row in the kernel table
  int rows;          // output rows (N; for grad: columns of dx) per block: whole strips
  int tokens;  // M per block; the most, in kernels of warpgroups (fitted_tokens(), box_stages.h)
  int step;    // K per pipeline step
  int warps_n, warps_m, warps_k;  // how a block's warps divide rows, tokens and the steps of K
  int stages;                     // steps in flight
  int blocks_per_sm;              // that the registers allow

  // That multiply; kernels of warpgroups have one more warpgroup, which only copies.
  constexpr int warps() const { return warps_n * warps_m * warps_k; }
  constexpr int threads() const { return 32 * warps(); }
};

// Whether the kernel is one of sm_90a's warpgroups (kernels/hopper.cuh), whose steps are laid out as box_stages.h says.
constexpr bool has_warpgroups(Kernel kernel) {
  return kernel == Kernel::kHopperMatrix || kernel == Kernel::kHopperA8Int ||
         kernel == Kernel::kHopperA8Fp8;
}

// Whether it takes rows of bytes in the order of codec/bytes.cuh only: launch_prepare_rows() makes them.
constexpr bool orders_bytes(Kernel kernel) {
  return kernel == Kernel::kHopperA8Int || kernel == Kernel::kHopperA8Fp8;
}

// In order of preference within a kernel: the smallest M first.
inline constexpr Tile kTiles[] = {
    //  kernel            name            rows tokens step  n  m  k  stages blocks
    {Kernel::kHopperStream, "hopper_stream_m8", 64, 8, 128, 1, 1, 4, 24, 3},
    {Kernel::kHopperStream, "hopper_stream_m16", 64, 16, 128, 1, 1, 4, 24, 3},
    {Kernel::kStream, "stream_m8", 64, 8, 64, 1, 1, 8, 4, 2},
    {Kernel::kStream, "stream_m16", 64, 16, 64, 1, 1, 8, 4, 2},
    {Kernel::kHopperMatrix, "hopper_matrix_m64", 256, 64, 128, 8, 1, 1, 8, 1},
    {Kernel::kHopperMatrix, "hopper_matrix_m128", 256, 128, 128, 8, 1, 1, 6, 1},
    {Kernel::kHopperMatrix, "hopper_matrix_m256", 128, 256, 128, 8, 1, 1, 4, 1},
    {Kernel::kMatrix, "matrix_m32", 256, 32, 64, 4, 1, 2, 4, 1},
    {Kernel::kMatrix, "matrix_m64", 256, 64, 64, 4, 1, 2, 4, 1},
    {Kernel::kMatrix, "matrix_m128", 256, 128, 64, 4, 2, 1, 4, 1},
    {Kernel::kHopperA8Int, "hopper_a8_int_m64", 256, 64, 128, 8, 1, 1, 8, 1},
    {Kernel::kHopperA8Int, "hopper_a8_int_m128", 128, 128, 128, 8, 1, 1, 8, 1},
    {Kernel::kHopperA8Fp8, "hopper_a8_fp8_m64", 256, 64, 128, 8, 1, 1, 8, 1},
    {Kernel::kHopperA8Fp8, "hopper_a8_fp8_m128", 128, 128, 128, 8, 1, 1, 8, 1},
    {Kernel::kA8Int, "a8_int_m16", 64, 16, 64, 1, 1, 4, 4, 3},
    {Kernel::kA8Int, "a8_int_m64", 128, 64, 64, 2, 2, 1, 4, 2},
    {Kernel::kA8Int, "a8_int_m128", 128, 128, 64, 2, 4, 1, 4, 1},
    {Kernel::kA8Fp8, "a8_fp8_m16", 64, 16, 64, 1, 1, 4, 4, 3},
    {Kernel::kA8Fp8, "a8_fp8_m64", 128, 64, 64, 2, 2, 1, 4, 2},
    {Kernel::kA8Decode, "a8_decode_m64", 128, 64, 64, 2, 2, 1, 4, 2},
    {Kernel::kGrad, "grad_m64", 128, 64, 64, 4, 1, 1, 4, 2},
    {Kernel::kGeneral, "general", 1, 1, 1, 1, 1, 1, 1, 1},
    {Kernel::kGeneralGrad, "general", 1, 1, 1, 1, 1, 1, 1, 1},
};
inline constexpr int kTileCount = sizeof(kTiles) / sizeof(kTiles[0]);

// The row of a name, for templates that take its index.
constexpr int tile_index(const char* name) {
  for (int i = 0; i < kTileCount; ++i) {
    const char *a = kTiles[i].name, *b = name;
    for (; *a != 0 && *a == *b; ++a, ++b) {
    }
    if (*a == *b) return i;
  }
  return -1;
}

}  // namespace lowbit::cuda
