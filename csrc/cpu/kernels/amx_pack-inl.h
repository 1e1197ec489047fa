// Rows of x as AMX A tiles: 16 rows of 64 bytes, contiguous, so that a tile load touches 16 cache lines of 16 different
// sets; rows 8 KiB apart would share one. Included after V and rows-inl.h's load_floats; x86-64 only.

// Within each four k the order is k0, k2, k1, k3, that of decode_bf16-inl.h.
inline V::I tile_order(V::I row) {
  const __m128i quads = _mm_set_epi8(15, 14, 11, 10, 13, 12, 9, 8, 7, 6, 3, 2, 5, 4, 1, 0);
  return _mm512_shuffle_epi8(row, _mm512_broadcast_i32x4(quads));
}

// The upper halves of 32 floats.
inline V::I upper_halves(V::F low, V::F high) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i odd = _mm512_add_epi32(_mm512_slli_epi32(lane, 18), _mm512_slli_epi32(lane, 2));
  const __m512i order = _mm512_add_epi32(odd, _mm512_set1_epi32(3 << 16 | 1));  // 1, 3, 5, ..
  return _mm512_permutex2var_epi16(_mm512_castps_si512(low), order, _mm512_castps_si512(high));
}

// Cuts off what bf16 holds of x, exactly: the upper 8 of its 24 significant bits. Infinity and NaN leave nothing.
inline V::F take_plane(V::F& x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i kept = _mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u)));
  const V::F plane =
      _mm512_castsi512_ps(_mm512_mask_or_epi32(kept, nan, kept, _mm512_set1_epi32(0x400000)));
  const __m512i exponent = _mm512_and_si512(bits, _mm512_set1_epi32(0x7f800000));
  const __mmask16 finite = _mm512_cmpneq_epi32_mask(exponent, _mm512_set1_epi32(0x7f800000));
  x = _mm512_maskz_sub_ps(finite, x, plane);
  return plane;
}

// Elements [k0, k0 + 32) of a row as fp32, gathered, zero beyond K.
inline void load_step(const RowSource& from, const uint8_t* row, int64_t k0, float* to) {
  const int64_t count = from.K - k0 < 32 ? from.K - k0 : 32;
  if (from.perm != nullptr) {
    for (int64_t i = 0; i < count; ++i) to[i] = load_one(row, from.dtype, from.perm[k0 + i]);
  } else {
    load_floats(row + k0 * element_bytes(from.dtype), from.dtype, count, to);
  }
  for (int64_t i = count; i < 32; ++i) to[i] = 0.0f;
}

// bf16 rows that need no gather are copied.
inline void copy_row(const uint8_t* row, int64_t K, int64_t steps, uint8_t* tiles) {
  for (int64_t step = 0; step < steps; ++step, tiles += kTileBytes) {
    const int64_t left = K - step * 32;
    const __mmask32 there = left >= 32 ? 0xffffffffu : (1u << left) - 1u;
    V::istore(tiles, tile_order(_mm512_maskz_loadu_epi16(there, row + step * 64)));
  }
}

void pack_floats(const RowSource& from, int64_t row, int64_t rows, int planes, int64_t K_padded,
                 uint8_t* tiles) {
  const int64_t steps = K_padded / 32, plane_bytes = steps * kTileBytes;
  const bool copied = planes == 1 && from.dtype == Element::kBFloat16 && from.perm == nullptr;
  for (int64_t r = 0; r < 16; ++r) {
    uint8_t* to = tiles + r * 64;
    if (r >= rows) {
      for (int64_t step = 0; step < planes * steps; ++step)
        V::istore(to + step * kTileBytes, V::izero());
      continue;
    }
    const uint8_t* source = static_cast<const uint8_t*>(from.data) +
                            (row + r) * from.stride * element_bytes(from.dtype);
    if (copied) {
      copy_row(source, from.K, steps, to);
      continue;
    }
    for (int64_t step = 0; step < steps; ++step) {
      alignas(64) float values[32];
      load_step(from, source, step * 32, values);
      V::F low = V::load(values), high = V::load(values + 16);
      for (int p = 0; p < planes; ++p) {
        const V::F low_plane = take_plane(low), high_plane = take_plane(high);
        V::istore(to + p * plane_bytes + step * kTileBytes,
                  tile_order(upper_halves(low_plane, high_plane)));
      }
    }
  }
}

void pack_codes(const WeightView& w, const Activations& x, int64_t row, int64_t rows,
                uint8_t* tiles) {
  Panels panels(w, x.segment, x.segments_per_group, 64);
  Panel panel;
  while (panels.next(panel)) {
    for (int i = 0; i < panel.runs; ++i) {
      const Run& run = panel.run[i];
      for (int step = 0; step < run.steps; ++step) {
        const int64_t k = run.k0 + step * 64, left = run.k0 + run.blocks * 32 - k;
        const __mmask64 there = left >= 64 ? ~0ull : 0xffffffffull;
        uint8_t* to = tiles + (panel.step0 + run.step0 + step) * kTileBytes;
        for (int64_t r = 0; r < 16; ++r) {
          const __mmask64 mask = r < rows ? there : 0;
          V::istore(to + r * 64, _mm512_maskz_loadu_epi8(mask, x.codes + (row + r) * x.stride + k));
        }
      }
    }
  }
}
