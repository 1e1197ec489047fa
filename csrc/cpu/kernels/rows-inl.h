// Rows of floats in and out: conversion, gather, pre-scaling, padding; and dequantization of a canonical row.
// Included after V, codec-inl.h and epilogue-inl.h.

inline int64_t element_bytes(Element dtype) {
  return dtype == Element::kFloat32                              ? 4
         : dtype == Element::kInt8 || dtype == Element::kFp8E4m3 ? 1
                                                                 : 2;
}

inline V::F load16_element(const uint8_t* p, Element dtype) {
  if (dtype == Element::kFloat32) {
    float values[16];
    __builtin_memcpy(values, p, 64);
    return V::load(values);
  }
  return dtype == Element::kFloat16 ? V::load_half(p) : V::load_bfloat(p);
}

inline void load_floats(const uint8_t* from, Element dtype, int64_t count, float* to) {
  const int64_t size = element_bytes(dtype);
  int64_t k = 0;
  for (; k + 16 <= count; k += 16) V::store(to + k, load16_element(from + k * size, dtype));
  if (k < count) {
    uint8_t last[64] = {};
    float values[16];
    __builtin_memcpy(last, from + k * size, static_cast<unsigned long>((count - k) * size));
    V::store(values, load16_element(last, dtype));
    for (int64_t i = 0; k + i < count; ++i) to[k + i] = values[i];
  }
}

inline float load_one(const uint8_t* row, Element dtype, int64_t k) {
  float value;
  load_floats(row + k * element_bytes(dtype), dtype, 1, &value);
  return value;
}

// fp32 rows [row_begin, row_end) of `from`: x[perm[k]] * pre_scale[perm[k]], zero from K to to_stride.
void load_rows(const RowSource& from, int64_t row_begin, int64_t row_end, float* to,
               int64_t to_stride) {
  for (int64_t m = row_begin; m < row_end; ++m) {
    const uint8_t* row =
        static_cast<const uint8_t*>(from.data) + m * from.stride * element_bytes(from.dtype);
    float* out = to + (m - row_begin) * to_stride;
    if (from.perm != nullptr) {
      for (int64_t k = 0; k < from.K; ++k) out[k] = load_one(row, from.dtype, from.perm[k]);
    } else {
      load_floats(row, from.dtype, from.K, out);
    }
    if (from.pre_scale != nullptr) {
      for (int64_t k = 0; k < from.K; ++k)
        out[k] *= from.pre_scale[from.perm != nullptr ? from.perm[k] : k];
    }
    for (int64_t k = from.K; k < to_stride; ++k) out[k] = 0.0f;
  }
}

void store_row(const float* from, int64_t count, Element dtype, void* to) {
  const int64_t size = element_bytes(dtype);
  uint8_t* out = static_cast<uint8_t*>(to);
  int64_t k = 0;
  for (; k + 16 <= count; k += 16) store16(V::load(from + k), dtype, out + k * size);
  if (k < count) {
    float values[16] = {};
    uint8_t last[64];
    for (int64_t i = 0; k + i < count; ++i) values[i] = from[k + i];
    store16(V::load(values), dtype, last);
    __builtin_memcpy(out + k * size, last, static_cast<unsigned long>((count - k) * size));
  }
}

// w = (q - zero) * scale | q * scale + offset | code[q] * scale, each operation rounded to fp32 (no contraction).
void dequantize_row(const DequantizeJob& job) {
  for (int64_t begin = 0, g = 0; begin < job.K; begin += job.group_size, ++g) {
    const int64_t end = begin + job.group_size < job.K ? begin + job.group_size : job.K;
    const float scale = job.scales[g], zero = job.zeros[g];
    if (job.code != nullptr) {
      for (int64_t k = begin; k < end; ++k) job.values[k] = job.code[job.codes[k]] * scale;
    } else if (job.offsets) {
      for (int64_t k = begin; k < end; ++k)
        job.values[k] = static_cast<float>(job.codes[k]) * scale + zero;
    } else {
      for (int64_t k = begin; k < end; ++k)
        job.values[k] = (static_cast<float>(job.codes[k]) - zero) * scale;
    }
  }
}
