// The numbers that selection goes by, one row per tile shape, each with what it rests on. A measurement is quoted with
// its device; "unmeasured" is what stands there before there is one. To measure, force kernels (select.h) over a range
// of M: bench/device_check.sh does.
#pragma once

#include <cstdint>

namespace lowbit::cuda {

struct Tuning {
  const char* tile;   // name in kTiles
  int64_t most_rows;  // of x; beyond, the next row of the table is preferred
  int min_steps;  // of K that a block must have to itself where a tile is shared among blocks (schedule.h)
  int most_sharers;  // blocks that share one tile
  const char* because;
};

inline constexpr int64_t kAnyRows = int64_t{1} << 62;

inline constexpr const char* kDecodesAgain =
    "unmeasured: one tile of tokens; a second one decodes every weight again";
inline constexpr const char* kDecodesOnce =
    "unmeasured: one tile of tokens; a wider one decodes every weight once";

inline constexpr Tuning kTuning[] = {
    // tile          most rows  steps sharers
    {"hopper_stream_m8", 8, 1, 8, kDecodesAgain},
    {"hopper_stream_m16", 16, 1, 8, kDecodesAgain},
    {"stream_m8", 8, 8, 16, kDecodesAgain},
    {"stream_m16", 16, 8, 16, kDecodesAgain},
    {"hopper_matrix_m64", 64, 4, 8, kDecodesOnce},
    // Of 256 rows x 128 tokens and 128 x 256, the first reads less, the second decodes less.
    {"hopper_matrix_m128", kAnyRows, 8, 4, "unmeasured: partial sums are 128 KB each way"},
    {"hopper_matrix_m256", kAnyRows, 8, 4, "unmeasured: partial sums are 128 KB each way"},
    {"matrix_m32", 32, 8, 8, kDecodesOnce},
    {"matrix_m64", 64, 8, 8, kDecodesOnce},
    {"matrix_m128", kAnyRows, 16, 4, "unmeasured: partial sums are 128 KB each way"},
    {"hopper_a8_int_m64", 64, 4, 8, kDecodesOnce},
    {"hopper_a8_int_m128", kAnyRows, 4, 8, "unmeasured: partial sums are 64 KB each way"},
    {"hopper_a8_fp8_m64", 64, 4, 8, kDecodesOnce},
    {"hopper_a8_fp8_m128", kAnyRows, 4, 8, "unmeasured: partial sums are 64 KB each way"},
    {"a8_int_m16", 16, 8, 16, kDecodesAgain},
    {"a8_int_m64", 64, 8, 8, kDecodesOnce},
    {"a8_int_m128", kAnyRows, 16, 4, "unmeasured: partial sums are 64 KB each way"},
    {"a8_fp8_m16", 16, 8, 16, kDecodesAgain},
    {"a8_fp8_m64", kAnyRows, 8, 8, "unmeasured: partial sums are 32 KB each way"},
    {"a8_decode_m64", kAnyRows, 8, 8, "unmeasured: partial sums are 32 KB each way"},
    {"grad_m64", kAnyRows, 8, 8, "unmeasured: partial sums are 32 KB each way"},
};

// What the decode kernel for Hopper weighs when it cuts a problem (hopper_plan.cpp), in bytes of weights that could be read
// meanwhile. Unmeasured: 4.3 TB/s are 33 bytes per nanosecond and multiprocessor.
struct HopperTuning {
  double token_bytes;    // a byte of x, from the L2
  double block_bytes;    // starting a block, and its last stores
  double cluster_bytes;  // each doubling of a cluster: its barriers, and its exchange
  double lone_block;     // reading slows by this where a multiprocessor has a single block
};
inline constexpr HopperTuning kHopperTuning = {0.5, 8192, 4096, 1.2};

// The same of kernels of warpgroups (box_plan.cpp), in cycles. Unmeasured: 5.5 TB/s of the L2 for 132 multiprocessors at 1.75 GHz.
struct BoxTuning {
  double bytes_per_cycle;  // that a multiprocessor gets of the L2
  double
      cluster_cost;  // steps slow by this part for each doubling of a cluster, whose blocks wait for each other
};
inline constexpr BoxTuning kBoxTuning = {24.0, 0.02};

// Kernels for Hopper have run in the emulator only, and a mistake that it cannot show may hang a device. They stand aside,
// where nothing forces them, until a sweep (bench/sweep.py) has found them right and faster on one.
inline constexpr const char* kUnmeasured =
    "unmeasured: stands aside until bench/sweep.py has compared it on such a device";

}  // namespace lowbit::cuda
