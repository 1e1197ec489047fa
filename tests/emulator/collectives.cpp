// What the lanes of a warp do together: barriers, exchange, and matrices with their fragments as drawn in ptx.cuh.

#include <cstring>

#include "common/check.h"
#include "emulator/scheduler.h"
#include "formats/codebooks.h"

// Plain arithmetic on local arrays: sanitizers would only slow it down.
#define LOWBIT_ARITHMETIC __attribute__((no_sanitize("address", "undefined"), optimize("O3")))

namespace lowbit::emulator {
namespace {

using Operands = void* const (&)[kLanes];

// ---- exchange ----------------------------------------------------------------------------------------------------------

struct Shuffle {
  uint64_t value;
  int from;  // lane
  uint64_t result;
};

void run_shuffle(Operands operands) {
  for (void* operand : operands) {
    auto& lane = *static_cast<Shuffle*>(operand);
    lane.result = static_cast<Shuffle*>(operands[lane.from])->value;
  }
}

struct Any {
  bool value, result;
};

void run_any(Operands operands) {
  bool any = false;
  for (void* operand : operands) any = any || static_cast<Any*>(operand)->value;
  for (void* operand : operands) static_cast<Any*>(operand)->result = any;
}

constexpr Collective kSyncWarp = {"sync_warp", nullptr};
constexpr Collective kShuffle = {"shuffle", run_shuffle};
constexpr Collective kShuffleXor = {"shuffle_xor", run_shuffle};
constexpr Collective kAny = {"any_lane", run_any};

template <class T>
T exchange(const Collective& collective, T value, int from, Site at) {
  Shuffle lane{0, from & (kLanes - 1), 0};
  std::memcpy(&lane.value, &value, sizeof value);
  meet(collective, &lane, at);
  std::memcpy(&value, &lane.result, sizeof value);
  return value;
}

int this_lane() { return this_thread().index % kLanes; }

// ---- 8x8 matrices ------------------------------------------------------------------------------------------------------

struct Rows {
  uint16_t row[8];   // what this lane's address points to
  uint32_t* result;  // [4], or [1] for movmatrix
  uint32_t value;    // of movmatrix
};

const Rows& rows_of(Operands operands, int lane) { return *static_cast<Rows*>(operands[lane]); }

template <bool kTransposed>
void run_ldmatrix(Operands operands) {
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint32_t low, high;
      if (kTransposed) {
        low = rows_of(operands, 8 * matrix + 2 * t).row[g];
        high = rows_of(operands, 8 * matrix + 2 * t + 1).row[g];
      } else {
        low = rows_of(operands, 8 * matrix + g).row[2 * t];
        high = rows_of(operands, 8 * matrix + g).row[2 * t + 1];
      }
      rows_of(operands, lane).result[matrix] = low | high << 16;
    }
  }
}

void run_movmatrix(Operands operands) {
  uint16_t element[8][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const uint32_t value = rows_of(operands, lane).value;
    element[lane / 4][2 * (lane % 4)] = static_cast<uint16_t>(value);
    element[lane / 4][2 * (lane % 4) + 1] = static_cast<uint16_t>(value >> 16);
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    *rows_of(operands, lane).result =
        element[2 * t][g] | static_cast<uint32_t>(element[2 * t + 1][g]) << 16;
  }
}

constexpr Collective kLdmatrix = {"ldmatrix_x4", run_ldmatrix<false>};
constexpr Collective kLdmatrixTransposed = {"ldmatrix_x4_transposed", run_ldmatrix<true>};
constexpr Collective kMovmatrix = {"movmatrix_transposed", run_movmatrix};

// The row is read when its lane arrives and not when the last one does: what other lanes have yet to write is then missing,
// as it may be on a GPU when no sync_warp stands between.
void load_matrices(const Collective& collective, uint32_t (&r)[4], const void* row, Site at) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) {
    fail_here(concat(collective.name, ": the row's address is not aligned to 16 bytes"), at);
  }
  if (!is_shared(row, 16)) {
    fail_here(concat(collective.name, ": a row at byte ",
                     static_cast<const uint8_t*>(row) - current->shared, " of the ",
                     current->shared_bytes, " bytes of shared memory"),
              at);
  }
  Rows lane{{}, r, 0};
  std::memcpy(lane.row, row, sizeof lane.row);
  meet(collective, &lane, at);
}

