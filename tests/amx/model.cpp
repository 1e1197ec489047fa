// The tile instructions as Intel's manual defines them (volume 2, TDPBF16PS, TDPBSUD, LDTILECFG, ...), for palette 1:
// eight tiles of up to 16 rows of 64 bytes. State is per thread, as the hardware's is.

#include "amx/model.h"

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <string>
#include <thread>

#include "cpu/kernels/amx.h"

namespace amx_model {
namespace {

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;

struct State {
  bool configured = false;
  int rows[kTiles] = {}, row_bytes[kTiles] = {};
  alignas(64) uint8_t tile[kTiles][kRows][kRowBytes] = {};
};
thread_local State state;

// The first error since the last reset, of any thread.
std::mutex error_mutex;
std::string error;

template <class... Args>
void fail(const char* format, Args... args) {
  char text[200];
  std::snprintf(text, sizeof text, format, args...);
  const std::lock_guard<std::mutex> lock(error_mutex);
  if (error.empty()) error = text;
}

enum Count { kConfigs, kLoads, kStores, kMultiplications, kCounts };
std::atomic<int64_t> counts[kCounts];

// #UD: no configuration, or none for this tile.
bool usable(const char* instruction, int tile) {
  if (tile < 0 || tile >= kTiles) {
    fail("%s: there is no tile %d", instruction, tile);
  } else if (!state.configured) {
    fail("%s: this thread has no tile configuration", instruction);
  } else if (state.rows[tile] == 0) {
    fail("%s: tile %d is not configured", instruction, tile);
  } else {
    return true;
  }
  return false;
}

bool multipliable(const char* instruction, int sums, int a, int b) {
  if (!usable(instruction, sums) || !usable(instruction, a) || !usable(instruction, b))
    return false;
  if (sums == a || sums == b || a == b) {
    fail("%s: tiles %d, %d, %d are not three", instruction, sums, a, b);
  } else if (state.rows[sums] != state.rows[a] || state.row_bytes[sums] != state.row_bytes[b] ||
             state.row_bytes[a] != 4 * state.rows[b]) {
    fail("%s: shapes do not fit: sums %d x %d bytes, a %d x %d, b %d x %d", instruction,
         state.rows[sums], state.row_bytes[sums], state.rows[a], state.row_bytes[a], state.rows[b],
         state.row_bytes[b]);
  } else {
    ++counts[kMultiplications];
    return true;
  }
  return false;
}

// Denormals are zeros, as operands and as results, whatever the thread's mode is; rounding is to the nearest.
class TileMode {
 public:
  TileMode() : before_(_mm_getcsr()) { _mm_setcsr(0x1f80u | 0x8040u); }
  ~TileMode() { _mm_setcsr(before_); }

