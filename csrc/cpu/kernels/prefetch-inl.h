// Prefetching for kernels that read several strips at a time. Included inside a namespace per ISA, after V.

// One block of every strip, at `offset` from where it begins, into the second level of cache: what runs past the end of a
// weight does least harm there.
template <int kBits, int NR>
LOWBIT_UNROLLED inline void prefetch_blocks(const WeightView& w, const uint8_t* const (&strip)[NR],
                                            int64_t offset) {
  // Where the codes of these strips end, the next to be read are those NR strips further on.
  const int64_t end = w.K_padded / 32 * w.block_bytes;
  if (offset >= end) offset += NR * w.strip_bytes - end;
#pragma GCC unroll 4
  for (int s = 0; s < NR; ++s) {
    for (int line = 0; line < kBits; ++line)
      __builtin_prefetch(strip[s] + offset + 64 * line, 0, 2);
  }
}

// The same for a row of a table of groups, as it is read some groups later.
template <int NR>
LOWBIT_UNROLLED inline void prefetch_row(const WeightView& w, const uint8_t* const (&strip)[NR],
                                         int64_t table, int64_t row_bytes, int64_t g) {
  const int64_t end = w.groups * row_bytes;
  int64_t offset = g * row_bytes + 256;
  if (offset >= end) offset += NR * w.strip_bytes - end;
#pragma GCC unroll 4
  for (int s = 0; s < NR; ++s) __builtin_prefetch(strip[s] + table + offset, 0, 2);
}

template <int NR>
LOWBIT_UNROLLED inline void prefetch_scales(const WeightView& w, const uint8_t* const (&strip)[NR],
                                            int64_t g) {
  prefetch_row(w, strip, w.scales_offset, w.scales_per_group * w.scale_bytes, g);
  if (w.zero_kind != ZeroKind::kNone) prefetch_row(w, strip, w.zeros_offset, 16 * w.zero_bytes, g);
}
