// Bits and roundings against definitions that share nothing with the emulator's: lop3 and prmt bit by bit, 16-bit roundings by
// looking for the nearest number among all of them.

#include <algorithm>
#include <cmath>
#include <limits>

#include "emulator/self_test.h"
#include "emulator/settings.h"

namespace lowbit::cuda {
namespace {

// ---- bits --------------------------------------------------------------------------------------------------------------

template <int kTable>
void check_table(Noise& noise) {
  const uint32_t a = noise.next(), b = noise.next(), c = noise.next(),
                 d = ptx::lop3<kTable>(a, b, c);
  for (int bit = 0; bit < 32; ++bit) {
    const uint32_t i = (a >> bit & 1u) * 4 + (b >> bit & 1u) * 2 + (c >> bit & 1u);
    LOWBIT_CHECK((d >> bit & 1u) == (static_cast<uint32_t>(kTable) >> i & 1u), "lop3 table ",
                 kTable, ", bit ", bit);
  }
}
template <int... kTables>
void check_tables(Noise& noise, std::integer_sequence<int, kTables...>) {
  (check_table<kTables>(noise), ...);
}
void check_lop3() {
  Noise noise{1};
  for (int round = 0; round < 20; ++round)
    check_tables(noise, std::make_integer_sequence<int, 256>());
  // The magic exponent: (x & 0x000f000f) | 0x64006400.
  constexpr int kAndOr = (0xf0 & 0xcc) | 0xaa;
  LOWBIT_CHECK(ptx::lop3<kAndOr>(0x12345678u, 0x000f000fu, 0x64006400u) == 0x64046408u,
               "lop3 as (a & b) | c");
}

void check_prmt() {
  Noise noise{2};
  for (int round = 0; round < 20000; ++round) {
    const uint32_t a = noise.next(), b = noise.next(), selector = noise.next();
    uint32_t bytes[8];
    for (int i = 0; i < 4; ++i) {
      bytes[i] = a >> (8 * i) & 0xffu;
      bytes[i + 4] = b >> (8 * i) & 0xffu;
    }
    uint32_t wanted = 0;
    for (int i = 3; i >= 0; --i) {
      const uint32_t nibble = selector >> (4 * i) & 15u;
      const uint32_t byte = bytes[nibble % 8];
      wanted = wanted << 8 | (nibble < 8 ? byte : byte >= 128 ? 255u : 0u);
    }
    LOWBIT_CHECK(ptx::prmt(a, b, selector) == wanted, "prmt of ", a, ", ", b, ", selector ",
                 selector);
  }
}

// ---- 16-bit numbers ----------------------------------------------------------------------------------------------------

// All finite numbers of a format that are not negative, in order; the index is the bit pattern. Behind them, what the next
// would be if the exponent went on: what rounds to it is infinite.
struct Numbers {
  std::vector<long double> value;

  Numbers(int exponent_bits, int mantissa_bits) {
    const int bias = (1 << (exponent_bits - 1)) - 1, size = 1 << mantissa_bits;
    const int count = ((1 << exponent_bits) - 1) * size + 1;
    for (int bits = 0; bits < count; ++bits) {
      const int exponent = bits / size, mantissa = bits % size;
      value.push_back(exponent == 0
                          ? std::ldexp(static_cast<long double>(mantissa), 1 - bias - mantissa_bits)
                          : std::ldexp(static_cast<long double>(size + mantissa),
                                       exponent - bias - mantissa_bits));
    }
  }