 private:
  unsigned before_;
};

float bfloat(const uint8_t* p) {
  uint16_t half;
  std::memcpy(&half, p, 2);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

}  // namespace

void load_config(const void* config) {
  const uint8_t* bytes = static_cast<const uint8_t*>(config);
  ++counts[kConfigs];
  state = State{};
  if (bytes[0] != 1) return fail("ldtilecfg: palette %d is not 1", bytes[0]);
  for (int i = 1; i < 16; ++i) {
    if (bytes[i] != 0) return fail("ldtilecfg: byte %d is %d, not 0", i, bytes[i]);
  }
  for (int i = 0; i < 16; ++i) {
    const int row_bytes = bytes[16 + 2 * i] | bytes[17 + 2 * i] << 8, rows = bytes[48 + i];
    if (i >= kTiles ? rows != 0 || row_bytes != 0 : rows > kRows || row_bytes > kRowBytes)
      return fail("ldtilecfg: tile %d has %d rows of %d bytes", i, rows, row_bytes);
    if ((rows == 0) != (row_bytes == 0) || row_bytes % 4 != 0)
      return fail("ldtilecfg: tile %d has %d rows of %d bytes", i, rows, row_bytes);
    if (i < kTiles) {
      state.rows[i] = rows;
      state.row_bytes[i] = row_bytes;
    }
  }
  state.configured = true;
}

void release() { state = State{}; }

void load(int tile, const void* base, int64_t stride) {
  if (!usable("tileloadd", tile)) return;
  ++counts[kLoads];
  std::memset(state.tile[tile], 0, sizeof state.tile[tile]);
  for (int r = 0; r < state.rows[tile]; ++r) {
    std::memcpy(state.tile[tile][r], static_cast<const uint8_t*>(base) + r * stride,
                static_cast<size_t>(state.row_bytes[tile]));
  }
}

void store(int tile, void* base, int64_t stride) {
  if (!usable("tilestored", tile)) return;
  ++counts[kStores];
  for (int r = 0; r < state.rows[tile]; ++r) {
    std::memcpy(static_cast<uint8_t*>(base) + r * stride, state.tile[tile][r],
                static_cast<size_t>(state.row_bytes[tile]));
  }
}

void zero(int tile) {
  if (usable("tilezero", tile)) std::memset(state.tile[tile], 0, sizeof state.tile[tile]);
}

void dpbf16ps(int sums, int a, int b) {
  if (!multipliable("tdpbf16ps", sums, a, b)) return;
  const TileMode mode;
  const int depth = state.rows[b], columns = state.row_bytes[b] / 4;
  alignas(64) float even[kRows][16], odd[kRows][16];
  for (int k = 0; k < depth; ++k) {
    for (int n = 0; n < columns; ++n) {
      even[k][n] = bfloat(&state.tile[b][k][4 * n]);
      odd[k][n] = bfloat(&state.tile[b][k][4 * n + 2]);
    }
  }
  for (int m = 0; m < state.rows[sums]; ++m) {
    alignas(64) float first[16] = {}, second[16] = {}, total[16];
    for (int k = 0; k < depth; ++k) {
      const float x0 = bfloat(&state.tile[a][m][4 * k]), x1 = bfloat(&state.tile[a][m][4 * k + 2]);
      for (int n = 0; n < 16; ++n) first[n] = __builtin_fmaf(x0, even[k][n], first[n]);
      for (int n = 0; n < 16; ++n) second[n] = __builtin_fmaf(x1, odd[k][n], second[n]);
    }
    std::memcpy(total, state.tile[sums][m], 64);
    for (int n = 0; n < 16; ++n) total[n] += first[n] + second[n];
    std::memcpy(state.tile[sums][m], total, static_cast<size_t>(4 * columns));
  }
}

void dpbsud(int sums, int a, int b) {
  if (!multipliable("tdpbsud", sums, a, b)) return;
  const int depth = state.rows[b], columns = state.row_bytes[b] / 4;
  for (int m = 0; m < state.rows[sums]; ++m) {
    int32_t total[16];
    std::memcpy(total, state.tile[sums][m], 64);
    for (int k = 0; k < depth; ++k) {
      for (int j = 0; j < 4; ++j) {
        const int32_t x = static_cast<int8_t>(state.tile[a][m][4 * k + j]);
        // Sums wrap around.
        for (int n = 0; n < columns; ++n)
          total[n] = static_cast<int32_t>(static_cast<uint32_t>(total[n]) +
                                          static_cast<uint32_t>(x * state.tile[b][k][4 * n + j]));
      }
    }
    std::memcpy(state.tile[sums][m], total, static_cast<size_t>(4 * columns));
  }
}

// ---- what tests call -----------------------------------------------------------------------------------------------

namespace {

// The kernels, each with a look at what it leaves behind: tiles that stay in use slow down every later context switch.
void check_released(const char* kernel) {
  if (state.configured) fail("%s left its tile configuration loaded", kernel);
}
void gemm_codes(const lowbit::GemmJob& job, int64_t begin, int64_t end) {
  lowbit::amx_kernels().gemm_codes(job, begin, end);
  check_released("gemm_codes");
}
void gemm_weights(const lowbit::GemmJob& job, int64_t begin, int64_t end) {
  lowbit::amx_kernels().gemm_weights(job, begin, end);
  check_released("gemm_weights");
}
void gemm_i8(const lowbit::GemmJob& job, int64_t begin, int64_t end) {
  lowbit::amx_kernels().gemm_i8(job, begin, end);
  check_released("gemm_i8");
}

// A configuration with every tile 16 x 64 but `tile`.
void configure(int tile, int rows, int row_bytes, int palette = 1) {
  uint8_t config[64] = {static_cast<uint8_t>(palette)};
  for (int i = 0; i < kTiles; ++i) {
    config[16 + 2 * i] = static_cast<uint8_t>(i == tile ? row_bytes : 64);
    config[48 + i] = static_cast<uint8_t>(i == tile ? rows : 16);
  }
  load_config(config);
}

}  // namespace
}  // namespace amx_model

#define EXPORT extern "C" __attribute__((visibility("default")))

// What lowbit._C.set_extra_isa takes.
EXPORT const void* amx_model_kernels() {
  static lowbit::AmxKernels table = lowbit::amx_kernels();
  table.gemm_codes = amx_model::gemm_codes;
  table.gemm_weights = amx_model::gemm_weights;
  table.gemm_i8 = amx_model::gemm_i8;
  return &table;
}

EXPORT const char* amx_model_error() {
  static thread_local std::string copy;
  const std::lock_guard<std::mutex> lock(amx_model::error_mutex);
  copy = amx_model::error;
  return copy.c_str();
}

EXPORT void amx_model_reset() {
  const std::lock_guard<std::mutex> lock(amx_model::error_mutex);
  amx_model::error.clear();
  for (auto& count : amx_model::counts) count = 0;
}

// Configurations, loads, stores, multiplications.
EXPORT int64_t amx_model_count(int which) { return amx_model::counts[which]; }

// One multiplication of tiles as given, row by row and in full tiles: bf16, or int8.
EXPORT void amx_model_multiply(int integers, const void* a, const void* b, void* sums) {
  amx_model::configure(0, 16, 64);
  amx_model::load(0, sums, 64);
  amx_model::load(1, a, 64);
  amx_model::load(2, b, 64);
  integers ? amx_model::dpbsud(0, 1, 2) : amx_model::dpbf16ps(0, 1, 2);
  amx_model::store(0, sums, 64);
  amx_model::release();
}

// Mistakes that the model must find.
EXPORT void amx_model_mistake(const char* which) {
  const std::string name = which;
  uint8_t memory[1024] = {};
  if (name == "no configuration") amx_model::load(0, memory, 64);
  if (name == "released") {
    amx_model::configure(0, 16, 64);
    amx_model::release();
    amx_model::dpbf16ps(0, 1, 2);
  }
  if (name == "other thread") {
    amx_model::configure(0, 16, 64);
    std::thread([&] { amx_model::zero(0); }).join();
  }
  if (name == "rows") amx_model::configure(3, 17, 64);
  if (name == "row bytes") amx_model::configure(3, 16, 68);
  if (name == "palette") amx_model::configure(0, 16, 64, 0);
  if (name == "tile without rows") {
    amx_model::configure(5, 0, 0);
    amx_model::load(5, memory, 64);
  }
  if (name == "shapes") {
    amx_model::configure(2, 8, 64);
    amx_model::dpbf16ps(0, 1, 2);
  }
  if (name == "rows of sums") {
    amx_model::configure(0, 8, 64);
    amx_model::dpbsud(0, 1, 2);
  }
  if (name == "same tile") {
    amx_model::configure(0, 16, 64);
    amx_model::dpbsud(0, 1, 1);
  }
  if (name == "not released") {
    amx_model::configure(0, 16, 64);
    amx_model::check_released("a kernel");
  }
  amx_model::release();
}
