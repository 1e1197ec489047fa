// wgmma and tensor copies: against plain arithmetic, and mistakes with them beside the same kernel without.

#include <array>
#include <cstring>
#include <memory>

#include "cuda/ptx_hopper.cuh"
#include "cuda/wgmma.cuh"
#include "emulator/self_test.h"
#include "emulator/settings.h"
#include "formats/codebooks.h"

namespace lowbit::cuda {
namespace {

constexpr int kGroup = 128;  // threads of a warpgroup

// ---- against plain arithmetic ------------------------------------------------------------------------------------------

// d[64][kN] += a[64][4 kK] b[4 kK][kN]: a row of b's box is four kK. One warpgroup.
struct Product {
  const uint32_t* a;  // [thread][step][register]
  void* d;            // [thread][kN / 2]
  int row, column;    // of the box
};

template <Wgmma kKind, int kN, int kMost>
__global__ void product_kernel(const Product p, const __grid_constant__ TensorMap b) {
  uint8_t* const box = dynamic_shared();
  auto* const full = reinterpret_cast<uint64_t*>(box + kN * kBoxBytes);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    ptx::mbarrier_init(full, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(full, kN * kBoxBytes);
    ptx::copy_box(box, b, p.row, p.column, full);
  }
  ptx::sync_block();
  auto* const out = static_cast<WgmmaSum<kKind>*>(p.d) + thread * (kN / 2);
  WgmmaSum<kKind> d[1][kMost / 2];
  uint32_t a[4][1][4];
  for (int i = 0; i < kMost / 2; ++i) d[0][i] = i < kN / 2 ? out[i] : WgmmaSum<kKind>(i);
  for (int i = 0; i < 16; ++i) a[i / 4][0][i % 4] = p.a[16 * thread + i];
  ptx::mbarrier_wait(full, 0);
  constexpr int number = columns_number(kKind == Wgmma::kS8, kMost, kN);
  for (int step = 0; step < 4; ++step)
    ptx::wgmma<kKind>(d, a[step], wgmma_swizzled(box + 32 * step), number, true);
  ptx::wgmma_wait<0>();
  for (int i = 0; i < kMost / 2; ++i) {
    if (i < kN / 2) {
      out[i] = d[0][i];
    } else if (d[0][i] != WgmmaSum<kKind>(i)) {
      out[0] = WgmmaSum<kKind>(12345);  // registers of columns that are not there
    }
  }
}

// A small integer as an element.
uint32_t encode(Wgmma kind, bool is_b, int value) {
  const auto number = static_cast<float>(value);
  const auto find = [&](const std::array<float, 256>& code) -> uint32_t {
    for (uint32_t q = 0; q < code.size(); ++q) {
      if (code[q] == number) return q;
    }
    fail("no code for ", value);
  };
  switch (kind) {
    case Wgmma::kBf16:
      return ptx::pack_bf16x2(number, 0.0f);
    case Wgmma::kF16:
      return ptx::pack_f16x2(number, 0.0f);
    case Wgmma::kE4m3:
      return find(fp8_e4m3_code());
    case Wgmma::kE5m2:
      return find(is_b ? fp8_e4m3_code() : fp8_e5m2_code());
    default:
      return static_cast<uint32_t>(value) & 0xffu;
  }
}

// Sums are integers below 2^24: exact in any order. The matrix behind b is larger than a box on two sides, and ends inside it
// on the others: outside are zeros.
template <Wgmma kKind, int kN, int kMost>
void check_wgmma() {
  constexpr int bytes = kKind == Wgmma::kBf16 || kKind == Wgmma::kF16 ? 2 : 1;
  constexpr int per = 4 / bytes, depth = 32 / bytes, columns = 4 * depth;
  constexpr int kRow = 3, kColumn = 16, kRows = kRow + kN - 2, kColumns = kColumn + columns - 5;
  constexpr int kPitch = (kColumns * bytes + 15) / 16 * 16;
  Noise noise{100 + static_cast<uint64_t>(kKind) * 16 + kN};
  const auto small = [&] { return static_cast<int>(noise.next() % 9) - 4; };
  std::vector<int> a(64 * columns), b(static_cast<size_t>(kRows * kColumns)), c(64 * kN);
  for (auto* values : {&a, &b, &c}) {
    for (int& value : *values) value = small();
  }
  std::vector<uint8_t> bytes_of_b(static_cast<size_t>(kRows * kPitch + 16), 0x7f);
  uint8_t* const base =
      bytes_of_b.data() + (16 - reinterpret_cast<uintptr_t>(bytes_of_b.data()) % 16) % 16;
  for (int r = 0; r < kRows; ++r) {
    for (int k = 0; k < kColumns; ++k) {
      const uint32_t code = encode(kKind, true, b[static_cast<size_t>(r * kColumns + k)]);
      std::memcpy(base + r * kPitch + k * bytes, &code, bytes);
    }
  }
  std::vector<uint32_t> registers;
  std::vector<WgmmaSum<kKind>> d, wanted;
  for (int thread = 0; thread < kGroup; ++thread) {
    const int g = thread % 32 / 4, t = thread % 4, first = thread / 32 * 16 + g;
    for (int i = 0; i < 16; ++i) {  // step, register
      const int row = first + 8 * (i % 2), k = i / 4 * depth + (i % 4 / 2 * 4 + t) * per;
      uint32_t word = 0;
      for (int j = 0; j < per; ++j)
        word |= encode(kKind, false, a[static_cast<size_t>(row * columns + k + j)])
                << (8 * bytes * j);
      registers.push_back(word);
    }
    for (int i = 0; i < kN / 2; ++i) {
      const int row = first + 8 * (i / 2 % 2), n = i / 4 * 8 + 2 * t + i % 2;
      int sum = c[static_cast<size_t>(row * kN + n)];
      d.push_back(static_cast<WgmmaSum<kKind>>(sum));
      for (int k = 0; k < columns; ++k) {
        if (kRow + n < kRows && kColumn + k < kColumns)
          sum += a[static_cast<size_t>(row * columns + k)] *
                 b[static_cast<size_t>((kRow + n) * kColumns + kColumn + k)];
      }
      wanted.push_back(static_cast<WgmmaSum<kKind>>(sum));
    }
  }
  const TensorMap map = make_tensor_map("wgmma", {base, kRows, kColumns, kPitch, bytes, kN});
  for (int order = 0; order < 4; ++order) {
    lowbit_emulator_set_orders(order < 2 ? order : 2, 0, static_cast<uint64_t>(order));
    auto got = d;
    launch("wgmma", product_kernel<kKind, kN, kMost>, Grid{}, kGroup, kN * kBoxBytes + 8, nullptr,
           Product{registers.data(), got.data(), kRow, kColumn}, map);
    for (size_t i = 0; i < got.size(); ++i)
      LOWBIT_CHECK(got[i] == wanted[i], "thread ", i / (kN / 2), ", register ", i % (kN / 2), ": ",
                   got[i], ", expected ", wanted[i]);
  }
}

// What a kernel's instructions are numbered by: every number of columns that wgmma has, once.
void check_columns() {
  for (const bool integers : {false, true}) {
    int last = 0;
    for (const int most : {64, 128}) {
      for (int number = 0; last < most; ++number) {
        const int columns = numbered_columns(integers, most, number);
        LOWBIT_CHECK(columns == last + (integers && last >= 32 ? 16 : 8), columns, " after ", last);
        LOWBIT_CHECK(columns_number(integers, most, columns) == number, columns);
        for (int tokens = last + 1; tokens <= columns; ++tokens)
          LOWBIT_CHECK(columns_for(integers, most, tokens) == columns, tokens);
        last = columns;
      }
    }
    LOWBIT_CHECK(columns_for(integers, 128, 1) == (integers ? 80 : 72), "the fewest of 128");
    LOWBIT_CHECK(columns_for(integers, 256, 1) == 256, "256 alone");
  }
}

// ---- planted mistakes --------------------------------------------------------------------------------------------------

enum class Mistake {
  kNone,
  kNoFence,
  kFenceOnce,
  kNoCommit,
  kNoWait,
  kWaitForFewer,
  kEarlyRead,
  kEarlyRelease,
  kWriteA,
  kWriteD,
  kPattern,
  kPastEnd,
  kBoxBehind,
  kNoExpect,
  kNoArrive,
  kNoProxyFence,
  kThreeWarps,
  kOtherOperand,
  kWiderThanD,
  kOtherRegisters,
  kTooManyRegisters,
  kNoMeeting,
  kOtherDevice,
};

struct Params {
  const float* in;
  float* out;
  Mistake mistake;
  __device__ bool has(Mistake m) const { return mistake == m; }
};

constexpr int kN = 16, kSteps = 6, kStages = 2;
constexpr int kBox = kN * kBoxBytes;  // bytes, two patterns
constexpr int kShared = kStages * kBox + 64;

__device__ void produce(const Params& p, const TensorMap& b, uint64_t* full, uint64_t* empty) {
  for (int step = 0; step < kSteps; ++step) {
    const int s = step % kStages;
    ptx::mbarrier_wait(empty + s, static_cast<uint32_t>(step / kStages + 1) % 2);
    if (p.has(Mistake::kNoExpect)) {
      ptx::mbarrier_arrive(full + s);
    } else {
      ptx::mbarrier_arrive_expect_tx(full + s, kBox);
    }
    ptx::copy_box(dynamic_shared() + s * kBox + (p.has(Mistake::kBoxBehind) ? 128 : 0), b, 0,
                  64 * step, full + s);
  }
}

// A wgmma by itself: its fence and its group are the caller's.
void multiply(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate,
              emulator::Site at = emulator::Site::here()) {
  emulator::wgmma(
      {static_cast<int>(Wgmma::kBf16), kN, reinterpret_cast<uint32_t*>(&d[0]), a, b, accumulate},
      at);
}

// A wgmma per step, the next one's A made while it runs.
__device__ void consume(const Params& p, uint64_t* full, uint64_t* empty, float (&d)[kN / 2]) {
  const int thread = static_cast<int>(threadIdx.x);
  uint32_t a[2][4];
  for (int step = 0; step < kSteps; ++step) {
    const int s = step % kStages;
    ptx::mbarrier_wait(full + s, static_cast<uint32_t>(step / kStages) % 2);
    for (int r = 0; r < 4; ++r)
      a[s][r] = ptx::pack_bf16x2(static_cast<float>((thread + r + step) % 7), 1.0f);
    if (!p.has(Mistake::kNoFence) && !(p.has(Mistake::kFenceOnce) && step > 0))
      emulator::wgmma_fence();
    const uint8_t* box = dynamic_shared() + s * kBox;
    if (p.has(Mistake::kPattern)) box += 128;
    if (p.has(Mistake::kPastEnd) && s == 1) box += 1024;
    if (p.has(Mistake::kOtherOperand) && thread / 32 == 2) box += 32;
    if (!(p.has(Mistake::kThreeWarps) && thread / 32 == 3 && step == kSteps - 1))
      multiply(d, a[s], wgmma_swizzled(box), step > 0);
    if (!p.has(Mistake::kNoCommit)) emulator::wgmma_commit();
    if (p.has(Mistake::kWriteA) && step == 3) a[s][2] = 0;
    if (p.has(Mistake::kWriteD) && step == 3) d[5] += 1.0f;
    // The step before is done: its stage may be filled again.
    const bool early = p.has(Mistake::kEarlyRelease);
    ptx::wgmma_wait<1>();
    if ((step > 0 || early) && thread % 32 == 0 && !(p.has(Mistake::kNoArrive) && thread == 32))
      ptx::mbarrier_arrive(empty + (early ? s : 1 - s));
  }
  if (p.has(Mistake::kEarlyRead)) p.out[thread] = d[0];
  if (p.has(Mistake::kWaitForFewer)) {
    ptx::wgmma_wait<1>();
  } else if (!p.has(Mistake::kNoWait)) {
    ptx::wgmma_wait<0>();
  }
}

__global__ void ring_kernel(const Params p, const __grid_constant__ TensorMap b) {
  const int thread = static_cast<int>(threadIdx.x);
  auto* const full = reinterpret_cast<uint64_t*>(dynamic_shared() + kStages * kBox);
  uint64_t* const empty = full + kStages;
  if (thread == 0) {
    for (int s = 0; s < kStages; ++s) {
      ptx::mbarrier_init(full + s, 1);
      ptx::mbarrier_init(empty + s, kGroup / 32);
    }
    ptx::fence_mbarrier_init();
  }
  ptx::sync_block();
  if (thread >= kGroup) {
    if (!p.has(Mistake::kTooManyRegisters)) ptx::lower_registers<24>();
    if (thread == kGroup) produce(p, b, full, empty);
    return;
  }
  // Two thirds of the block gave up what this warpgroup takes.
  if (!(p.has(Mistake::kOtherRegisters) && thread / 32 == 1)) ptx::raise_registers<240>();
  float d[kN / 2] = {};
  consume(p, full, empty, d);
  if (!(p.has(Mistake::kNoMeeting) && thread / 32 == 2)) ptx::sync_some<1, kGroup>();
  for (int i = p.has(Mistake::kEarlyRead) ? 1 : 0; i < kN / 2; ++i)
    p.out[kGroup * i + thread] = d[i];
}

// Ordinary stores make an operand.
__global__ void proxy_kernel(const Params p) {
  const int thread = static_cast<int>(threadIdx.x);
  auto* const pairs = reinterpret_cast<uint32_t*>(dynamic_shared());
  for (int i = thread; i < kBox / 4; i += kGroup) pairs[i] = ptx::pack_bf16x2(p.in[i % 100], 1.0f);
  if (!p.has(Mistake::kNoProxyFence)) ptx::fence_proxy_async();
  ptx::sync_block();
  float d[1][32];
  const uint32_t a[1][4] = {{0x3f803f80u, 0x40003f80u, 0x3f804000u, 0x3f803f80u}};
  ptx::wgmma<Wgmma::kBf16>(d, a, wgmma_swizzled(pairs), p.has(Mistake::kWiderThanD) ? 8 : 1, false);
  ptx::wgmma_wait<0>();
  for (int i = 0; i < kN / 2; ++i) p.out[thread * (kN / 2) + i] = d[0][i];
}

template <Mistake kMistake>
void ring(bool wrong, std::vector<float>& out) {
  constexpr int columns = 64 * kSteps;
  struct alignas(16) Row {
    uint16_t element[columns];
  };
  const auto b = std::make_unique<Row[]>(kN);
  for (int r = 0; r < kN; ++r) {
    for (int k = 0; k < columns; ++k)
      b[static_cast<size_t>(r)].element[k] =
          static_cast<uint16_t>(ptx::pack_bf16x2(static_cast<float>((3 * r + k) % 11), 0.0f));
  }
  if (wrong && kMistake == Mistake::kOtherDevice) lowbit_emulator_set_device(100, 4);
  out.assign(kGroup * kN / 2, 0.0f);
  const TensorMap map = make_tensor_map("ring", {b.get(), kN, columns, sizeof(Row), 2, kN});
  launch("planted", ring_kernel, Grid{}, 3 * kGroup, kShared, nullptr,
         Params{nullptr, out.data(), wrong ? kMistake : Mistake::kNone}, map);
}

template <Mistake kMistake>
void proxy(bool wrong, std::vector<float>& out) {
  std::vector<float> in(100);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i % 13);
  out.assign(kGroup * kN / 2, 0.0f);
  launch("planted", proxy_kernel, Grid{}, kGroup, kBox, nullptr,
         Params{in.data(), out.data(), wrong ? kMistake : Mistake::kNone});
}

void map_stride(bool wrong, std::vector<float>& out) {
  alignas(16) static const uint8_t data[1024] = {};
  make_tensor_map("planted", {data, 4, 100, wrong ? 104 : 112, 1, 4});
  out.assign(1, 0.0f);
}

}  // namespace