// ---- mma ---------------------------------------------------------------------------------------------------------------

constexpr int kRows = 16, kColumns = 8;

template <class Accumulator>
struct Mma {
  Accumulator* d;
  const uint32_t* a;
  uint32_t b[2];
};

struct HalfNumbers {
  using Stored = uint16_t;
  static float value(uint32_t bits) { return half_value(bits); }
};
struct BFloat16Numbers {
  using Stored = uint16_t;
  static float value(uint32_t bits) { return bfloat16_value(bits); }
};
struct SignedBytes {
  using Stored = uint8_t;
  static float value(uint32_t bits) { return static_cast<float>(static_cast<int8_t>(bits)); }
};
struct UnsignedBytes {
  using Stored = uint8_t;
  static float value(uint32_t bits) { return static_cast<float>(bits); }
};
struct E4m3Numbers {
  using Stored = uint8_t;
  static float value(uint32_t bits) { return fp8_e4m3_code()[bits]; }
};
struct E5m2Numbers {
  using Stored = uint8_t;
  static float value(uint32_t bits) { return fp8_e5m2_code()[bits]; }
};

// d[16][8] += a[16][kK] b[kK][8]. Products of these formats are exact in fp32, and sums of 32 products of bytes are too.
template <int kK>
LOWBIT_ARITHMETIC void multiply(const float (&a)[kRows][kK], const float (&b)[kK][kColumns],
                                float (&d)[kRows][kColumns]) {
  for (int m = 0; m < kRows; ++m) {
    float sum[kColumns];
    for (int n = 0; n < kColumns; ++n) sum[n] = d[m][n];
    for (int k = 0; k < kK; ++k) {
      for (int n = 0; n < kColumns; ++n) sum[n] += a[m][k] * b[k][n];
    }
    for (int n = 0; n < kColumns; ++n) d[m][n] = sum[n];
  }
}

// A register holds neighbours along K: two 16-bit numbers, or four bytes. kK is 16 or 32 accordingly.
template <class A, class B, class Accumulator>
LOWBIT_ARITHMETIC void run_mma(Operands operands) {
  using Stored = typename A::Stored;
  constexpr int kPer = 4 / sizeof(Stored);
  constexpr int kK = 8 * kPer;
  Stored stored_a[kRows][kK], stored_b[kColumns][kK];
  float d[kRows][kColumns];
  for (int l = 0; l < kLanes; ++l) {
    const auto& lane = *static_cast<const Mma<Accumulator>*>(operands[l]);
    const int g = l / 4, t = l % 4;
    std::memcpy(&stored_a[g][kPer * t], &lane.a[0], 4);
    std::memcpy(&stored_a[g + 8][kPer * t], &lane.a[1], 4);
    std::memcpy(&stored_a[g][kPer * (t + 4)], &lane.a[2], 4);
    std::memcpy(&stored_a[g + 8][kPer * (t + 4)], &lane.a[3], 4);
    std::memcpy(&stored_b[g][kPer * t], &lane.b[0], 4);
    std::memcpy(&stored_b[g][kPer * (t + 4)], &lane.b[1], 4);
    for (int i = 0; i < 4; ++i) {
      d[g + 8 * (i / 2)][2 * t + i % 2] =
          std::is_same<Accumulator, float>::value ? static_cast<float>(lane.d[i]) : 0.0f;
    }
  }
  float a[kRows][kK], b[kK][kColumns];
  for (int m = 0; m < kRows; ++m) {
    for (int k = 0; k < kK; ++k) a[m][k] = A::value(stored_a[m][k]);
  }
  for (int k = 0; k < kK; ++k) {
    for (int n = 0; n < kColumns; ++n) b[k][n] = B::value(stored_b[n][k]);
  }
  multiply<kK>(a, b, d);
  for (int l = 0; l < kLanes; ++l) {
    const auto& lane = *static_cast<const Mma<Accumulator>*>(operands[l]);
    const int g = l / 4, t = l % 4;
    for (int i = 0; i < 4; ++i) {
      const float sum = d[g + 8 * (i / 2)][2 * t + i % 2];
      if (std::is_same<Accumulator, float>::value) {
        lane.d[i] = static_cast<Accumulator>(sum);
      } else {  // int32 sums wrap around
        lane.d[i] = static_cast<Accumulator>(static_cast<uint32_t>(lane.d[i]) +
                                             static_cast<uint32_t>(static_cast<int32_t>(sum)));
      }
    }
  }
}

