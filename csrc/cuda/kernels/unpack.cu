// cuda_tile64 -> canonical tensors: the inverse of pack.cu, to the bit.
#include "common/check.h"
#include "cuda/kernels/pack.cuh"

namespace lowbit::cuda {
namespace {

// Codes (n, k) and (n, k + 1) of a tile in shared memory, each in a half; k is even.
template <int kPlaneBits>
__device__ uint32_t plane_pair(const uint8_t* plane, int n, int k) {
  const PairPlace place = code_place(n, k, kPlaneBits);
  const uint32_t word = reinterpret_cast<const uint32_t*>(plane)[place.word];
  return word >> place.shift & ((1u << kPlaneBits) - 1u) * 0x00010001u;
}

template <int kBits>
__device__ uint32_t tile_pair(const uint8_t* tile, int n, int k) {
  using P = BitPlanes<kBits>;
  uint32_t pair = plane_pair<P::kLow>(tile, n, k);
  if constexpr (P::kHigh > 0) pair |= plane_pair<P::kHigh>(tile + P::kHighOffset, n, k) << P::kLow;
  return pair;
}

// Eight codes are kBits whole bytes: a thread's unit of work. Codes past K are 0 in either layout.
template <int kBits>
__device__ void fill_stage(const uint8_t* tile, uint8_t* stage) {
  for (int i = static_cast<int>(threadIdx.x); i < kStripRows * kTileK / 8; i += kPackThreads) {
    const int n = i / (kTileK / 8), k = i % (kTileK / 8) * 8;
    uint64_t bits = 0;
    for (int j = 0; j < 8; j += 2) {
      const uint32_t pair = tile_pair<kBits>(tile, n, k + j);
      const uint64_t even = pair & 0xffffu, odd = pair >> 16;
      bits |= (even | odd << kBits) << (j * kBits);
    }
    uint8_t* to = stage + n * Stage<kBits>::kStride + k / 8 * kBits;
    for (int b = 0; b < kBits; ++b) to[b] = static_cast<uint8_t>(bits >> (8 * b));
  }
}

template <int kBits>
__device__ void store_stage(const CanonicalParams& c, uint8_t* packed, int64_t row0,
                            int64_t column_byte, bool aligned, const uint8_t* stage) {
  using S = Stage<kBits>;
  for (int i = static_cast<int>(threadIdx.x); i < kStripRows * kBits; i += kPackThreads) {
    const int row = i / kBits, at = i % kBits * 16;
    if (!inside(row0 + row, c.N)) continue;
    const uint8_t* from = stage + row * S::kStride + at;
    uint8_t* to = packed + (row0 + row) * c.row_bytes + column_byte + at;
    const int64_t left = c.row_bytes - column_byte - at;
    if (aligned && inside(15, left)) {
      const uint32_t* words = reinterpret_cast<const uint32_t*>(from);
      *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
    } else {
      for (int b = 0; b < 16; ++b) {
        if (inside(b, left)) to[b] = from[b];
      }
    }
  }
}

__device__ void read_table(const uint8_t* strip, const Table& table, int64_t N, int64_t groups,
                           int64_t row0, int bytes, uint8_t* to) {
  for (int i = static_cast<int>(threadIdx.x); i < table.count * kStripRows; i += kPackThreads) {
    const int group = table.first + i / kStripRows, p = i % kStripRows;
    const int64_t row = row0 + scale_position(p);
    if (inside(row, N) && inside(group, groups)) {
      copy_bytes(
          to + (row * groups + group) * bytes,
          strip + table.offset + i / kStripRows * static_cast<int64_t>(table.row_bytes) + p * bytes,
          bytes);
    }
  }
}

__device__ void read_scales(const WeightParams& w, const PackPlace& place, const uint8_t* strip,
                            const CanonicalOut& to) {
  const int64_t row0 = place.strip * kStripRows;
  const int bytes = scale_bytes(w.scale_dtype);
  const Table table = table_of(w, place.index, w.scales_offset, w.scale_row_bytes);
  uint8_t* scales = static_cast<uint8_t*>(to.scales);
  if (!w.one_scale) {
    read_table(strip, table, w.N, w.groups, row0, bytes, scales);
  } else if (row0 % 128 == 0 && static_cast<int>(threadIdx.x) < bytes) {
    // Two strips hold a block row's scale: the first one writes it.
    scales[(row0 / 128 * w.groups + table.first) * bytes + threadIdx.x] =
        strip[table.offset + threadIdx.x];
  }
  if (w.zero_row_bytes > 0) {
    read_table(strip, table_of(w, place.index, w.zeros_offset, w.zero_row_bytes), w.N, w.groups,
               row0, w.zero_row_bytes / kStripRows, static_cast<uint8_t*>(to.zeros));
  }
}

// Shared memory: the tile's codes as they lie, then the stage.
template <int kBits>
__global__ void __launch_bounds__(kPackThreads)
    unpack_kernel(const WeightParams w, const CanonicalParams c, const CanonicalOut to,
                  bool aligned) {
  const PackPlace place = pack_place(w);
  const uint8_t* strip = w.data + place.strip * w.strip_bytes;
  if (place.index < w.tiles) {
    constexpr int kCodesBytes = 1024 * kBits;
    uint8_t* codes = dynamic_shared();
    uint8_t* stage = codes + kCodesBytes;
    const uint4* from =
        reinterpret_cast<const uint4*>(strip + place.index * static_cast<int64_t>(w.tile_bytes));
    for (int i = static_cast<int>(threadIdx.x); i < kCodesBytes / 16; i += kPackThreads)
      reinterpret_cast<uint4*>(codes)[i] = ptx::load_once(from + i);
    ptx::sync_block();
    const int64_t k0 = place.index * static_cast<int64_t>(kTileK);
    fill_stage<kBits>(codes, stage);
    ptx::sync_block();
    store_stage<kBits>(c, to.packed, place.strip * kStripRows, k0 / 8 * kBits, aligned, stage);
    if (w.groups_per_tile == 0) return;
  }
  read_scales(w, place, strip, to);
}

struct Unpack {
  const WeightParams& w;
  const CanonicalParams& shape;
  const CanonicalOut& to;
  Stream stream;

  template <int kBits>
  void run() const {
    launch("unpack", unpack_kernel<kBits>, pack_grid(w), kPackThreads,
           1024 * kBits + Stage<kBits>::kBytes, stream, w, shape, to,
           is_aligned(to.packed, shape.row_bytes, 16));
  }
};

}  // namespace

void launch_unpack(const WeightParams& w, const CanonicalParams& shape, const CanonicalOut& to,
                   Stream stream) {
  with_bits(w.bits, Unpack{w, shape, to, stream});
  if (w.shared_super)
    copy_perm("unpack_super", reinterpret_cast<const int32_t*>(w.data + w.supers.offset),
              reinterpret_cast<int32_t*>(to.super_scale), 1, stream);
  if (w.perm != nullptr) copy_perm("unpack_perm", w.perm, to.perm, w.K, stream);
}

}  // namespace lowbit::cuda
