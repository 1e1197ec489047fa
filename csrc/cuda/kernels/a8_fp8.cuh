// e4m3 activations times e4m3 or e5m2 weights on fp8 tensor cores (sm_89 and later), sums promoted to fp32 registers every
// 128 of K at the latest: what tensor cores add in one go keeps fewer bits than fp32. Scales of groups, of 128 x 128 blocks
// and of 128 k of x meet the sums there.
#pragma once

#include "cuda/kernels/a8.cuh"

namespace lowbit::cuda {

template <Format kFormat, int kBlocks8>
class Fp8Math {
 public:
  using Part = float;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
  static constexpr bool kCompiled = false;
#else
  static constexpr bool kCompiled = true;
#endif
  static constexpr int kCells = 2;
  static constexpr int kMostK = 128;
  static constexpr float kUnit = 1.0f;
  // Fragments whose words are in registers at once. sm_90 has no fp8 mma.sync: the assembler converts both sides to fp16
  // there, which takes the registers of two; 8-byte loads then cost it twice the reads of shared memory.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
  static constexpr int kAtOnce = 2;
#else
  static constexpr int kAtOnce = kFragments;
#endif
  using Sums = float[kFragments][kBlocks8][4];

  __device__ Fp8Math(const GemmParams& p, int lane, int m) : p_(p), lane_(lane), m_(m) {}

  static __device__ uint32_t pad(int) { return 0; }

  __device__ void multiply(const uint8_t* codes, const GroupRows&, int cell, bool two,
                           const uint32_t (&b)[kBlocks8][2], Sums& parts) const {
    // Zeros in place of a next cell of another group.
    const uint32_t second = two ? 0xffffffffu : 0u;
#pragma unroll
    for (int first = 0; first < kFragments; first += kAtOnce) {
      uint32_t words[2][2][kAtOnce];  // [cell, next cell][registers 0, 1; 2, 3][fragment]
#pragma unroll
      for (int v = 0; v < 4; ++v)
        load_words(codes + (2 * (two ? cell + v / 2 : cell) + v % 2) * kWarpVector, first,
                   words[v / 2][v % 2]);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const uint32_t a[4] = {whole_bytes<0>(words[0][0][i], words[0][1][i]),
                               whole_bytes<1>(words[0][0][i], words[0][1][i]),
                               whole_bytes<0>(words[1][0][i], words[1][1][i]) & second,
                               whole_bytes<1>(words[1][0][i], words[1][1][i]) & second};
#pragma unroll
        for (int j = 0; j < kBlocks8; ++j) {
          if constexpr (kFormat == Format::kFp8E4m3) {
            ptx::mma_e4m3(parts[first + i][j], a, b[j][0], b[j][1]);
          } else {
            ptx::mma_e5m2(parts[first + i][j], a, b[j][0], b[j][1]);
          }
        }
      }
    }
  }

  __device__ void settle(const GroupRows&, const StepPart&, Sums&) const {}
  __device__ void add(const GroupRows& rows, int k, Sums& sums, Sums& parts) const {
    add_scaled<kFormat>(p_, rows, m_, lane_, k, sums, parts);
  }

 private:
  // Of this lane, the fragments from `first` on.
  __device__ void load_words(const uint8_t* vector, int first, uint32_t (&to)[kAtOnce]) const {
    const uint8_t* from = vector + 16 * lane_ + 4 * first;
    if constexpr (kAtOnce == 4) {
      const uint4 v = *reinterpret_cast<const uint4*>(from);
      to[0] = v.x;
      to[1] = v.y;
      to[2] = v.z;
      to[3] = v.w;
    } else {
      const uint2 v = *reinterpret_cast<const uint2*>(from);
      to[0] = v.x;
      to[1] = v.y;
    }
  }

  const GemmParams& p_;
  const int lane_, m_;
};

}  // namespace lowbit::cuda
