// int8 activations times integers, exact in int32 within a group (within 32768 of its k: 255 * 255 * 32768 < 2^31).
//
// Weights enter as c = (q - middle) << shift, middle = 2^(bits-1), shift = 8 - bits (codec/bytes.cuh). With S the sum of
// c * xq, X that of xq and C that of c, all over the k of a part, of which there are `count`, `real` of them before K,
//
//   sum (xq - xz) * (q - z)  =  ( S + (middle - z) * X << shift  -  xz * (C + (middle * count - z * real) << shift) ) >> shift
//
// where past K x is 0 and codes are 0. X and C come from the tensor cores too, with ones on the other side, and only where
// there are zeros. Wrapping in between does no harm: the whole is below 2^31. The last shift becomes a factor of the sums.
//
// A warp keeps 128 sums in registers, int32 and fp32, and there is no room for more: where there are zeros, a step's cells
// are read twice, the second time for X and C.
#pragma once

#include "cuda/kernels/a8.cuh"

namespace lowbit::cuda {

template <Format kFormat, int kBlocks8>
class IntMath {
 public:
  using Part = int32_t;
  using Bytes = SignedBytes<kFormat>;
  static constexpr bool kCompiled = true;
  static constexpr int kCells = 2;
  static constexpr int kMostK = 32768;
  static constexpr int kShift = Bytes::kShift;
  static constexpr float kUnit = 1.0f / (1 << kShift);
  using Sums = float[kFragments][kBlocks8][4];
  using Parts = int32_t[kFragments][kBlocks8][4];

  __device__ IntMath(const GemmParams& p, int lane, int m) : p_(p), lane_(lane), m_(m) {}
  static __device__ uint32_t pad(int) { return 0; }

  __device__ void multiply(const uint8_t* codes, const GroupRows&, int cell, bool two,
                           const uint32_t (&b)[kBlocks8][2], Parts& parts) const {
    for_each_fragment(codes, cell, two, [&](int i, const uint32_t (&a)[4]) {
#pragma unroll
      for (int j = 0; j < kBlocks8; ++j) ptx::mma_s8(parts[i][j], a, b[j][0], b[j][1]);
    });
  }

  // From S to all of the formula. What it takes beside S is summed here, from shared memory, because there are no registers
  // to keep it in while S grows.
  __device__ void settle(const GroupRows& rows, const StepPart& part, Parts& parts) const {
    const bool has_zeros = p_.w.zero_kind == ZeroKind::kInt, has_x_zeros = p_.x.zeros != nullptr;
    if (!has_zeros && !has_x_zeros) return;
    uint2 bytes = make_uint2(kMiddle * 0x01010101u, kMiddle * 0x01010101u);
    if (has_zeros) bytes = *reinterpret_cast<const uint2*>(rows.zeros + 8 * (lane_ / 4));
    const auto zero = [&](int row) {
      return (row < 4 ? bytes.x : bytes.y) >> (8 * (row % 4)) & 0xffu;
    };
    uint32_t code_sums[kLaneRows] = {};
    if (has_x_zeros) {
      sum_codes(part, code_sums);
      const int end = part.k + kCellK * part.last, past = end > p_.w.K ? end - p_.w.K : 0;
      const uint32_t count = static_cast<uint32_t>(kCellK * (part.last - part.first));
      const uint32_t real = count - static_cast<uint32_t>(past);
#pragma unroll
      for (int row = 0; row < kLaneRows; ++row)
        code_sums[row] += (kMiddle * count - zero(row) * real) << kShift;
    }
    uint32_t x_sums[kBlocks8][2] = {};
    if (has_zeros) sum_tokens(part, x_sums);
#pragma unroll
    for (int j = 0; j < 2 * kBlocks8; ++j) {
      const uint32_t x_zero = has_x_zeros ? x_zero_of(j) : 0u;
#pragma unroll
      for (int row = 0; row < kLaneRows; ++row) {
        int32_t& sum = parts[row / 2][j / 2][2 * (row % 2) + j % 2];
        sum = static_cast<int32_t>(static_cast<uint32_t>(sum) +
                                   (kMiddle - zero(row)) * x_sums[j / 2][j % 2] -
                                   x_zero * code_sums[row]);
      }
    }
  }

