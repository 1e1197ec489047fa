// Canonical tensors -> cuda_tile64. Every byte of the result is written, padding as zeros.
//
// A weight is packed once, so the kernel is simple rather than as fast as it could be: reads and 16-byte writes are
// coalesced, and what lies between is eight instructions per code.
#include "common/check.h"
#include "cuda/kernels/pack.cuh"

namespace lowbit::cuda {
namespace {

// This tile's bytes of each row into the stage; zeros past the row's end and past N.
template <int kBits>
__device__ void load_stage(const CanonicalParams& c, int64_t row0, int64_t column_byte,
                           bool aligned, uint8_t* stage) {
  using S = Stage<kBits>;
  constexpr int kVectors = kStripRows * kBits;  // 16 bytes each, kBits per row
  for (int i = static_cast<int>(threadIdx.x); i < kVectors; i += kPackThreads) {
    const int row = i / kBits, at = i % kBits * 16;
    uint32_t words[4] = {};
    if (inside(row0 + row, c.N)) {
      const uint8_t* from = c.packed + (row0 + row) * c.row_bytes + column_byte + at;
      const int64_t left = c.row_bytes - column_byte - at;
      if (aligned && inside(15, left)) {
        const uint4 v = *reinterpret_cast<const uint4*>(from);
        words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
      } else {
        for (int b = 0; b < 16; ++b) {
          if (inside(b, left)) words[b / 4] |= static_cast<uint32_t>(from[b]) << (8 * (b % 4));
        }
      }
    }
    uint32_t* to = reinterpret_cast<uint32_t*>(stage + row * S::kStride + at);
    for (int j = 0; j < 4; ++j) to[j] = words[j];
  }
}

// Codes (n, k) and (n, k + 1) of the tile, each in a half; k is even. Codes past K are 0: the bits there mean nothing.
template <int kBits>
__device__ uint32_t code_pair(const uint8_t* stage, int n, int k, int64_t columns) {
  constexpr uint32_t kMask = (1u << kBits) - 1u;
  const int bit = k * kBits;
  const uint8_t* from = stage + n * Stage<kBits>::kStride + bit / 8;
  const uint32_t both = (from[0] | static_cast<uint32_t>(from[1]) << 8) >> (bit % 8);
  const uint32_t even = inside(k, columns) ? both & kMask : 0;
  const uint32_t odd = inside(k + 1, columns) ? both >> kBits & kMask : 0;
  return even | odd << 16;
}

// One plane of the tile: a warp writes 512 bytes at a time, a lane its 16-byte vector.
template <int kBits, int kPlaneBits>
__device__ void write_plane(const uint8_t* stage, int position, int64_t columns, uint8_t* plane) {
  constexpr uint32_t kMask = ((1u << kPlaneBits) - 1u) * 0x00010001u;
  constexpr int kFields = 16 / kPlaneBits;  // registers per half word
  constexpr int kVectors = 8 * 4 / kFields;
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  for (int v = static_cast<int>(threadIdx.x) / 32; v < kVectors; v += kPackThreads / 32) {
    uint32_t words[4] = {};
    for (int f = 0; f < kFields; ++f) {
      const int cell = (v * kFields + f) / 4, reg = (v * kFields + f) % 4;
      const int n = g + reg % 2 * 8, k = cell * 16 + reg / 2 * 8 + 2 * t;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t pair = code_pair<kBits>(stage, 16 * i + n, k, columns);
        words[i] |= (pair >> position & kMask) << (f * kPlaneBits);
      }
    }
    *reinterpret_cast<uint4*>(plane + v * kWarpVector + lane * 16) =
        make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// A table of scales or zeros from canonical [rows, G]. scale_position is its own inverse, so position p holds row
// scale_position(p).
__device__ void write_table(const uint8_t* from, int64_t N, int64_t groups, int64_t row0, int bytes,
                            const Table& table, uint8_t* strip) {
  for (int i = static_cast<int>(threadIdx.x); i < table.count * kStripRows; i += kPackThreads) {
    const int group = table.first + i / kStripRows, p = i % kStripRows;
    const int64_t row = row0 + scale_position(p);
    uint8_t* to =
        strip + table.offset + i / kStripRows * static_cast<int64_t>(table.row_bytes) + p * bytes;
    if (inside(row, N) && inside(group, groups)) {
      copy_bytes(to, from + (row * groups + group) * bytes, bytes);
    } else {
      for (int b = 0; b < bytes; ++b) to[b] = 0;
    }
  }
}

__device__ void write_scales(const CanonicalParams& c, const WeightParams& w,
                             const PackPlace& place, uint8_t* strip) {
  const int64_t row0 = place.strip * kStripRows;
  const int bytes = scale_bytes(w.scale_dtype);
  const uint8_t* scales = static_cast<const uint8_t*>(c.scales);
  const Table table = table_of(w, place.index, w.scales_offset, w.scale_row_bytes);
  if (w.one_scale) {
    // 16 bytes: the scale, then zeros.
    const int i = static_cast<int>(threadIdx.x);
    if (i < 16)
      strip[table.offset + i] =
          i < bytes ? scales[(row0 / 128 * w.groups + table.first) * bytes + i] : 0;
  } else {
    write_table(scales, w.N, w.groups, row0, bytes, table, strip);
  }
  if (w.zero_row_bytes > 0) {
    write_table(static_cast<const uint8_t*>(c.zeros), w.N, w.groups, row0,
                w.zero_row_bytes / kStripRows,
                table_of(w, place.index, w.zeros_offset, w.zero_row_bytes), strip);
  }
}

// Zeros from the end of what this block wrote to the end of the tile, or of the strip.
__device__ void write_padding(const WeightParams& w, const PackPlace& place, uint8_t* strip) {
  const bool in_tiles = w.groups_per_tile > 0;
  const int64_t rows = in_tiles ? w.groups_per_tile : w.groups;
  const int64_t start = in_tiles ? place.index * static_cast<int64_t>(w.tile_bytes) : 0;
  const int64_t used = w.zero_row_bytes > 0 ? w.zeros_offset + rows * w.zero_row_bytes
                                            : w.scales_offset + rows * w.scale_row_bytes;
  const bool last = !in_tiles || place.index == w.tiles - 1;
  const int64_t end = last ? w.strip_bytes : start + w.tile_bytes;
  for (int64_t b = start + used + threadIdx.x; b < end; b += kPackThreads) strip[b] = 0;
}

template <int kBits>
__global__ void __launch_bounds__(kPackThreads)
    pack_kernel(const CanonicalParams c, const WeightParams w, uint8_t* to, bool aligned) {
  using P = BitPlanes<kBits>;
  const PackPlace place = pack_place(w);
  uint8_t* strip = to + place.strip * w.strip_bytes;
  if (place.index < w.tiles) {
    uint8_t* stage = dynamic_shared();
    const int64_t k0 = place.index * static_cast<int64_t>(kTileK);
    load_stage<kBits>(c, place.strip * kStripRows, k0 / 8 * kBits, aligned, stage);
    ptx::sync_block();
    uint8_t* tile = strip + place.index * static_cast<int64_t>(w.tile_bytes);
    write_plane<kBits, P::kLow>(stage, 0, w.K - k0, tile);
    if constexpr (P::kHigh > 0)
      write_plane<kBits, P::kHigh>(stage, P::kLow, w.K - k0, tile + P::kHighOffset);
    if (w.groups_per_tile == 0) return;
  }
  write_scales(c, w, place, strip);
  write_padding(w, place, strip);
}

// The scale of all scales, for each row.
__global__ void __launch_bounds__(kPackThreads)
    pack_super_kernel(const WeightParams w, const float* from, uint8_t* to) {
  const int64_t i = blockIdx.x * int64_t{kPackThreads} + threadIdx.x;
  const int64_t strip = i / kStripRows;
  const int place = static_cast<int>(i % kStripRows);
  if (!inside(strip, w.strips)) return;
  const bool exists = inside(strip * kStripRows + scale_position(place), w.N);
  float* table = reinterpret_cast<float*>(to + strip * w.strip_bytes + w.supers.offset);
  table[place] = exists ? *from : 0.0f;
}

// A launch that reads weights while the launch before it ends (LaunchOptions, runtime.h) must not find the one there that
// writes them. This one is, and does nothing.
__global__ void pack_end_kernel() {}

struct Pack {
  const CanonicalParams& c;
  const WeightParams& w;
  uint8_t* to;
  Stream stream;

  template <int kBits>
  void run() const {
    launch("pack", pack_kernel<kBits>, pack_grid(w), kPackThreads, Stage<kBits>::kBytes, stream, c,
           w, to, is_aligned(c.packed, c.row_bytes, 16));
  }
};

}  // namespace

void launch_pack(const CanonicalParams& from, const WeightParams& w, uint8_t* to, Stream stream) {
  with_bits(w.bits, Pack{from, w, to, stream});
  if (from.super_scale != nullptr)
    launch("pack_super", pack_super_kernel,
           Grid{static_cast<uint32_t>(div_up(int64_t{w.strips} * kStripRows, kPackThreads)), 1, 1},
           kPackThreads, 0, stream, w, from.super_scale, to);
  if (from.perm != nullptr)
    copy_perm("pack_perm", from.perm, reinterpret_cast<int32_t*>(to + w.strips * w.strip_bytes),
              w.K, stream);
  launch("pack_end", pack_end_kernel, Grid{1}, 32, 0, stream);
}

}  // namespace lowbit::cuda
