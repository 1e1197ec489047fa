#include "packing/metal_tile4.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace lowbit {
namespace {

void lay_planes(MetalTile4& t) {
  const int low = t.bits >= 8 ? 8 : t.bits >= 4 ? 4 : 2;
  const int widths[2] = {low, t.bits - low};
  t.plane_count = widths[1] > 0 ? 2 : 1;
  int64_t offset = 0;
  for (int p = 0; p < t.plane_count; ++p) {
    t.plane_bits[p] = widths[p];
    t.plane_offset[p] = offset;
    offset += round_up(t.chunks * 4 * widths[p], 16);
  }
  t.scales_offset = offset;
}

// The codes of one row, K of them padded with zeros to whole chunks, into (out of) one plane.
template <int kBits>
void write_plane(const MetalTile4& t, const uint8_t* codes, int row, int position, uint8_t* plane) {
  constexpr unsigned mask = (1u << kBits) - 1u;
  for (int64_t chunk = 0; chunk < t.chunks; ++chunk, plane += 4 * kBits, codes += kChunkK) {
    for (int k = 0; k < kChunkK; k += 2) {
      const ChunkPlace place = chunk_place(row, k, kBits);
      const unsigned even = codes[k] >> position & mask, odd = codes[k + 1] >> position & mask;
      uint32_t word;
      std::memcpy(&word, plane + 4 * place.word, 4);
      word |= (even | odd << 16) << place.shift;
      std::memcpy(plane + 4 * place.word, &word, 4);
    }
  }
}

template <int kBits>
void read_plane(const MetalTile4& t, const uint8_t* plane, int row, int position, uint8_t* codes) {
  constexpr unsigned mask = (1u << kBits) - 1u;
  for (int64_t chunk = 0; chunk < t.chunks; ++chunk, plane += 4 * kBits, codes += kChunkK) {
    for (int k = 0; k < kChunkK; k += 2) {
      const ChunkPlace place = chunk_place(row, k, kBits);
      uint32_t word;
      std::memcpy(&word, plane + 4 * place.word, 4);
      word >>= place.shift;
      codes[k] = static_cast<uint8_t>(codes[k] | (word & mask) << position);
      codes[k + 1] = static_cast<uint8_t>(codes[k + 1] | (word >> 16 & mask) << position);
    }
  }
}

void write_row(const MetalTile4& t, const uint8_t* codes, int row, uint8_t* strip) {
  for (int p = 0, position = 0; p < t.plane_count; position += t.plane_bits[p], ++p) {
    uint8_t* plane = strip + t.plane_offset[p];
    switch (t.plane_bits[p]) {
      case 1:
        write_plane<1>(t, codes, row, position, plane);
        break;
      case 2:
        write_plane<2>(t, codes, row, position, plane);
        break;
      case 4:
        write_plane<4>(t, codes, row, position, plane);
        break;
      default:
        write_plane<8>(t, codes, row, position, plane);
    }
  }
}

void read_row(const MetalTile4& t, const uint8_t* strip, int row, uint8_t* codes) {
  for (int p = 0, position = 0; p < t.plane_count; position += t.plane_bits[p], ++p) {
    const uint8_t* plane = strip + t.plane_offset[p];
    switch (t.plane_bits[p]) {
      case 1:
        read_plane<1>(t, plane, row, position, codes);
        break;
      case 2:
        read_plane<2>(t, plane, row, position, codes);
        break;
      case 4:
        read_plane<4>(t, plane, row, position, codes);
        break;
      default:
        read_plane<8>(t, plane, row, position, codes);
    }
  }
}

int rows_of(const MetalTile4& t, int64_t strip) {
  return static_cast<int>(std::min<int64_t>(kMetalRows, t.N - strip * kMetalRows));
}

// copy(canonical index, bytes from the strip's start) for each scale of a strip; the same for zeros.
template <class Copy>
void for_each_scale(const MetalTile4& t, int64_t strip, Copy copy) {
  for (int64_t g = 0; g < t.groups; ++g) {
    if (t.scale_rows == 1) {
      copy(strip * kMetalRows / 128 * t.groups + g, t.scale_place(g, 0));
      continue;
    }
    for (int row = 0; row < rows_of(t, strip); ++row)
      copy((strip * kMetalRows + row) * t.groups + g, t.scale_place(g, row));
  }
}

template <class Copy>
void for_each_zero(const MetalTile4& t, int64_t strip, Copy copy) {
  if (t.zero_bytes == 0) return;
  for (int64_t g = 0; g < t.groups; ++g) {
    for (int row = 0; row < rows_of(t, strip); ++row)
      copy((strip * kMetalRows + row) * t.groups + g, t.zero_place(g, row));
  }
}

}  // namespace

MetalTile4 metal_tile4(int64_t N, int64_t K, const Desc& desc) {
  const CanonicalShape s = canonical_shape(N, K, desc);
  MetalTile4 t{};
  t.N = N;
  t.K = K;
  t.bits = s.bits;
  t.chunks = div_up(K, kChunkK);
  t.strips = div_up(N, kMetalRows);
  lay_planes(t);
  t.group_size = s.group_size;
  t.groups = s.groups;
  t.scale_rows = desc.scaling == Scaling::kBlock128 ? 1 : kMetalRows;
  t.scale_bytes = s.scale_bytes;
  t.zero_bytes = s.zero_bytes;
  t.zeros_offset = t.scales_offset + t.groups * t.scale_rows * t.scale_bytes;
  t.strip_bytes = round_up(t.zeros_offset + t.groups * kMetalRows * t.zero_bytes, 64);
  t.perm_offset = t.strips * t.strip_bytes;
  t.total_bytes = t.perm_offset + (s.has_perm ? 4 * K : 0);
  return t;
}

void pack_strip4(const MetalTile4& t, const CanonicalConst& from, int64_t strip, uint8_t* to) {
  std::memset(to, 0, static_cast<size_t>(t.strip_bytes));
  const int64_t row_bytes = packed_row_bytes(t.K, t.bits);
  std::vector<uint8_t> codes(static_cast<size_t>(t.chunks * kChunkK));
  for (int row = 0; row < rows_of(t, strip); ++row) {
    unpack_row(from.packed + (strip * kMetalRows + row) * row_bytes, t.K, t.bits, codes.data());
    write_row(t, codes.data(), row, to);
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

void unpack_strip4(const MetalTile4& t, const uint8_t* from, int64_t strip,
                   const CanonicalMutable& to) {
  const int64_t row_bytes = packed_row_bytes(t.K, t.bits);
  std::vector<uint8_t> codes(static_cast<size_t>(t.chunks * kChunkK));
  for (int row = 0; row < rows_of(t, strip); ++row) {
    std::fill(codes.begin(), codes.end(), uint8_t{0});
    read_row(t, from, row, codes.data());
    pack_row(codes.data(), t.K, t.bits, to.packed + (strip * kMetalRows + row) * row_bytes);
  }
  // The strips of a block row share its scales: the first one writes them, so that no two threads do.
  if (t.scale_rows != 1 || strip % (128 / kMetalRows) == 0) {
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
