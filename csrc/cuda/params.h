// What kernels are given: plain structs, passed by value. Host and device agree on them here; no torch, no CUDA headers.
#pragma once

#include <cstdint>

#include "common/enums.h"
#include "cuda/books.h"

namespace lowbit::cuda {

constexpr int element_bytes(Element type) {
  return type == Element::kFloat32                                 ? 4
         : type == Element::kFloat16 || type == Element::kBFloat16 ? 2
                                                                   : 1;
}

// A packed weight (layout cuda_tile64, packing/cuda_tile64.h).
struct WeightParams {
  const uint8_t* data;
  int64_t strip_bytes;
  int32_t N, K;
  int32_t tiles, strips;
  int32_t tile_bytes, codes_bytes;
  int32_t group_size, groups;
  int32_t groups_per_tile;                  // 0: scales in the strip's table
  int32_t scale_row_bytes, zero_row_bytes;  // of 64 scales; 16 where one_scale
  int64_t scales_offset, zeros_offset;      // as in CudaTile64
  ScaleDtype scale_dtype;
  ZeroKind zero_kind;
  Format format;
  int32_t bits;
  bool one_scale;       // 128x128 blocks
  const int32_t* perm;  // or null

  // Scales of one byte or of two levels (packing/cuda_tile64.h): not `plain`. Of these, fast kernels make floats in shared
  // memory (expand.cuh): they are given a weight whose scale_dtype, scale_row_bytes and zero_row_bytes are those of the
  // floats (as_floats), and `stored` has what the weight's are.
  struct Table {
    int64_t offset;  // from the start of a strip; 0: none
    int32_t shift;   // row g >> shift is that of group g
    int32_t row_bytes;
  };
  struct Stored {
    ScaleDtype dtype;
    int32_t scale_row_bytes, zero_row_bytes;
  };
  bool plain;
  bool shared_super;  // one super scale for all
  ScaleDtype super_dtype;
  Table supers, super_zeros;
  Stored stored;

  BookBytes book;  // of formats that codec/book.cuh decodes, by the type that the kernel multiplies
  float levels[16];  // the same, for kernels that decode code by code
};

// Rows of activations. `data` is 16-byte aligned and `stride` (in elements) a multiple of 16 bytes, or `aligned` is false.
struct RowsParams {
  const void* data;
  int64_t stride;
  int32_t M;
  Element type;
  const float* scales;   // 8-bit activations: [M, scale_groups], else null
  int32_t scale_groups;  // 1, or ceil(K / 128)
  const int32_t* zeros;  // int8: [M], or null
};

struct OutParams {
  void* data;
  int64_t stride;  // elements
  Element type;
  const void* bias;  // [N], or null
  Element bias_type;
};

// How the work of a GEMM is cut: output tiles x steps of K, laid out tile by tile, and every block takes one contiguous
// range of steps, equal but for one step (schedule.h). A tile that several blocks share is summed in the order of K by
// whichever of them finishes last; the order of addition never depends on who that is.
//
//   tiles     0            1            2            3
//   steps     |............|............|............|............|
//   blocks    |  0     |   1    |   2    |   3    |   4    |   5  |
//
struct Schedule {
  int32_t tiles_n, tiles_m;  // output tiles; tile = tile_m * tiles_n + tile_n
  int32_t steps_per_tile;    // along K
  int32_t blocks;            // of the grid; at most `total`
  int64_t total;             // tiles_n * tiles_m * steps_per_tile, below 2^32
  uint32_t share, extra;     // total = blocks * share + extra
  uint32_t* counters;        // [tiles], zero before and after; null when no tile is shared
  float* partials;           // [2 * blocks][tile rows * tile columns]; null when no tile is shared
};

struct GemmParams {
  WeightParams w;
  RowsParams x;
  OutParams y;
  Schedule schedule;
  int32_t
      stages;  // of the ring in shared memory, for kernels that let the device decide (stages.h)
  int32_t strips, cluster;  // of the Hopper kernels: hopper_plan.h
  // Kernels of warpgroups (box_plan.h): tokens of a tile, and of the cluster's blocks those that differ in their rows.
  int32_t tokens, cluster_rows;
};

}  // namespace lowbit::cuda
