// Exchange in a warp, and matrix instructions against a plain product of the same matrices.

#include <cmath>
#include <cstring>

#include "emulator/self_test.h"
#include "emulator/settings.h"
#include "formats/codebooks.h"

namespace lowbit::cuda {
namespace {

using Words = std::vector<uint32_t>;

// ---- one warp, one instruction -----------------------------------------------------------------------------------------

struct Params {
  const uint32_t* in;  // [32][inputs]
  uint32_t* out;       // [32][outputs]
  int inputs, outputs;
};

template <class Body>
__global__ void warp_kernel(const Params p) {
  const int lane = static_cast<int>(threadIdx.x);
  Body::run(p.in + lane * p.inputs, p.out + lane * p.outputs);
}

// Every order has to give the same words.
template <class Body>
Words run_warp(const Words& in, int inputs, int outputs, int64_t shared = 0) {
  Words first;
  for (int order = 0; order < 4; ++order) {
    lowbit_emulator_set_orders(order < 2 ? order : 2, 0, static_cast<uint64_t>(order));
    Words out(static_cast<size_t>(32 * outputs), 0xdeadbeefu);
    launch("warp", warp_kernel<Body>, Grid{}, 32, shared, nullptr,
           Params{in.data(), out.data(), inputs, outputs});
    if (order == 0) first = out;
    LOWBIT_CHECK(out == first, "another order gives other bits");
  }
  return first;
}

Words noise_words(int count, uint64_t seed) {
  Noise noise{seed};
  Words words(static_cast<size_t>(count));
  for (uint32_t& word : words) word = noise.next();
  return words;
}

void expect(const Words& got, const Words& wanted, const char* what) {
  for (size_t i = 0; i < wanted.size(); ++i) {
    LOWBIT_CHECK(got[i] == wanted[i], what, ": word ", i, " is ", got[i], ", expected ", wanted[i]);
  }
}

// ---- exchange ----------------------------------------------------------------------------------------------------------

struct ShuffleBody {
  static void run(const uint32_t* in, uint32_t* out) {
    out[0] = ptx::shuffle(in[0], static_cast<int>(in[1] & 31u));
    out[1] = ptx::shuffle_xor(in[0], 13);
    out[2] = ptx::float_as_bits(ptx::shuffle(ptx::bits_as_float(in[0]), 7));
    out[3] = ptx::float_as_bits(ptx::shuffle_xor(ptx::bits_as_float(in[0]), 16));
    double wide;
    const uint64_t bits = static_cast<uint64_t>(in[0]) << 32 | in[1];
    std::memcpy(&wide, &bits, sizeof wide);
    wide = ptx::shuffle(wide,
                        static_cast<int>(threadIdx.x) + 1);  // lane 31 asks for 32, which is lane 0
    uint64_t moved;
    std::memcpy(&moved, &wide, sizeof moved);
    out[4] = static_cast<uint32_t>(moved >> 32);
    out[5] = static_cast<uint32_t>(moved);
  }
};

void check_shuffles() {
  Words in = noise_words(64, 3);
  for (uint32_t& word : in) word &= 0xbfffffffu;  // no NaN among the floats
  const Words out = run_warp<ShuffleBody>(in, 2, 6);
  Words wanted;
  for (uint32_t lane = 0; lane < 32; ++lane) {
    const uint32_t next = (lane + 1) % 32;
    for (const uint32_t word : {in[2 * (in[2 * lane + 1] & 31u)], in[2 * (lane ^ 13u)], in[14],
                                in[2 * (lane ^ 16u)], in[2 * next], in[2 * next + 1]}) {
      wanted.push_back(word);
    }
  }
  expect(out, wanted, "shuffle");
}

struct AnyBody {
  static void run(const uint32_t* in, uint32_t* out) { out[0] = ptx::any_lane(in[0] != 0) ? 1 : 0; }
};

void check_any() {
  Words in(32, 0);
  expect(run_warp<AnyBody>(in, 1, 1), Words(32, 0), "any_lane of none");
  in[19] = 5;
  expect(run_warp<AnyBody>(in, 1, 1), Words(32, 1), "any_lane of one");
}

// Rows are given in a scrambled order, which the addresses undo.
template <bool kTransposed>
struct LdmatrixBody {
  static void run(const uint32_t* in, uint32_t* out) {
    const int lane = static_cast<int>(threadIdx.x), place = lane * 5 % 32;
    auto* row = reinterpret_cast<uint32_t*>(dynamic_shared() + 16 * place);
    for (int i = 0; i < 4; ++i) row[i] = in[i];
    ptx::sync_warp();
    uint32_t r[4];
    if (kTransposed) {
      ptx::ldmatrix_x4_transposed(r, row);
    } else {
      ptx::ldmatrix_x4(r, row);
    }
    for (int i = 0; i < 4; ++i) out[i] = r[i];
  }
};

uint32_t half_word(const Words& words, int row, int column) {
  return words[static_cast<size_t>(row * 4 + column / 2)] >> (16 * (column % 2)) & 0xffffu;
}

void check_ldmatrix() {
  const Words in = noise_words(128, 4);  // 32 rows of 8 elements
  Words plain, transposed;
  for (int lane = 0; lane < 32; ++lane) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      const int row = 8 * matrix + lane / 4, column = 2 * (lane % 4);
      plain.push_back(half_word(in, row, column) | half_word(in, row, column + 1) << 16);
      transposed.push_back(half_word(in, 8 * matrix + column, lane / 4) |
                           half_word(in, 8 * matrix + column + 1, lane / 4) << 16);
    }
  }
  expect(run_warp<LdmatrixBody<false>>(in, 4, 4, 512), plain, "ldmatrix_x4");
  expect(run_warp<LdmatrixBody<true>>(in, 4, 4, 512), transposed, "ldmatrix_x4_transposed");
}