  uint32_t nearest(long double exact) const {
    if (exact != exact) return 0x7fffu;
    const uint32_t sign = std::signbit(exact) ? 0x8000u : 0u;
    const long double magnitude = std::fabs(exact);
    if (magnitude >= value.back()) return sign | static_cast<uint32_t>(value.size() - 1);
    const auto above = std::upper_bound(value.begin(), value.end(), magnitude) - value.begin();
    const auto low = static_cast<uint32_t>(above - 1);
    const long double to_low = magnitude - value[low], to_high = value[low + 1] - magnitude;
    if (to_low == to_high) return sign | (low + (low & 1u));
    return sign | (to_low < to_high ? low : low + 1);
  }
  long double of(uint32_t bits) const {
    const uint32_t magnitude = bits & 0x7fffu;
    if (magnitude >= value.size()) return std::numeric_limits<long double>::quiet_NaN();
    const long double x = magnitude + 1 == value.size()
                              ? std::numeric_limits<long double>::infinity()
                              : value[magnitude];
    return bits & 0x8000u ? -x : x;
  }
};

const Numbers& halves() {
  static const Numbers all(5, 10);
  return all;
}
const Numbers& bfloats() {
  static const Numbers all(8, 7);
  return all;
}

// a * b + c exactly enough to be rounded: where c (or the product) is so small that 64 bits cannot hold the sum, only its
// sign matters, and a number of that sign and 2^-40 of the other stands in for it. A product of 16-bit numbers has at most
// 22 bits.
long double exact_sum(long double product, long double c) {
  if (product == 0 || c == 0 || !std::isfinite(product) || !std::isfinite(c)) return product + c;
  const int gap = std::ilogb(product) - std::ilogb(c);
  if (gap > 40) c = std::copysign(std::ldexp(1.0L, std::ilogb(product) - 40), c);
  if (gap < -40) product = std::copysign(std::ldexp(1.0L, std::ilogb(c) - 40), product);
  return product + c;
}

// Random bits, some of them where it hurts: a subnormal, the largest, infinity, NaN, a product on a tie.
uint32_t random_16(Noise& noise) {
  const uint32_t bits = noise.next();
  switch (bits >> 28) {
    case 0:
      return bits & 0x83ffu;
    case 1:
      return (bits & 0x8000u) | 0x7bffu;
    case 2:
      return (bits & 0x8000u) | 0x7c00u;
    case 3:
      return bits & 0xff80u;
    default:
      return bits & 0xffffu;
  }
}

template <class Instruction>
void check_fma(const Numbers& numbers, const Instruction& instruction, const char* what,
               bool only_product) {
  Noise noise{11};
  for (int round = 0; round < 400000; ++round) {
    const uint32_t a = random_16(noise), b = random_16(noise);
    uint32_t c = only_product ? 0x8000u : random_16(noise);
    if (!only_product && round % 4 == 0) {  // near the product, so that much cancels
      c = numbers.nearest(-numbers.of(a) * numbers.of(b)) ^ (noise.next() & 1u);
    }
    const uint32_t high = noise.next() << 16;
    const long double product = numbers.of(a) * numbers.of(b);
    const uint32_t wanted =
        numbers.nearest(only_product ? product : exact_sum(product, numbers.of(c)));
    const uint32_t got = instruction(a | high, b | 0x3c000000u, c | high) & 0xffffu;
    LOWBIT_CHECK(got == wanted, what, " of ", a, ", ", b, ", ", c, " is ", got, ", expected ",
                 wanted);
    // The upper half is computed the same way.
    const uint32_t upper = instruction(a << 16, b << 16, c << 16) >> 16;
    LOWBIT_CHECK(upper == wanted, what, " of ", a, ", ", b, ", ", c, " in the upper half is ",
                 upper);
  }
}

void check_fma_f16() { check_fma(halves(), ptx::fma_f16x2, "fma_f16x2", false); }
void check_fma_bf16() { check_fma(bfloats(), ptx::fma_bf16x2, "fma_bf16x2", false); }
void check_mul_f16() {
  const auto multiply = [](uint32_t a, uint32_t b, uint32_t) { return ptx::mul_f16x2(a, b); };
  check_fma(halves(), multiply, "mul_f16x2", true);
}
void check_sub_f16() {
  Noise noise{12};
  for (int round = 0; round < 400000; ++round) {
    const uint32_t a = random_16(noise), b = random_16(noise);
    const uint32_t wanted = halves().nearest(halves().of(a) - halves().of(b));
    const uint32_t got = ptx::sub_f16x2(a << 16 | a, b << 16 | b);
    LOWBIT_CHECK(got == (wanted << 16 | wanted), "sub_f16x2 of ", a, ", ", b, " is ", got,
                 ", expected ", wanted);
  }
}

template <class Pack>
void check_pack(const Numbers& numbers, const Pack& pack, const char* what) {
  Noise noise{13};
  const auto check = [&](float value) {
    const uint32_t wanted = numbers.nearest(value);
    LOWBIT_CHECK(pack(value, 1.0f) % 65536 == wanted && pack(1.0f, value) >> 16 == wanted, what,
                 " of ", value, " is ", pack(value, 1.0f) % 65536, ", expected ", wanted);
  };
  for (int round = 0; round < 400000; ++round) check(ptx::bits_as_float(noise.next()));
  // Every number, the middle to the next, and the floats on either side of it.
  for (size_t i = 0; i + 1 < numbers.value.size(); ++i) {
    const auto middle = static_cast<float>((numbers.value[i] + numbers.value[i + 1]) / 2);
    for (const float value :
         {static_cast<float>(numbers.value[i]), middle, std::nextafter(middle, 0.0f),
          std::nextafter(middle, std::numeric_limits<float>::infinity())}) {
      check(value);
      check(-value);
    }
  }
}
void check_pack_f16() { check_pack(halves(), ptx::pack_f16x2, "pack_f16x2"); }
void check_pack_bf16() { check_pack(bfloats(), ptx::pack_bf16x2, "pack_bf16x2"); }

void check_f16_to_float() {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const long double wanted = halves().of(bits);
    const float got = ptx::f16_to_float(bits | 0xabcd0000u);
    const bool same =
        wanted != wanted ? got != got : got == wanted && std::signbit(got) == std::signbit(wanted);
    LOWBIT_CHECK(same, "f16_to_float of ", bits, " is ", got);
  }
}

// ---- blocks ------------------------------------------------------------------------------------------------------------

struct GridParams {
  uint32_t* counter;
  uint32_t* order;  // [blocks]: when a block came
};

__global__ void order_kernel(const GridParams p) {
  ptx::sync_block();
  if (threadIdx.x != 0) return;
  ptx::fence_device();
  const uint32_t block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  p.order[block] = ptx::atomic_increment(p.counter);
}

std::vector<uint32_t> block_order(int order, uint64_t seed, int workers) {
  lowbit_emulator_set_orders(0, order, seed);
  lowbit_emulator_set_workers(workers);
  uint32_t counter = 0;
  std::vector<uint32_t> came(5 * 7 * 3, 1000);
  launch("order", order_kernel, Grid{5, 7, 3}, 64, 0, nullptr, GridParams{&counter, came.data()});
  lowbit_emulator_set_workers(1);
  LOWBIT_CHECK(counter == came.size(), "the counter says ", counter, " blocks");
  return came;
}

void check_block_orders() {
  const std::vector<uint32_t> forward = block_order(0, 0, 1), reverse = block_order(1, 0, 1);
  for (size_t i = 0; i < forward.size(); ++i) {
    LOWBIT_CHECK(forward[i] == i, "forward: block ", i, " came as number ", forward[i]);
    LOWBIT_CHECK(reverse[i] + i + 1 == reverse.size(), "reverse: block ", i, " came as number ",
                 reverse[i]);
  }
  LOWBIT_CHECK(block_order(2, 1, 1) == block_order(2, 1, 1), "the same seed gave two orders");
  LOWBIT_CHECK(block_order(2, 1, 1) != block_order(2, 2, 1), "two seeds gave one order");
  std::vector<uint32_t> shared_out = block_order(2, 3, 3);
  std::sort(shared_out.begin(), shared_out.end());
  LOWBIT_CHECK(shared_out == forward, "three CPU threads did not run every block once");
}

}  // namespace

const std::vector<Check> kNumberChecks = {
    {"lop3", check_lop3},
    {"prmt", check_prmt},
    {"fma_f16x2", check_fma_f16},
    {"fma_bf16x2", check_fma_bf16},
    {"mul_f16x2", check_mul_f16},
    {"sub_f16x2", check_sub_f16},
    {"pack_f16x2", check_pack_f16},
    {"pack_bf16x2", check_pack_bf16},
    {"f16_to_float", check_f16_to_float},
    {"block_orders", check_block_orders},
};

}  // namespace lowbit::cuda
