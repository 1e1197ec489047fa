// 8-bit activations times whatever codes bfloat16 holds exactly: int8 or e4m3 x integers, fp8, fp4, iq4_nl. Both sides are decoded
// to bf16 in registers, products are exact in fp32, and scales meet the sums of a group. What the 8-bit tensor cores do not
// multiply with each other, and fp8 on devices without fp8 tensor cores.
//
// q - z and xq - xz of 8 bits lie in -255..255: eight significant bits, which is what bf16 has.
#pragma once

#include "cuda/kernels/a8.cuh"

namespace lowbit::cuda {

template <Format kFormat, int kBlocks8>
class DecodeMath {
 public:
  using Part = float;
  static constexpr bool kCompiled = true;
  static constexpr int kCells = 1;
  static constexpr int kMostK = 1 << 30;  // fp32 sums all the way
  static constexpr float kUnit = 1.0f;
  using Sums = float[kFragments][kBlocks8][4];
  using T = BFloat16;

  __device__ DecodeMath(const GemmParams& p, int lane, int m) : p_(p), lane_(lane), m_(m) {
    if (p.x.zeros == nullptr) return;
#pragma unroll
    for (int j = 0; j < kBlocks8; ++j) {
      const int token = m + 8 * j + lane / 4;  // this lane's in B
      const float zero = inside(token, p.x.M) ? static_cast<float>(p.x.zeros[token]) : 0.0f;
      minus_zero_[j] = T::pack(-zero, -zero);
    }
  }

  // x - zero is to be zero past K.
  __device__ uint32_t pad(int token) const {
    if (p_.x.zeros == nullptr || !inside(token, p_.x.M)) return 0;
    return static_cast<uint32_t>(p_.x.zeros[token]) & 0xffu;
  }

  __device__ void multiply(const uint8_t* codes, const GroupRows& rows, int cell, bool,
                           const uint32_t (&bytes)[kBlocks8][1], Sums& parts) const {
    uint32_t b[kBlocks8][2];
#pragma unroll
    for (int j = 0; j < kBlocks8; ++j) decode_tokens(bytes[j][0], j, b[j]);
    uint32_t zeros[kLaneRows] = {};
    load_zeros<kFormat, T>(p_.w, rows.zeros, lane_ / 4, zeros);
    typename Codec<kFormat>::Words words;
    load_cell<kFormat, kStepCells>(codes, cell, lane_, words);
#pragma unroll
    for (int i = 0; i < kFragments; ++i) {
      uint32_t a[4];
      Codec<kFormat>::template decode<T>(p_.w, words, i, zeros[2 * i], zeros[2 * i + 1], a);
#pragma unroll
      for (int j = 0; j < kBlocks8; ++j) T::mma(parts[i][j], a, b[j][0], b[j][1]);
    }
  }

  __device__ void settle(const GroupRows&, const StepPart&, Sums&) const {}
  __device__ void add(const GroupRows& rows, int k, Sums& sums, Sums& parts) const {
    add_scaled<kFormat>(p_, rows, m_, lane_, k, sums, parts);
  }

 private:
  // A word of x, in the order of codec/bytes.cuh, is laid out as a codec's word of bytes: k 2t, 2t + 1 in the lower bytes of
  // the halves, 2t + 8, 2t + 9 in the upper ones.
  __device__ void decode_tokens(uint32_t word, int j, uint32_t (&b)[2]) const {
    if (p_.x.type == Element::kFp8E4m3) {
      b[0] = Codec<Format::kFp8E4m3>::value<T>(place_number<T, 4, 3, 0>(word));
      b[1] = Codec<Format::kFp8E4m3>::value<T>(place_number<T, 4, 3, 8>(word));
      return;
    }
    const uint32_t codes = word ^ 0x80808080u;
    b[0] = Codec<Format::kInt8>::minus_128(codes);
    b[1] = Codec<Format::kInt8>::minus_128(codes >> 8);
    if (p_.x.zeros == nullptr) return;
    b[0] = lowbit::cuda::add<T>(b[0], minus_zero_[j]);
    b[1] = lowbit::cuda::add<T>(b[1], minus_zero_[j]);
  }

  const GemmParams& p_;
  const int lane_, m_;
  uint32_t minus_zero_[kBlocks8] = {};
};

inline constexpr int kDecodeM64 = tile_index("a8_decode_m64");

// Instantiated by a8_decode.cu.
template <Format kFormat>
void run_a8_decode(const GemmParams& p, Stream stream);

#define LOWBIT_INSTANTIATE_A8_DECODE(format)                       \
  template <>                                                      \
  void run_a8_decode<format>(const GemmParams& p, Stream stream) { \
    start_a8<DecodeMath, format, kDecodeM64>(p, stream);           \
  }

}  // namespace lowbit::cuda