const std::vector<Planted> kWgmmaPlanted = {
    {"wgmma_without_fence", ring<Mistake::kNoFence>},
    {"wgmma_fenced_once", ring<Mistake::kFenceOnce>},
    {"missing_wgmma_commit", ring<Mistake::kNoCommit>},
    {"missing_wgmma_wait", ring<Mistake::kNoWait>},
    {"wgmma_wait_for_fewer", ring<Mistake::kWaitForFewer>},
    {"read_before_wgmma_wait", ring<Mistake::kEarlyRead>},
    {"released_while_in_flight", ring<Mistake::kEarlyRelease>},
    {"a_written_in_flight", ring<Mistake::kWriteA>},
    {"d_written_in_flight", ring<Mistake::kWriteD>},
    {"descriptor_inside_a_pattern", ring<Mistake::kPattern>},
    {"descriptor_past_the_end", ring<Mistake::kPastEnd>},
    {"misaligned_box", ring<Mistake::kBoxBehind>},
    {"missing_expect_of_a_box", ring<Mistake::kNoExpect>},
    {"missing_arrive_of_a_warp", ring<Mistake::kNoArrive>},
    {"missing_proxy_fence", proxy<Mistake::kNoProxyFence>},
    {"three_warps", ring<Mistake::kThreeWarps>},
    {"descriptors_differ", ring<Mistake::kOtherOperand>},
    {"wider_than_its_registers", proxy<Mistake::kWiderThanD>},
    {"register_budgets_differ", ring<Mistake::kOtherRegisters>},
    {"too_many_registers", ring<Mistake::kTooManyRegisters>},
    {"missing_at_a_barrier", ring<Mistake::kNoMeeting>},
    {"wgmma_on_sm_100", ring<Mistake::kOtherDevice>},
    {"tensor_map_stride", map_stride},
};

const std::vector<Check> kWgmmaChecks = {
    {"wgmma_bf16_16", check_wgmma<Wgmma::kBf16, 16, 64>},
    {"wgmma_bf16_72", check_wgmma<Wgmma::kBf16, 72, 128>},
    {"wgmma_bf16_256", check_wgmma<Wgmma::kBf16, 256, 256>},
    {"wgmma_f16_40", check_wgmma<Wgmma::kF16, 40, 64>},
    {"wgmma_e4m3_64", check_wgmma<Wgmma::kE4m3, 64, 64>},
    {"wgmma_e5m2_8", check_wgmma<Wgmma::kE5m2, 8, 64>},
    {"wgmma_s8_48", check_wgmma<Wgmma::kS8, 48, 64>},
    {"wgmma_s8_112", check_wgmma<Wgmma::kS8, 112, 128>},
    {"wgmma_s8_128", check_wgmma<Wgmma::kS8, 128, 128>},
    {"wgmma_columns", check_columns},
};

}  // namespace lowbit::cuda
