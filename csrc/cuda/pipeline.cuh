// From global memory into a stage (stages.h): the codes of a step, the rows of scales and zeros of the groups that it
// touches, and its columns of x. All by cp.async in pieces of 16 bytes; whoever calls commits and waits.
#pragma once

#include <cstdint>

#include "cuda/params.h"
#include "cuda/ptx.cuh"
#include "cuda/scales.cuh"
#include "cuda/stages.h"

namespace lowbit::cuda {

inline constexpr int kStep = 64;                 // K of a step
inline constexpr int kStepCells = kStep / kCellK;
inline constexpr int kRowPieces = kStep * 2 / 16;  // of 16 bytes, in a row of a step of x

// Bytes of x[token][16 bytes piece] in a stage. Rows are as long as all banks together, so a column of pieces would meet
// one bank; exclusive-or by the row spreads eight rows over all of them, for the copies and for ldmatrix.
__device__ constexpr int swizzled(int token, int piece) {
  return token * (kStep * 2) + ((piece ^ (token & 7)) << 4);
}

// Waits until the oldest of `stages - 1` steps has arrived. The instruction takes a constant.
__device__ inline void wait_for_oldest(int stages) {
  if (stages == 2) {
    ptx::cp_async_wait<0>();
  } else if (stages == 3) {
    ptx::cp_async_wait<1>();
  } else {
    ptx::cp_async_wait<2>();
  }
}

// A copy that kThreads threads share. Weights that are used up by one pass are marked to leave the L2 first; those that
// other tiles of tokens will read again are not.
template <int kThreads>
struct Copier {
  int thread;
  uint64_t policy;
  bool once;

  __device__ Copier(int thread, bool once)
      : thread(thread), policy(ptx::policy_evict_first()), once(once) {}

  __device__ void piece(uint8_t* to, const uint8_t* from) const {
    if (once) {
      ptx::cp_async_16_once(to, from, policy);
    } else {
      ptx::cp_async_16(to, from, 16);
    }
  }
  // kBytes, known to the compiler.
  template <int kBytes>
  __device__ void block(uint8_t* to, const uint8_t* from) const {
    constexpr int pieces = kBytes / 16;
#pragma unroll
    for (int first = 0; first < pieces; first += kThreads) {
      const int i = first + thread;
      if (pieces % kThreads == 0 || inside(i, pieces)) piece(to + 16 * i, from + 16 * i);
    }
  }
  // Rows of scales: few, and as many as the weight says.
  __device__ void rows(uint8_t* to, const uint8_t* from, int bytes) const {
    for (int i = thread; inside(16 * i, bytes); i += kThreads) piece(to + 16 * i, from + 16 * i);
  }
};

// The groups that a step touches.
struct StepGroups {
  int first, count;
};
__device__ inline StepGroups groups_of_step(const WeightParams& w, const GroupOfCell& group_of,
                                            int step) {
  const int first = group_of(step * kStepCells);
  const int cells = (w.K + kCellK - 1) / kCellK;
  const int last_cell = step * kStepCells + kStepCells - 1;
  const int last = group_of(last_cell < cells ? last_cell : cells - 1);
  return {first, last - first + 1};
}

// One strip's part of a step: codes to `codes`, its groups' rows to `scales` and `zeros`.
template <Format kFormat, int kThreads>
__device__ void fetch_strip(const WeightParams& w, int strip, int step, const StepGroups& groups,
                            const Copier<kThreads>& copy, uint8_t* codes, uint8_t* scales,
                            uint8_t* zeros) {
  using P = Planes<kFormat>;
  constexpr int steps = kTileK / kStep;  // of a tile
  constexpr int low = kStripRows * kStep * P::kLow / 8, high = kStripRows * kStep * P::kHigh / 8;
  const uint8_t* strip_data = w.data + strip * w.strip_bytes;
  const uint8_t* tile = strip_data + int64_t{step / steps} * w.tile_bytes;
  const int part = step % steps;
  copy.template block<low>(codes, tile + part * low);
  if constexpr (high > 0) copy.template block<high>(codes + low, tile + steps * low + part * high);

  // Scales that stand in tiles are those of one tile: a step never crosses into the next.
  const bool in_tile = w.groups_per_tile != 0;
  const uint8_t* base = in_tile ? tile : strip_data;
  const int64_t first = in_tile ? groups.first - step / steps * w.groups_per_tile : groups.first;
  copy.rows(scales, base + w.scales_offset + first * w.scale_row_bytes,
            groups.count * w.scale_row_bytes);
  copy.rows(zeros, base + w.zeros_offset + first * w.zero_row_bytes,
            groups.count * w.zero_row_bytes);
}

// Columns [step * 64, step * 64 + 64) of kTokens rows of x from row m0 on, swizzled. Rows past M and columns past K become
// zeros, and are not read: a weight that was padded meets a zero, and a NaN beside the tensor meets nobody.
template <int kTokens, int kThreads>
__device__ void fetch_tokens(const RowsParams& x, int K, int m0, int step, int thread,
                             uint8_t* to) {
  constexpr int pieces = kTokens * kRowPieces;
  static_assert(pieces % kThreads == 0 && kThreads % kRowPieces == 0, "each thread one column of pieces");
  const int piece = thread % kRowPieces, first = thread / kRowPieces;
  const int left = 2 * (K - step * kStep) - 16 * piece;
  const int wanted = left < 0 ? 0 : left < 16 ? left : 16;
  const uint8_t* data = static_cast<const uint8_t*>(x.data);
#pragma unroll
  for (int j = 0; j < pieces / kThreads; ++j) {
    const int token = first + j * (kThreads / kRowPieces);
    const int bytes = inside(m0 + token, x.M) ? wanted : 0;
    const int64_t offset = ((m0 + token) * x.stride + step * kStep) * 2 + 16 * piece;
    ptx::cp_async_16(to + swizzled(token, piece), data + (bytes > 0 ? offset : 0), bytes);
  }
}

}  // namespace lowbit::cuda