constexpr Collective kMmaF16 = {"mma_f16", run_mma<HalfNumbers, HalfNumbers, float>};
constexpr Collective kMmaBf16 = {"mma_bf16", run_mma<BFloat16Numbers, BFloat16Numbers, float>};
constexpr Collective kMmaS8 = {"mma_s8", run_mma<SignedBytes, SignedBytes, int32_t>};
constexpr Collective kMmaU8S8 = {"mma_u8s8", run_mma<UnsignedBytes, SignedBytes, int32_t>};
constexpr Collective kMmaE4m3 = {"mma_e4m3", run_mma<E4m3Numbers, E4m3Numbers, float>};
constexpr Collective kMmaE5m2 = {"mma_e5m2", run_mma<E5m2Numbers, E4m3Numbers, float>};

template <class Accumulator>
void meet_mma(const Collective& collective, Accumulator (&d)[4], const uint32_t (&a)[4],
              uint32_t b0, uint32_t b1, Site at) {
  Mma<Accumulator> lane{d, a, {b0, b1}};
  meet(collective, &lane, at);
}

void check_fp8(const Collective& collective, Site at) {
  const int capability = this_thread().block->settings.capability;
  if (capability < 89)
    fail_here(concat(collective.name, " needs sm_89, this is sm_", capability), at);
}

}  // namespace

void sync_some(int id, int threads, Site at) { meet_some(id, threads, at); }

}  // namespace lowbit::emulator

namespace lowbit::cuda::ptx {

using namespace emulator;

void sync_block(Site at) { meet_block(at); }
void sync_warp(Site at) { meet(kSyncWarp, nullptr, at); }

uint32_t shuffle(uint32_t value, int lane, Site at) { return exchange(kShuffle, value, lane, at); }
float shuffle(float value, int lane, Site at) { return exchange(kShuffle, value, lane, at); }
double shuffle(double value, int lane, Site at) { return exchange(kShuffle, value, lane, at); }
uint32_t shuffle_xor(uint32_t value, int mask, Site at) {
  return exchange(kShuffleXor, value, this_lane() ^ mask, at);
}
float shuffle_xor(float value, int mask, Site at) {
  return exchange(kShuffleXor, value, this_lane() ^ mask, at);
}
bool any_lane(bool value, Site at) {
  Any lane{value, false};
  meet(kAny, &lane, at);
  return lane.result;
}

void ldmatrix_x4(uint32_t (&r)[4], const void* row, Site at) {
  load_matrices(kLdmatrix, r, row, at);
}
void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row, Site at) {
  load_matrices(kLdmatrixTransposed, r, row, at);
}
uint32_t movmatrix_transposed(uint32_t value, Site at) {
  uint32_t result = 0;
  Rows lane{{}, &result, value};
  meet(kMovmatrix, &lane, at);
  return result;
}

void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site at) {
  meet_mma(kMmaF16, d, a, b0, b1, at);
}
void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site at) {
  meet_mma(kMmaBf16, d, a, b0, b1, at);
}
void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site at) {
  meet_mma(kMmaS8, d, a, b0, b1, at);
}
void mma_u8s8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site at) {
  meet_mma(kMmaU8S8, d, a, b0, b1, at);
}
void mma_e4m3(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site at) {
  check_fp8(kMmaE4m3, at);
  meet_mma(kMmaE4m3, d, a, b0, b1, at);
}
void mma_e5m2(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site at) {
  check_fp8(kMmaE5m2, at);
  meet_mma(kMmaE5m2, d, a, b0, b1, at);
}

}  // namespace lowbit::cuda::ptx
