#include "packing/cpu_tile16.h"

#include <algorithm>
#include <cstring>

namespace lowbit {
namespace {

// The largest block that no group can straddle.
int block_k(const CanonicalShape& shape, const Desc& desc) {
  if (desc.group_size == -1 || shape.group_size % 32 == 0) return 32;
  return shape.group_size % 16 == 0 ? 16 : 8;
}

void lay_planes(CpuTile16& tile) {
  const int bits = tile.shape.bits;
  const int low = bits >= 8 ? 8 : bits >= 4 ? 4 : 2;
  const int widths[2] = {low, bits - low};
  const int quads = tile.kb / 4;
  int offset = 0, position = 0;
  tile.plane_count = widths[1] > 0 ? 2 : 1;
  for (int p = 0; p < tile.plane_count; ++p) {
    // Narrow planes of short blocks leave part of their bytes unused rather than share them across blocks.
    const int per_vector = std::min(8 / widths[p], quads);
    tile.planes[p] = {widths[p], position, per_vector, offset};
    offset += quads / per_vector * kVectorBytes;
    position += widths[p];
  }
  tile.block_bytes = offset;
}

// Copies the entries of one strip between a canonical [rows, G] table and the strip's [G][per_group] table.
template <class Copy>
void for_each_entry(const CpuTile16& tile, int64_t strip, int per_group, Copy copy) {
  const CanonicalShape& s = tile.shape;
  for (int64_t g = 0; g < s.groups; ++g) {
    for (int n = 0; n < per_group; ++n) {
      const int64_t row = strip * kTileRows + n;
      if (row < s.N) copy(s.scale_row(row) * s.groups + g, g * per_group + n);
    }
  }
}

}  // namespace

CpuTile16 cpu_tile16(int64_t N, int64_t K, const Desc& desc) {
  CpuTile16 t{};
  t.shape = canonical_shape(N, K, desc);
  t.kb = block_k(t.shape, desc);
  lay_planes(t);
  t.blocks = div_up(K, t.kb);
  t.K_padded = t.blocks * t.kb;
  t.strips = div_up(N, kTileRows);
  t.scales_per_group = desc.scaling == Scaling::kBlock128 ? 1 : kTileRows;
  t.scales_offset = t.blocks * t.block_bytes;
  t.zeros_offset =
      t.scales_offset + round_up(t.shape.groups * t.scales_per_group * t.shape.scale_bytes, 16);
  t.strip_bytes =
      round_up(t.zeros_offset + t.shape.groups * kTileRows * t.shape.zero_bytes, kVectorBytes);
  t.perm_offset = t.strips * t.strip_bytes;
  t.total_bytes = t.perm_offset + (t.shape.has_perm ? 4 * K : 0);
  return t;
}

void pack_strip(const CpuTile16& t, const CanonicalConst& from, int64_t strip, uint8_t* to,
                uint8_t* scratch) {
  const CanonicalShape& s = t.shape;
  std::memset(to, 0, static_cast<size_t>(t.strip_bytes));
  std::memset(scratch, 0, static_cast<size_t>(t.K_padded * kTileRows));
  const int rows = static_cast<int>(std::min<int64_t>(kTileRows, s.N - strip * kTileRows));
  for (int n = 0; n < rows; ++n) {
    unpack_row(from.packed + (strip * kTileRows + n) * s.row_bytes, s.K, s.bits,
               scratch + n * t.K_padded);
  }
  for (int64_t block = 0; block < t.blocks; ++block) {
    for (int p = 0; p < t.plane_count; ++p) {
      const Plane& plane = t.planes[p];
      const unsigned mask = (1u << plane.bits) - 1u;
      uint8_t* base = to + block * t.block_bytes + plane.offset;
      for (int quad = 0; quad < t.kb / 4; ++quad) {
        uint8_t* vector = base + quad / plane.quads_per_vector * kVectorBytes;
        const int shift = quad % plane.quads_per_vector * plane.bits;
        const uint8_t* codes = scratch + block * t.kb + quad * 4;
        for (int n = 0; n < rows; ++n) {
          for (int j = 0; j < 4; ++j) {
            const unsigned part = (codes[n * t.K_padded + j] >> plane.position) & mask;
            vector[4 * n + j] = static_cast<uint8_t>(vector[4 * n + j] | part << shift);
          }
        }
      }
    }
  }
  for_each_entry(t, strip, t.scales_per_group, [&](int64_t canonical, int64_t tiled) {
    std::memcpy(to + t.scales_offset + tiled * s.scale_bytes,
                from.scales + canonical * s.scale_bytes, static_cast<size_t>(s.scale_bytes));
  });
  if (s.zero_bytes > 0) {
    for_each_entry(t, strip, kTileRows, [&](int64_t canonical, int64_t tiled) {
      std::memcpy(to + t.zeros_offset + tiled * s.zero_bytes, from.zeros + canonical * s.zero_bytes,
                  static_cast<size_t>(s.zero_bytes));
    });
  }
}

void unpack_strip(const CpuTile16& t, const uint8_t* from, int64_t strip,
                  const CanonicalMutable& to, uint8_t* scratch) {
  const CanonicalShape& s = t.shape;
  const int rows = static_cast<int>(std::min<int64_t>(kTileRows, s.N - strip * kTileRows));
  for (int n = 0; n < rows; ++n) {
    for (int64_t k = 0; k < s.K; ++k) scratch[k] = static_cast<uint8_t>(tile16_code(t, from, n, k));
    pack_row(scratch, s.K, s.bits, to.packed + (strip * kTileRows + n) * s.row_bytes);
  }
  // Eight strips share a block row's scales: the first one writes them, so that no two threads do.
  const bool owns_scales = s.scale_rows == s.N || strip * kTileRows % 128 == 0;
  for_each_entry(t, strip, owns_scales ? t.scales_per_group : 0,
                 [&](int64_t canonical, int64_t tiled) {
                   std::memcpy(to.scales + canonical * s.scale_bytes,
                               from + t.scales_offset + tiled * s.scale_bytes,
                               static_cast<size_t>(s.scale_bytes));
                 });
  if (s.zero_bytes > 0) {
    for_each_entry(t, strip, kTileRows, [&](int64_t canonical, int64_t tiled) {
      std::memcpy(to.zeros + canonical * s.zero_bytes, from + t.zeros_offset + tiled * s.zero_bytes,
                  static_cast<size_t>(s.zero_bytes));
    });
  }
}

}  // namespace lowbit