  __device__ void add(const GroupRows& rows, int k, Sums& sums, Parts& parts) const {
    add_scaled<kFormat>(p_, rows, m_, lane_, k, sums, parts);
  }

 private:
  static constexpr uint32_t kMiddle = 1u << (Planes<kFormat>::kBits - 1);

  // Calls run(i, A fragment i) of a cell and the next; zeros in place of the next where it is not wanted.
  template <class Run>
  __device__ void for_each_fragment(const uint8_t* codes, int cell, bool two, Run run) const {
    typename Bytes::Words words[2];
    load_cell<kFormat, kStepCells>(codes, cell, lane_, words[0]);
    load_cell<kFormat, kStepCells>(codes, two ? cell + 1 : cell, lane_, words[1]);
    const uint32_t second = two ? 0xffffffffu : 0u;
#pragma unroll
    for (int i = 0; i < kFragments; ++i) {
      const uint32_t a[4] = {Bytes::template row<0>(words[0], i),
                             Bytes::template row<1>(words[0], i),
                             Bytes::template row<0>(words[1], i) & second,
                             Bytes::template row<1>(words[1], i) & second};
      run(i, a);
    }
  }

  // C of a lane's rows.
  __device__ void sum_codes(const StepPart& part, uint32_t (&sums)[kLaneRows]) const {
#pragma unroll 1
    for (int cell = part.first; cell < part.last; cell += 2) {
      for_each_fragment(part.codes, cell, inside(cell + 1, part.last),
                        [&](int i, const uint32_t (&a)[4]) {
                          int32_t d[4] = {};  // every column the same
                          ptx::mma_s8(d, a, 0x01010101u, 0x01010101u);
                          sums[2 * i] += static_cast<uint32_t>(d[0]);
                          sums[2 * i + 1] += static_cast<uint32_t>(d[2]);
                        });
    }
  }

  // X << kShift of a lane's columns.
  __device__ void sum_tokens(const StepPart& part, uint32_t (&sums)[kBlocks8][2]) const {
#pragma unroll 1
    for (int cell = part.first; cell < part.last; cell += 2) {
      const bool two = inside(cell + 1, part.last);
      uint32_t b[kBlocks8][2];
      load_token_bytes(part.x, part.token, lane_, cell, two, b);
      constexpr uint32_t ones = 0x01010101u << kShift;
      const uint32_t a[4] = {ones, 0, two ? ones : 0u, 0};
#pragma unroll
      for (int j = 0; j < kBlocks8; ++j) {
        int32_t d[4] = {};  // every row the same
        ptx::mma_s8(d, a, b[j][0], b[j][1]);
        sums[j][0] += static_cast<uint32_t>(d[0]);
        sums[j][1] += static_cast<uint32_t>(d[1]);
      }
    }
  }

  // Of a lane's token.
  __device__ uint32_t x_zero_of(int j) const {
    const int token = m_ + 8 * (j / 2) + 2 * (lane_ % 4) + j % 2;
    return inside(token, p_.x.M) ? static_cast<uint32_t>(p_.x.zeros[token]) : 0u;
  }

  const GemmParams& p_;
  const int lane_, m_;
};

inline constexpr int kIntM16 = tile_index("a8_int_m16"), kIntM64 = tile_index("a8_int_m64"),
                     kIntM128 = tile_index("a8_int_m128");

// Instantiated by a8_int*.cu, a few formats each.
template <Format kFormat>
void run_a8_int(const GemmParams& p, int tile, Stream stream);

#define LOWBIT_INSTANTIATE_A8_INT(format)                                 \
  template <>                                                             \
  void run_a8_int<format>(const GemmParams& p, int tile, Stream stream) { \
    if (tile == kIntM16) {                                                \
      start_a8<IntMath, format, kIntM16>(p, stream);                      \
    } else if (tile == kIntM64) {                                         \
      start_a8<IntMath, format, kIntM64>(p, stream);                      \
    } else {                                                              \
      start_a8<IntMath, format, kIntM128>(p, stream);                     \
    }                                                                     \
  }

}  // namespace lowbit::cuda
