// Prefetching for kernels that read several strips at a time. Included inside a namespace per ISA, after V.

// One block of every strip, at `offset` from where it begins, into the second level of cache: what runs past the end of a
// weight does least harm there.
template <int kBits, int NR>
LOWBIT_UNROLLED inline void prefetch_blocks(const WeightView& w, const uint8_t* const (&strip)[NR],
                                            int64_t offset) {
  // Where these strips end, the next to be read are NR strips further on.
  if (offset >= w.strip_bytes) offset += (NR - 1) * w.strip_bytes;
#pragma GCC unroll 4
  for (int s = 0; s < NR; ++s) {
    for (int line = 0; line < kBits; ++line)
      __builtin_prefetch(strip[s] + offset + 64 * line, 0, 2);
  }
}
