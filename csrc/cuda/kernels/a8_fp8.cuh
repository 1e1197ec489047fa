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
  using Sums = float[kFragments][kBlocks8][4];

  __device__ Fp8Math(const GemmParams& p, int lane, int m) : p_(p), lane_(lane), m_(m) {}

  static __device__ uint32_t pad(int) { return 0; }

  __device__ void multiply(const uint8_t* codes, const GroupRows&, int cell, bool two,
                           const uint32_t (&b)[kBlocks8][2], Sums& parts) const {
    CellWords<2> words[2];
    load_cell<kFormat, kStepCells>(codes, cell, lane_, words[0]);
    load_cell<kFormat, kStepCells>(codes, two ? cell + 1 : cell, lane_, words[1]);
    // Zeros in place of a next cell of another group.
    const uint32_t second = two ? 0xffffffffu : 0u;
#pragma unroll
    for (int i = 0; i < kFragments; ++i) {
      const uint32_t a[4] = {whole_bytes<0>(words[0], i), whole_bytes<1>(words[0], i),
                             whole_bytes<0>(words[1], i) & second,
                             whole_bytes<1>(words[1], i) & second};
#pragma unroll
      for (int j = 0; j < kBlocks8; ++j) {
        if constexpr (kFormat == Format::kFp8E4m3) {
          ptx::mma_e4m3(parts[i][j], a, b[j][0], b[j][1]);
        } else {
          ptx::mma_e5m2(parts[i][j], a, b[j][0], b[j][1]);
        }
      }
    }
  }

  __device__ void settle(const GroupRows&, const StepPart&, Sums&) const {}
  __device__ void add(const GroupRows& rows, int k, Sums& sums, Sums& parts) const {
    add_scaled<kFormat>(p_, rows, m_, lane_, k, sums, parts);
  }

 private:
  const GemmParams& p_;
  const int lane_, m_;
};

}  // namespace lowbit::cuda
