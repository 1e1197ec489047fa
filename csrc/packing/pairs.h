// Planes of codes whose 32-bit words hold an even k in the lower half and the k after it in the upper one: what cuda_tile64
// and metal_tile4 have in common. They differ in where a pair stands.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace lowbit {

// Bits of a code in its first plane; what is left of it makes the second.
constexpr int low_plane_bits(int bits) { return bits >= 8 ? 8 : bits >= 4 ? 4 : 2; }

// Where a pair stands in a plane.
struct PairPlace {
  int word;   // index of the 32-bit word
  int shift;  // of the lowest bit of the even k's code in that word
};

struct PairPlanes {
  int count;          // 1 or 2
  int bits[2];        // 1, 2, 4 or 8
  int64_t offset[2];  // bytes from the start of the first
  int64_t bytes;      // of both
};

// size(bits): of a plane.
template <class Size>
PairPlanes lay_pair_planes(int bits, const Size& size) {
  const int low = low_plane_bits(bits);
  PairPlanes planes{bits > low ? 2 : 1, {low, bits - low}, {}, 0};
  for (int p = 0; p < planes.count; ++p) {
    planes.offset[p] = planes.bytes;
    planes.bytes += size(planes.bits[p]);
  }
  return planes;
}

// visit(bits, position, plane): a plane's width as a type, and where its bits sit in a code.
template <class Byte, class Visit>
void for_each_plane(const PairPlanes& planes, Byte* first, const Visit& visit) {
  for (int p = 0, position = 0; p < planes.count; position += planes.bits[p], ++p) {
    Byte* const plane = first + planes.offset[p];
    switch (planes.bits[p]) {
      case 1:
        visit(std::integral_constant<int, 1>(), position, plane);
        break;
      case 2:
        visit(std::integral_constant<int, 2>(), position, plane);
        break;
      case 4:
        visit(std::integral_constant<int, 4>(), position, plane);
        break;
      default:
        visit(std::integral_constant<int, 8>(), position, plane);
    }
  }
}

// `count` codes of a row, an even number, into planes that hold zeros there. place(bits, k): where the pair k, k + 1 stands.
template <class Place>
void write_pairs(const PairPlanes& planes, const uint8_t* codes, int64_t count, uint8_t* to,
                 const Place& place) {
  for_each_plane(planes, to, [&](auto bits, int position, uint8_t* plane) {
    constexpr unsigned mask = (1u << decltype(bits)::value) - 1u;
    for (int64_t k = 0; k < count; k += 2) {
      const PairPlace at = place(bits(), k);
      const unsigned even = codes[k] >> position & mask, odd = codes[k + 1] >> position & mask;
      uint32_t word;
      std::memcpy(&word, plane + 4 * at.word, 4);
      word |= (even | odd << 16) << at.shift;
      std::memcpy(plane + 4 * at.word, &word, 4);
    }
  });
}

template <class Place>
void read_pairs(const PairPlanes& planes, const uint8_t* from, int64_t count, uint8_t* codes,
                const Place& place) {
  std::memset(codes, 0, static_cast<size_t>(count));
  for_each_plane(planes, from, [&](auto bits, int position, const uint8_t* plane) {
    constexpr unsigned mask = (1u << decltype(bits)::value) - 1u;
    for (int64_t k = 0; k < count; k += 2) {
      const PairPlace at = place(bits(), k);
      uint32_t word;
      std::memcpy(&word, plane + 4 * at.word, 4);
      word >>= at.shift;
      codes[k] = static_cast<uint8_t>(codes[k] | (word & mask) << position);
      codes[k + 1] = static_cast<uint8_t>(codes[k + 1] | (word >> 16 & mask) << position);
    }
  });
}

}  // namespace lowbit