struct MovmatrixBody {
  static void run(const uint32_t* in, uint32_t* out) { out[0] = ptx::movmatrix_transposed(in[0]); }
};

void check_movmatrix() {
  const Words in = noise_words(32, 5);  // the fragment of an 8x8 matrix is its rows, read as words
  Words wanted;
  for (int lane = 0; lane < 32; ++lane) {
    const int column = 2 * (lane % 4);
    wanted.push_back(half_word(in, column, lane / 4) | half_word(in, column + 1, lane / 4) << 16);
  }
  expect(run_warp<MovmatrixBody>(in, 1, 1), wanted, "movmatrix");
}

// ---- mma ---------------------------------------------------------------------------------------------------------------

enum class Kind { kF16, kBf16, kS8, kU8S8, kE4m3, kE5m2 };

// Registers: a[4], b[2], d[4] in; d[4] out.
template <Kind kKind>
struct MmaBody {
  static void run(const uint32_t* in, uint32_t* out) {
    const uint32_t a[4] = {in[0], in[1], in[2], in[3]};
    if constexpr (kKind == Kind::kS8 || kKind == Kind::kU8S8) {
      int32_t d[4];
      std::memcpy(d, in + 6, sizeof d);
      if constexpr (kKind == Kind::kS8) ptx::mma_s8(d, a, in[4], in[5]);
      if constexpr (kKind == Kind::kU8S8) ptx::mma_u8s8(d, a, in[4], in[5]);
      std::memcpy(out, d, sizeof d);
    } else {
      float d[4];
      std::memcpy(d, in + 6, sizeof d);
      if constexpr (kKind == Kind::kF16) ptx::mma_f16(d, a, in[4], in[5]);
      if constexpr (kKind == Kind::kBf16) ptx::mma_bf16(d, a, in[4], in[5]);
      if constexpr (kKind == Kind::kE4m3) ptx::mma_e4m3(d, a, in[4], in[5]);
      if constexpr (kKind == Kind::kE5m2) ptx::mma_e5m2(d, a, in[4], in[5]);
      std::memcpy(out, d, sizeof d);
    }
  }
};

double value_of(Kind kind, bool is_b, uint32_t bits) {
  switch (kind) {
    case Kind::kF16: {  // straight from IEEE 754
      const int exponent = static_cast<int>(bits >> 10 & 31u),
                mantissa = static_cast<int>(bits & 1023u);
      const double magnitude =
          exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
      return bits & 0x8000u ? -magnitude : magnitude;
    }
    case Kind::kBf16: {
      const int exponent = static_cast<int>(bits >> 7 & 255u),
                mantissa = static_cast<int>(bits & 127u);
      const double magnitude =
          exponent == 0 ? std::ldexp(mantissa, -133) : std::ldexp(128 + mantissa, exponent - 134);
      return bits & 0x8000u ? -magnitude : magnitude;
    }
    case Kind::kS8:
      return static_cast<int8_t>(bits);
    case Kind::kU8S8:
      return is_b ? static_cast<int8_t>(bits) : static_cast<int>(bits);
    case Kind::kE4m3:
      return fp8_e4m3_code()[bits];
    case Kind::kE5m2:
      return is_b ? fp8_e4m3_code()[bits] : fp8_e5m2_code()[bits];
  }
  return 0.0;
}

