// The canonical packing of codes: a dense little-endian bit stream along K, least significant bits first.
//
//   bits = 3:   byte 0            byte 1            byte 2
//               k: 2 2 1 1 1 0 0 0 | 5 4 4 4 3 3 3 2 | 7 7 7 6 6 6 5 5        (bit 7 ... bit 0 of each byte)
//
// Element k occupies bits [k*bits, (k+1)*bits) of its row; eight codes fill exactly `bits` bytes. For four bits the
// low nibble is the even k. The bits past K in a row's last byte are zero.
#pragma once

#include <cstdint>
#include <cstring>

namespace lowbit {

inline int64_t packed_row_bytes(int64_t K, int bits) { return (K * bits + 7) / 8; }

inline uint8_t get_code(const uint8_t* row, int64_t k, int bits) {
  const int64_t bit = k * bits;
  const int shift = static_cast<int>(bit & 7);
  unsigned value = row[bit >> 3] >> shift;
  if (shift + bits > 8) value |= static_cast<unsigned>(row[(bit >> 3) + 1]) << (8 - shift);
  return static_cast<uint8_t>(value & ((1u << bits) - 1u));
}

// Eight codes from `kBits` bytes. Fixed shifts: this is the inner loop of dequantize and pack.
template <int kBits>
inline void unpack_eights(const uint8_t* row, int64_t count, uint8_t* codes) {
  constexpr uint8_t mask = static_cast<uint8_t>((1u << kBits) - 1u);
  for (int64_t i = 0; i < count; ++i) {
    if constexpr (kBits == 8) {
      std::memcpy(codes + 8 * i, row + 8 * i, 8);
    } else if constexpr (kBits == 4) {
      for (int j = 0; j < 4; ++j) {
        codes[8 * i + 2 * j] = row[4 * i + j] & mask;
        codes[8 * i + 2 * j + 1] = row[4 * i + j] >> 4;
      }
    } else {
      uint64_t word = 0;
      for (int b = 0; b < kBits; ++b) word |= static_cast<uint64_t>(row[kBits * i + b]) << (8 * b);
      for (int j = 0; j < 8; ++j)
        codes[8 * i + j] = static_cast<uint8_t>(word >> (j * kBits)) & mask;
    }
  }
}

// One code per byte, k = 0..K-1. Eight at a time, since eight codes are whole bytes.
inline void unpack_row(const uint8_t* row, int64_t K, int bits, uint8_t* codes) {
  const int64_t eights = K / 8;
  switch (bits) {
    case 2:
      unpack_eights<2>(row, eights, codes);
      break;
    case 3:
      unpack_eights<3>(row, eights, codes);
      break;
    case 4:
      unpack_eights<4>(row, eights, codes);
      break;
    case 5:
      unpack_eights<5>(row, eights, codes);
      break;
    case 6:
      unpack_eights<6>(row, eights, codes);
      break;
    default:
      unpack_eights<8>(row, eights, codes);
  }
  for (int64_t k = eights * 8; k < K; ++k) codes[k] = get_code(row, k, bits);
}

inline void pack_row(const uint8_t* codes, int64_t K, int bits, uint8_t* row) {
  int64_t k = 0;
  for (; k < K; k += 8, row += bits) {
    const int64_t count = K - k < 8 ? K - k : 8;
    uint64_t word = 0;
    for (int64_t j = 0; j < count; ++j) word |= static_cast<uint64_t>(codes[k + j]) << (j * bits);
    const int64_t bytes = (count * bits + 7) / 8;
    for (int64_t b = 0; b < bytes; ++b) row[b] = static_cast<uint8_t>(word >> (8 * b));
  }
}

}  // namespace lowbit
