// From global memory into a stage (stages.h): the codes of a step, the rows of scales and zeros of the groups that it
// touches, and its columns of x. All by cp.async in pieces of 16 bytes; whoever calls commits and waits.
#pragma once

#include <cstdint>

#include "cuda/expand.cuh"
#include "cuda/params.h"
#include "cuda/ptx.cuh"
#include "cuda/scales.cuh"
#include "cuda/stages.h"

namespace lowbit::cuda {

inline constexpr int kStep = 64;  // K of a step
inline constexpr int kStepCells = kStep / kCellK;
inline constexpr int kRowPieces = kStep * 2 / 16;  // of 16 bytes, in a row of a step of x

// Bytes of x[token][16 bytes piece] in a stage. Rows are as long as all banks together, so a column of pieces would meet
// one bank; exclusive-or by the row spreads eight rows over all of them, for the copies and for ldmatrix.
__device__ constexpr int swizzled(int token, int piece) {
  return token * (kStep * 2) + ((piece ^ (token & 7)) << 4);
}

// Where the codes of a strip (the stage's first, second, ...) and the rows of the groups that a step touches (the first,
// second, ... of them) lie in a stage: bytes from its start.
template <Format kFormat>
__device__ constexpr int codes_at(int strip) {
  return strip * (kStepCells * Planes<kFormat>::kCellBytes);
}
__device__ inline int scales_at(const WeightParams& w, const StageLayout& layout, int strip,
                                int group) {
  return layout.scales + (strip * layout.groups + group) * w.scale_row_bytes;
}
__device__ inline int zeros_at(const WeightParams& w, const StageLayout& layout, int strip,
                               int group) {
  return layout.zeros + (strip * layout.groups + group) * w.zero_row_bytes;
}
__device__ inline GroupRows group_rows(const WeightParams& w, const StageLayout& layout,
                                       const uint8_t* stage, int strip, int group) {
  return {stage + scales_at(w, layout, strip, group), stage + zeros_at(w, layout, strip, group)};
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

// How a weight is read: once by this launch, or again for every tile of tokens. What is read once leaves the L2 first.
enum class Reuse { kNone, kTokens };

// Fetches one strip's part of steps, as one of kThreads threads that share the work. A thread's copies all have the same
// offset, so pointers carry it, and what a segment's steps have in common is computed once: with one token, there are
// hardly more instructions to spend on a step than decoding takes.
template <Format kFormat, int kThreads, Reuse kReuse>
class StripFetcher {
 public:
  static constexpr int kTileSteps = kTileK / kStep;

  __device__ StripFetcher(const WeightParams& w, const StageLayout& layout, int thread)
      : w_(w),
        layout_(layout),
        group_of_(w),
        offset_(16 * thread),
        policy_(ptx::policy_evict_first()) {}

  // The tile that a step lies in, as fetch() wants it.
  __device__ const uint8_t* tile(int strip, int step) const {
    return w_.data + strip * w_.strip_bytes + int64_t{step / kTileSteps} * w_.tile_bytes + offset_;
  }

  // Part `part` of a tile, which is step `step`, into a stage, as its strip `strip`. Scales that are not plain come as they
  // are stored, for expand().
  __device__ void fetch(const uint8_t* tile, uint32_t part, int step, uint8_t* stage,
                        int strip) const {
    uint8_t* const codes = stage + codes_at<kFormat>(strip);
    constexpr int low = kStripRows * kStep * P::kLow / 8, high = kStripRows * kStep * P::kHigh / 8;
    copy_block<low>(codes + offset_, tile + part * low);
    if constexpr (high > 0)
      copy_block<high>(codes + low + offset_, tile + kTileSteps * low + part * high);

    if (!w_.plain) return fetch_stored(tile, part, step, stage, strip);
    const uint32_t scale_row = static_cast<uint32_t>(w_.scale_row_bytes);
    const uint32_t zero_row = static_cast<uint32_t>(w_.zero_row_bytes);
    // In a tile, rows of the group past the last k exist, too. A table ends with its last group.
    uint32_t first = part * static_cast<uint32_t>(w_.groups_per_tile) / kTileSteps;
    int count = layout_.groups;
    if (w_.groups_per_tile == 0) {
      tile -= int64_t{step / kTileSteps} * w_.tile_bytes;  // the strip
      first = static_cast<uint32_t>(group_of_(step * kStepCells));
      const int left = w_.groups - static_cast<int>(first);
      count = left < count ? left : count;
    }
    copy_rows(stage + scales_at(w_, layout_, strip, 0) + offset_,
              tile + w_.scales_offset + first * scale_row, count * w_.scale_row_bytes);
    if (w_.zero_row_bytes != 0)
      copy_rows(stage + zeros_at(w_, layout_, strip, 0) + offset_,
                tile + w_.zeros_offset + first * zero_row, count * w_.zero_row_bytes);
  }

  // Floats of what was fetched for a step of a weight that is not plain, by the threads that fetched it; where nothing was,
  // of what lies there, for nobody. They all must have seen it arrive, and no one reads scales before these are all done.
  __device__ void expand(int step, uint8_t* stage, int strip) const {
    const int first = group_of_(step * kStepCells), left = w_.groups - first;
    expand_rows<kThreads>(w_, layout_, stage, strip, first, left, offset_ / 16);
  }

 private:
  using P = Planes<kFormat>;

  // The rows of scales, offsets and super scales of a step's groups, from where they stand in the layout.
  __device__ void fetch_stored(const uint8_t* tile, uint32_t part, int step, uint8_t* stage,
                               int strip) const {
    const uint8_t* const start = tile - int64_t{step / kTileSteps} * w_.tile_bytes;  // of the strip
    const int group = group_of_(step * kStepCells), left = w_.groups - group;
    uint32_t first = part * static_cast<uint32_t>(w_.groups_per_tile) / kTileSteps;
    if (w_.groups_per_tile == 0) {
      tile = start;
      first = static_cast<uint32_t>(group);
    }
    const int count = left < layout_.groups ? left : layout_.groups;
    const StoredRows to = stored_rows(w_, layout_, stage, strip);
    const WeightParams::Stored& from = w_.stored;
    copy_rows(to.scales + offset_, tile + w_.scales_offset + first * from.scale_row_bytes,
              count * from.scale_row_bytes);
    if (w_.zero_kind == ZeroKind::kInt) {  // bytes, which kernels read as they are
      copy_rows(stage + zeros_at(w_, layout_, strip, 0) + offset_,
                tile + w_.zeros_offset + first * w_.zero_row_bytes, count * w_.zero_row_bytes);
    } else if (from.zero_row_bytes != 0) {
      copy_rows(to.offsets + offset_, tile + w_.zeros_offset + first * from.zero_row_bytes,
                count * from.zero_row_bytes);
    }
    if (layout_.supers == 0) return;
    const int64_t row = group >> w_.supers.shift;
    const int rows = ((group + count - 1) >> w_.supers.shift) - static_cast<int>(row) + 1;
    const int bytes = w_.supers.row_bytes;
    copy_rows(to.supers + offset_, start + w_.supers.offset + row * bytes, rows * bytes);
    if (w_.zero_kind == ZeroKind::kOffset)
      copy_rows(to.super_zeros + offset_, start + w_.super_zeros.offset + row * bytes,
                rows * bytes);
  }

  __device__ void copy(uint8_t* to, const uint8_t* from) const {
    if constexpr (kReuse == Reuse::kNone) {
      ptx::cp_async_16_once(to, from, policy_);
    } else {
      ptx::cp_async_16(to, from, 16);
    }
  }

  template <int kBytes>
  __device__ void copy_block(uint8_t* to, const uint8_t* from) const {
    constexpr int all = 16 * kThreads;
#pragma unroll
    for (int at = 0; at < kBytes; at += all) {
      if (kBytes % all == 0 || inside(at + offset_, kBytes)) copy(to + at, from + at);
    }
  }

  // Mostly one piece for some of the threads.
  __device__ void copy_rows(uint8_t* to, const uint8_t* from, int bytes) const {
    constexpr int all = 16 * kThreads;
    if (inside(offset_, bytes)) copy(to, from);
    if (bytes <= all) return;
#pragma unroll 1
    for (int at = all; inside(at + offset_, bytes); at += all) copy(to + at, from + at);
  }

  const WeightParams& w_;
  const StageLayout& layout_;
  const GroupOfCell group_of_;
  const int offset_;
  const uint64_t policy_;
};

// Fetches kTokens rows of x, 64 columns at a time, as one of kThreads threads. What is past M or past K is not read.
// Columns past K become zeros, for the padding of weights to meet. Rows past M are cleared once, in every stage: their
// sums are never stored, but zeros take less power to multiply than what happens to lie there.
template <int kTokens, int kThreads>
class TokenFetcher {
 public:
  __device__ TokenFetcher(const RowsParams& x, int K, int thread)
      : x_(x), K_(K), piece_(thread % kRowPieces), first_(thread / kRowPieces) {}

  // `stage_x` is x in the first stage.
  __device__ void start(int m0, uint8_t* stage_x, int stages, int stage_bytes) {
    rows_ = x_.M - m0 - first_;
    if (kTokens <= x_.M - m0) return;
    for (int stage = 0; stage < stages; ++stage, stage_x += stage_bytes) {
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        if (!inside(j * kApart, rows_))
          *reinterpret_cast<uint4*>(stage_x + place(j)) = make_uint4(0, 0, 0, 0);
      }
    }
  }

  // This thread's first piece of a step, as fetch() wants it.
  __device__ const uint8_t* row(int m0, int step) const {
    return static_cast<const uint8_t*>(x_.data) + (m0 + first_) * x_.stride * 2 + 16 * piece_ +
           int64_t{step} * (kStep * 2);
  }

  __device__ void fetch(const uint8_t* row, int step, uint8_t* to) const {
    const int left = 2 * (K_ - step * kStep);  // bytes of a row
    if (!inside(left, kStep * 2)) {
#pragma unroll
      for (int j = 0; j < kEach; ++j, row += kApart * 2 * x_.stride) {
        if (inside(j * kApart, rows_)) ptx::cp_async_16(to + place(j), row, 16);
      }
    } else {
      fetch_last(row, left - 16 * piece_, to);
    }
  }

 private:
  static constexpr int kEach =
      kTokens * kRowPieces / kThreads;                  // pieces of a step, for each thread
  static constexpr int kApart = kThreads / kRowPieces;  // rows between them
  static_assert(kEach * kApart == kTokens, "each thread has one column of pieces");

  // A copy of part of 16 bytes takes more instructions: only where K ends.
  __device__ void fetch_last(const uint8_t* from, int left, uint8_t* to) const {
    const int bytes = left < 0 ? 0 : left < 16 ? left : 16;
    if (bytes == 0) from = static_cast<const uint8_t*>(x_.data);  // not read
    const int64_t apart = bytes == 0 ? 0 : kApart * 2 * x_.stride;
#pragma unroll 1
    for (int j = 0; inside(j * kApart, kTokens); ++j, from += apart) {
      if (inside(j * kApart, rows_)) ptx::cp_async_16(to + place(j), from, bytes);
    }
  }

  __device__ int place(int j) const { return swizzled(first_ + j * kApart, piece_); }

  const RowsParams& x_;
  const int K_, piece_, first_;
  int rows_ = 0;  // from this thread's first one to the last of x
};

}  // namespace lowbit::cuda