// Elements whose products and sums fp32 holds exactly, so that the order of addition does not matter.
uint32_t element(Kind kind, bool is_b, Noise& noise) {
  const auto small = static_cast<int>(noise.next() % 17) - 8;
  const uint32_t sign = small < 0 ? 1 : 0;
  const auto magnitude = static_cast<uint32_t>(small < 0 ? -small : small);
  switch (kind) {
    case Kind::kF16:
      return magnitude == 0 ? noise.next() & 0x8001u  // zero, or the smallest subnormal
                            : sign << 15 | (14 + magnitude) << 10 | (noise.next() & 0x300u);
    case Kind::kBf16:
      return magnitude == 0 ? 0 : sign << 15 | (126 + magnitude) << 7 | (noise.next() & 0x60u);
    case Kind::kE4m3:
      return sign << 7 | (4 + magnitude) << 3 | (noise.next() & 7u);
    case Kind::kE5m2:
      return is_b ? sign << 7 | (4 + magnitude) << 3 | (noise.next() & 7u)
                  : sign << 7 | (12 + magnitude / 2) << 2 | (noise.next() & 3u);
    default:
      return noise.next() & 0xffu;
  }
}

// Fragments as csrc/cuda/ptx.cuh draws them: a register holds elements next to each other along K.
template <Kind kKind>
void check_mma() {
  constexpr bool kBytes = kKind != Kind::kF16 && kKind != Kind::kBf16;
  constexpr bool kInteger = kKind == Kind::kS8 || kKind == Kind::kU8S8;
  constexpr int kPer = kBytes ? 4 : 2, kK = 8 * kPer, kBits = 32 / kPer;
  Noise noise{7 + static_cast<uint64_t>(kKind)};
  uint32_t a[16][kK], b[kK][8];
  for (auto& row : a) {
    for (uint32_t& x : row) x = element(kKind, false, noise);
  }
  for (auto& row : b) {
    for (uint32_t& x : row) x = element(kKind, true, noise);
  }
  double d[16][8];
  for (auto& row : d) {
    for (double& x : row) x = static_cast<int>(noise.next() % 2001) - 1000;
  }
  Words in, wanted;
  const auto word_of = [](double x) {
    if (kInteger) return static_cast<uint32_t>(static_cast<int32_t>(x));
    return ptx::float_as_bits(static_cast<float>(x));
  };
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int r = 0; r < 4; ++r) {
      uint32_t word = 0;
      for (int i = 0; i < kPer; ++i)
        word |= a[g + 8 * (r % 2)][kPer * t + kK / 2 * (r / 2) + i] << (kBits * i);
      in.push_back(word);
    }
    for (int r = 0; r < 2; ++r) {
      uint32_t word = 0;
      for (int i = 0; i < kPer; ++i) word |= b[kPer * t + kK / 2 * r + i][g] << (kBits * i);
      in.push_back(word);
    }
    for (int i = 0; i < 4; ++i) {
      const int row = g + 8 * (i / 2), column = 2 * t + i % 2;
      double sum = d[row][column];
      for (int k = 0; k < kK; ++k)
        sum += value_of(kKind, false, a[row][k]) * value_of(kKind, true, b[k][column]);
      in.push_back(word_of(d[row][column]));
      wanted.push_back(word_of(sum));
    }
  }
  expect(run_warp<MmaBody<kKind>>(in, 10, 4), wanted, "mma");
}

}  // namespace

const std::vector<Check> kExchangeChecks = {
    {"shuffle", check_shuffles},
    {"any_lane", check_any},
    {"ldmatrix", check_ldmatrix},
    {"movmatrix", check_movmatrix},
};
const std::vector<Check> kMatrixChecks = {
    {"mma_f16", check_mma<Kind::kF16>},   {"mma_bf16", check_mma<Kind::kBf16>},
    {"mma_s8", check_mma<Kind::kS8>},     {"mma_u8s8", check_mma<Kind::kU8S8>},
    {"mma_e4m3", check_mma<Kind::kE4m3>}, {"mma_e5m2", check_mma<Kind::kE5m2>},
};

}  // namespace lowbit::cuda
