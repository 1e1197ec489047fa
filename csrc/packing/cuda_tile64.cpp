#include "packing/cuda_tile64.h"

#include <algorithm>
#include <cstring>

namespace lowbit {
namespace {

void lay_planes(CudaTile64& tile) {
  const int low = low_plane_bits(tile.bits);
  const int widths[2] = {low, tile.bits - low};
  tile.plane_count = widths[1] > 0 ? 2 : 1;
  for (int p = 0, offset = 0; p < tile.plane_count; ++p) {
    tile.plane_bits[p] = widths[p];
    tile.plane_offset[p] = offset;
    offset += kStripRows * kTileK * widths[p] / 8;
  }
  tile.codes_bytes = kStripRows * kTileK * tile.bits / 8;
}

void lay_scales(CudaTile64& t) {
  int64_t scales_end = 0;
  if (t.groups_per_tile > 0) {
    t.scales_offset = t.codes_bytes;
    t.zeros_offset = t.scales_offset + t.groups_per_tile * t.scale_row_bytes;
    t.tile_bytes = round_up(t.zeros_offset + t.groups_per_tile * t.zero_row_bytes, 32);
    scales_end = t.tiles * t.tile_bytes;
  } else {
    t.tile_bytes = t.codes_bytes;
    t.scales_offset = t.tiles * t.tile_bytes;
    t.zeros_offset = t.scales_offset + t.groups * t.scale_row_bytes;
    scales_end = t.zeros_offset + t.groups * t.zero_row_bytes;
  }
  t.strip_bytes = round_up(scales_end, 128);
}

// The 128 codes of one row of a tile, into (out of) one plane of `kBits` bits. Its words are visited in pairs of k: the
// two elements of a pair stand in the two halves of one word.
template <int kBits>
void write_plane(const uint8_t* codes, int n, int position, uint8_t* plane) {
  constexpr unsigned mask = (1u << kBits) - 1u;
  for (int k = 0; k < kTileK; k += 2) {
    const CodePlace place = code_place(n, k, kBits);
    const unsigned even = codes[k] >> position & mask, odd = codes[k + 1] >> position & mask;
    uint32_t word;
    std::memcpy(&word, plane + 4 * place.word, 4);
    word |= (even | odd << 16) << place.shift;
    std::memcpy(plane + 4 * place.word, &word, 4);
  }
}

template <int kBits>
void read_plane(const uint8_t* plane, int n, int position, uint8_t* codes) {
  constexpr unsigned mask = (1u << kBits) - 1u;
  for (int k = 0; k < kTileK; k += 2) {
    const CodePlace place = code_place(n, k, kBits);
    uint32_t word;
    std::memcpy(&word, plane + 4 * place.word, 4);
    word >>= place.shift;
    codes[k] = static_cast<uint8_t>(codes[k] | (word & mask) << position);
    codes[k + 1] = static_cast<uint8_t>(codes[k + 1] | (word >> 16 & mask) << position);
  }
}

void write_row(const CudaTile64& t, const uint8_t* codes, int n, uint8_t* tile) {
  for (int p = 0, position = 0; p < t.plane_count; position += t.plane_bits[p], ++p) {
    uint8_t* plane = tile + t.plane_offset[p];
    switch (t.plane_bits[p]) {
      case 1:
        write_plane<1>(codes, n, position, plane);
        break;
      case 2:
        write_plane<2>(codes, n, position, plane);
        break;
      case 4:
        write_plane<4>(codes, n, position, plane);
        break;
      default:
        write_plane<8>(codes, n, position, plane);
    }
  }
}

void read_row(const CudaTile64& t, const uint8_t* tile, int n, uint8_t* codes) {
  std::memset(codes, 0, kTileK);
  for (int p = 0, position = 0; p < t.plane_count; position += t.plane_bits[p], ++p) {
    const uint8_t* plane = tile + t.plane_offset[p];
    switch (t.plane_bits[p]) {
      case 1:
        read_plane<1>(plane, n, position, codes);
        break;
      case 2:
        read_plane<2>(plane, n, position, codes);
        break;
      case 4:
        read_plane<4>(plane, n, position, codes);
        break;
      default:
        read_plane<8>(plane, n, position, codes);
    }
  }
}

// copy(canonical index, bytes from the strip's start) for each scale of a strip; the same for zeros.
template <class Copy>
void for_each_scale(const CudaTile64& t, int64_t strip, Copy copy) {
  for (int64_t g = 0; g < t.groups; ++g) {
    if (t.one_scale) {
      copy(strip * kStripRows / 128 * t.groups + g, t.scale_row(g));
      continue;
    }
    for (int64_t n = strip * kStripRows; n < std::min(t.N, (strip + 1) * kStripRows); ++n)
      copy(n * t.groups + g,
           t.scale_row(g) + scale_position(static_cast<int>(n % kStripRows)) * t.scale_bytes);
  }
}

template <class Copy>
void for_each_zero(const CudaTile64& t, int64_t strip, Copy copy) {
  if (t.zero_bytes == 0) return;
  for (int64_t g = 0; g < t.groups; ++g) {
    for (int64_t n = strip * kStripRows; n < std::min(t.N, (strip + 1) * kStripRows); ++n)
      copy(n * t.groups + g,
           t.zero_row(g) + scale_position(static_cast<int>(n % kStripRows)) * t.zero_bytes);
  }
}

}  // namespace

CudaTile64 cuda_tile64(int64_t N, int64_t K, const Desc& desc) {
  const CanonicalShape s = canonical_shape(N, K, desc);
  CudaTile64 t{};
  t.N = N;
  t.K = K;
  t.bits = s.bits;
  lay_planes(t);
  t.tiles = div_up(K, kTileK);
  t.strips = div_up(N, kStripRows);
  t.group_size = s.group_size;
  t.groups = s.groups;
  t.one_scale = desc.scaling == Scaling::kBlock128;
  // -1 stands in the table whatever K is, so that where scales are depends on desc alone.
  const bool in_tile = desc.group_size != -1 && kTileK % desc.group_size == 0;
  t.groups_per_tile = in_tile ? static_cast<int>(kTileK / desc.group_size) : 0;
  t.scale_bytes = s.scale_bytes;
  t.zero_bytes = s.zero_bytes;
  t.scale_row_bytes = t.one_scale ? 16 : kStripRows * s.scale_bytes;
  t.zero_row_bytes = kStripRows * s.zero_bytes;
  lay_scales(t);
  t.perm_offset = t.strips * t.strip_bytes;
  t.total_bytes = t.perm_offset + (s.has_perm ? 4 * K : 0);
  return t;
}

void pack_strip64(const CudaTile64& t, const CanonicalConst& from, int64_t strip, uint8_t* to) {
  std::memset(to, 0, static_cast<size_t>(t.strip_bytes));
  const int64_t row_bytes = packed_row_bytes(t.K, t.bits);
  const int rows = static_cast<int>(std::min<int64_t>(kStripRows, t.N - strip * kStripRows));
  for (int64_t tile = 0; tile < t.tiles; ++tile) {
    const int64_t count = std::min<int64_t>(kTileK, t.K - tile * kTileK);
    for (int n = 0; n < rows; ++n) {
      // 128 codes are whole bytes, so a tile's part of a row starts at one.
      const uint8_t* row =
          from.packed + (strip * kStripRows + n) * row_bytes + tile * (kTileK / 8) * t.bits;
      uint8_t codes[kTileK] = {};
      unpack_row(row, count, t.bits, codes);
      write_row(t, codes, n, to + tile * t.tile_bytes);
    }
  }
  for_each_scale(t, strip, [&](int64_t canonical, int64_t offset) {
    std::memcpy(to + offset, from.scales + canonical * t.scale_bytes,
                static_cast<size_t>(t.scale_bytes));
  });
  for_each_zero(t, strip, [&](int64_t canonical, int64_t offset) {
    std::memcpy(to + offset, from.zeros + canonical * t.zero_bytes,
                static_cast<size_t>(t.zero_bytes));
  });
}

void unpack_strip64(const CudaTile64& t, const uint8_t* from, int64_t strip,
                    const CanonicalMutable& to) {
  const int64_t row_bytes = packed_row_bytes(t.K, t.bits);
  const int rows = static_cast<int>(std::min<int64_t>(kStripRows, t.N - strip * kStripRows));
  for (int64_t tile = 0; tile < t.tiles; ++tile) {
    const int64_t count = std::min<int64_t>(kTileK, t.K - tile * kTileK);
    for (int n = 0; n < rows; ++n) {
      uint8_t codes[kTileK];
      read_row(t, from + tile * t.tile_bytes, n, codes);
      pack_row(codes, count, t.bits,
               to.packed + (strip * kStripRows + n) * row_bytes + tile * (kTileK / 8) * t.bits);
    }
  }
  // Two strips share a block row's scales: the first one writes them, so that no two threads do.
  if (!t.one_scale || strip % 2 == 0) {
    for_each_scale(t, strip, [&](int64_t canonical, int64_t offset) {
      std::memcpy(to.scales + canonical * t.scale_bytes, from + offset,
                  static_cast<size_t>(t.scale_bytes));
    });
  }
  for_each_zero(t, strip, [&](int64_t canonical, int64_t offset) {
    std::memcpy(to.zeros + canonical * t.zero_bytes, from + offset,
                static_cast<size_t>(t.zero_bytes));
  });
}

}  // namespace lowbit
