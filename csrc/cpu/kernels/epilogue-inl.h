// From fp32 sums to the output: bias, one rounding, ragged last columns. Included after V.

inline void store16(V::F value, Element dtype, uint8_t* to) {
  if (dtype == Element::kFloat32) {
    float row[16];
    V::store(row, value);
    __builtin_memcpy(to, row, 64);
  } else if (dtype == Element::kFloat16) {
    V::store_half(to, value);
  } else {
    float row[16];
    uint16_t out[16];
    V::store(row, value);
    for (int i = 0; i < 16; ++i) {
      uint32_t bits;
      __builtin_memcpy(&bits, row + i, 4);
      const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
      const uint32_t nan = (bits >> 16) | 0x40u;
      out[i] = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
    }
    __builtin_memcpy(to, out, 32);
  }
}

// Columns [n0, n0 + 16) of row m, as far as they exist.
inline void write_tile_row(const Output& y, int64_t N, int64_t m, int64_t n0, V::F sums) {
  const int64_t count = N - n0 < 16 ? N - n0 : 16;
  const int64_t size = y.dtype == Element::kFloat32 ? 4 : 2;
  uint8_t* to = static_cast<uint8_t*>(y.data) + (m * y.stride + n0) * size;
  if (count == 16) {
    if (y.bias != nullptr) sums = V::add(sums, V::load(y.bias + n0));
    store16(sums, y.dtype, to);
    return;
  }
  if (y.bias != nullptr) {
    float bias[16] = {};
    for (int64_t i = 0; i < count; ++i) bias[i] = y.bias[n0 + i];
    sums = V::add(sums, V::load(bias));
  }
  uint8_t row[64];
  store16(sums, y.dtype, row);
  __builtin_memcpy(to, row, static_cast<unsigned long>(count * size));
}
