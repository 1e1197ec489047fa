// What the op boundary hands to a CPU kernel, and the table of functions each ISA provides.
//
// Plain data only: this header is compiled with every ISA's flags, and an inline function defined here could be
// merged by the linker into code that runs on an older CPU.
#pragma once

#include <cstdint>

#include "common/enums.h"

namespace lowbit {

// A packed weight in layout cpu_tile16 (packing/cpu_tile16.h), as kernels read it.
struct WeightView {
  const uint8_t* data;
  Format format;
  ZeroKind zero_kind;
  ScaleDtype scale_dtype;
  int scale_bytes, zero_bytes;
  int scales_per_group;  // 16, or 1 where a strip shares one scale
  int64_t N, K, K_padded;
  int64_t group_size, groups;
  int64_t kb, block_bytes;
  int64_t strip_bytes, scales_offset, zeros_offset;
  int bits;
  const float* code;             // [2^bits] of a code-book format, else null
  bool exact16;                  // FormatInfo::exact16
  const struct CpuTile16* tile;  // the whole geometry, for the general kernels

  // Scales, and offsets, are floats. Those that are not get expanded to floats before a kernel sees them (cpu/expanded.h):
  // what follows is for that.
  bool plain;
  struct Table {
    int64_t offset;  // from the start of a strip; 0: there is none
    int shift;       // row g >> shift is that of group g
  };
  ScaleDtype super_dtype;  // of these tables
  Table supers, super_zeros;
  const float* scale_code;  // [2^bits] values of scales
};

// The same weight with fp32 scales [groups][16], and offsets: wherever scales_offset and zeros_offset then point to.
WeightView with_float_scales(const WeightView& w);
// The offset with which kernels find `scales` as those of a strip.
int64_t float_scales_offset(const WeightView& w, int64_t strip, const float* scales);

// One row, one segment of K: x[k] = integer[k] * scale, exactly, but for the elements that are spilled.
struct SplitSegment {
  float scale;  // a power of two
  int32_t low,
      high;  // sums of the integers' digits: of the lower two planes, and of those above in units of 2^16
  float total;  // sum of integers * scale
};

struct Spilled {
  uint32_t k, group;
  float x;
};

// Rows of activations, prepared: zero from K to K_padded, gathered by perm.
struct Activations {
  int64_t M;
  int64_t stride;           // K_padded, in elements
  const float* values;      // fp32 [M, stride]
  const uint16_t* bfloats;  // bf16 bits [M, stride], for kernels that multiply bf16
  // Integer activations (gemm_a8): y = sum_g sum_k (xq - zero) * scale * w
  const int8_t* codes;   // [M, stride]
  const int32_t* sums;   // [M, segments]: sum of xq over each segment of K
  const float* scales;   // [M]
  const int32_t* zeros;  // [M], or null when symmetric
  int64_t segment,
      segments_per_group;  // int32 sums are exact over a segment; a group has one, or several if huge
  // Float activations split into int8 planes (kernels/split_rows-inl.h)
  int plane_count;  // digits of every integer
  const int8_t*
      planes;  // tiles of rows as rows_of_tile() cuts them, [K_padded / 4][rows][plane][4] each
  const SplitSegment* split;      // [M, segments]
  const Spilled* spilled;         // [M, stride], as many of each row as the next says
  const int32_t* spilled_counts;  // [M]
  // Tiles of 16 rows (kernels/amx.h), for kernels that multiply those; x is the sum of so many of them.
  const uint8_t* tiles;
  int tile_planes;
};

struct Output {
  void* data;  // row m, column n at data + (m * stride + n) * sizeof
  int64_t stride;
  Element dtype;
  const float* bias;  // [N], or null
};

struct GemmJob {
  WeightView w;
  Activations x;
  Output y;
};

// Rows of a float tensor to be converted, multiplied, gathered or padded.
struct RowSource {
  const void* data;
  Element dtype;
  int64_t stride;  // in elements
  int64_t K;
  const int32_t* perm;     // gather, or null
  const float* pre_scale;  // [K], or null
};

// Rows [row_begin, row_end) of fp32 x into planes: where they go is const in Activations, because kernels read it.
struct SplitJob {
  const float* values;  // [rows, stride]
  int64_t M, stride, group_size, groups, segment, segments_per_group;
  int plane_count;
  int8_t* planes;
  SplitSegment* split;
  Spilled* spilled;
  int32_t* spilled_counts;
};

struct GradJob {
  WeightView w;
  int64_t M;
  const float* dy;  // [M, N padded to 16]
  float* dx;        // [M, K_padded], columns in packed order
};

// One group of weights: the values that share a scale.
struct QuantizeJob {
  const float* values;      // [count]
  const float* importance;  // [count], or null: weights of the squared error
  int64_t count;
  Format format;
  ZeroKind zero_kind;
  ScaleDtype scale_dtype;
  float super_scale = 1.0f;  // scales are stored in units of this
  int bits;
  bool search;        // look for the scale with the least squared error
  float max;          // FormatInfo::max
  const float* code;  // [2^bits] of a code-book format, else null
  uint8_t* codes;     // [count], one code per byte
  uint8_t* scale;     // one, in scale_dtype
  uint8_t* zero;      // one zero or offset, or null
};

struct QuantizeActivationJob {
  const float* x;  // one row, fp32 [K], already multiplied by pre_scale
  int64_t K, group_size;
  Element format;
  bool symmetric;
  const float* static_scale;   // or null
  const int32_t* static_zero;  // or null
  void* codes;                 // [K]
  float* scales;               // [groups]
  int32_t* zeros;              // [1], or null
};

struct DequantizeJob {   // one row
  const uint8_t* codes;  // [K], one per byte
  const float* scales;   // [ceil(K / group_size)]
  const float* zeros;    // or offsets
  int64_t K, group_size;
  bool offsets;
  const float* code;  // of a code-book format, else null
  float* values;      // [K]
};

// gemm on rows split into int8 planes, where the ISA has dot products that make it worth while.
struct PlaneKernels {
  void (*gemm)(const GemmJob& job, int64_t strip_begin, int64_t strip_end);  // or null
  void (*split_rows)(const SplitJob& job, int64_t row_begin, int64_t row_end);
  int bits;              // of the widest codes
  int64_t rows_of_two;   // the largest M with two planes
  int64_t rows_of_four;  // the same with four
  bool every_m;          // whether two planes are fast enough at any M to be the one kernel for all
};

// Scales of a strip's groups [first, first + count) to fp32 [count][16], and offsets if `zeros` is not null.
using ExpandScales = void (*)(const WeightView& w, int64_t strip, int64_t first, int64_t count,
                              float* scales, float* zeros);

// Every function handles the whole range it is given on the calling thread, allocates nothing and throws nothing.
struct IsaKernels {
  const char* isa;
  void (*gemm_stream)(const GemmJob& job, int64_t strip_begin, int64_t strip_end);
  void (*gemm_panel)(const GemmJob& job, int64_t strip_begin, int64_t strip_end);
  void (*gemm_panel_bf16)(const GemmJob& job, int64_t strip_begin, int64_t strip_end);   // or null
  void (*gemm_stream_bf16)(const GemmJob& job, int64_t strip_begin, int64_t strip_end);  // or null
  void (*gemm_dot)(const GemmJob& job, int64_t strip_begin, int64_t strip_end);
  void (*grad_input)(const GradJob& job, int64_t piece_begin,
                     int64_t piece_end);  // pieces of 64 columns
  void (*load_rows)(const RowSource& from, int64_t row_begin, int64_t row_end, float* to,
                    int64_t to_stride);
  void (*store_row)(const float* from, int64_t count, Element dtype, void* to);
  void (*quantize_group)(const QuantizeJob& job);
  void (*quantize_activation_row)(const QuantizeActivationJob& job);
  void (*dequantize_row)(const DequantizeJob& job);
  ExpandScales expand_scales;
  PlaneKernels planes;
  // The largest M for gemm_stream: two passes over a strip, the second of them from cache.
  int64_t stream_rows;
  const struct AmxKernels* amx;  // kernels/amx.h, or null
};

const IsaKernels& kernels_portable();
#if defined(__x86_64__)
PlaneKernels planes_avx2();
PlaneKernels planes_avx512();
PlaneKernels planes_avx512vnni();
const IsaKernels& kernels_avx2();
const IsaKernels& kernels_avx512();
const IsaKernels& kernels_avx512vnni();
const IsaKernels& kernels_avx512bf16();
#elif defined(__aarch64__)
PlaneKernels planes_neondotprod();
PlaneKernels planes_neoni8mm();
const IsaKernels& kernels_neon();
const IsaKernels& kernels_neondotprod();
const IsaKernels& kernels_neoni8mm();
#endif

// Rows of x that one call of a gemm kernel may be given: it sizes the kernels' stack buffers.
enum : int64_t { kMaxRows = 128 };

// The same for gemm_planes, whose rows take 16 bytes of scratch per element.
enum : int64_t { kMaxPlaneRows = 32 };

// The longest piece of K over which gemm_planes sums integers.
enum : int64_t { kSplitSegment = 256 };

// Columns of dx in one piece of gemm_grad_input.
enum : int64_t { kGradColumns = 64 };

}  // namespace lowbit
