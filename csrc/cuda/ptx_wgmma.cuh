// One function per instruction of sm_90a's matrix units: wgmma, register budgets, tensor copies. As ptx.cuh, and emulated as
// that is (tests/emulator/ptx_wgmma.h). Included only by files that are compiled for 90a alone.
//
// A warpgroup is four warps, the first a multiple of four. wgmma multiplies 64 x kK of A with kK x kN of B, where kK is 32
// bytes of either. Warp w has the rows 16w .. 16w + 15, and in it lane 4g + t
//
//   a[0..3]           the registers of A of one mma (ptx.cuh): rows g, g + 8, k in the lower and the upper 16 bytes
//   d[4b .. 4b + 3]   (row g, columns 8b + 2t, 2t + 1), then (row g + 8, the same)
//
// B lies in shared memory, column by column, kK contiguous. The instruction is asynchronous: from its issue to the
// wait for its group, d is not to be touched, a not to be written, and B has to stay.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/device.cuh"
#include "cuda/ptx.cuh"
#include "cuda/tensor_map.h"
#include "cuda/wgmma_registers.h"
#include "cuda/wgmma_widths.h"

namespace lowbit::cuda {

// What A and B hold. B of kE5m2 is e4m3.
enum class Wgmma { kBf16, kF16, kE4m3, kE5m2, kS8 };

template <Wgmma kKind>
using WgmmaSum = std::conditional_t<kKind == Wgmma::kS8, int32_t, float>;

}  // namespace lowbit::cuda

#if defined(LOWBIT_EMULATOR)
#include "emulator/ptx_wgmma.h"
#else

namespace lowbit::cuda::ptx {

// ---- order (9.7.15.7) ----------------------------------------------------------------------------------------------

// Waits until at most kPending of the warp's groups are in flight.
template <int kPending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving a register across this point: it does not know what is in flight.
__device__ inline void wgmma_pin(float& value) { asm volatile("" : "+f"(value)::"memory"); }
__device__ inline void wgmma_pin(int32_t& value) { asm volatile("" : "+r"(value)::"memory"); }
__device__ inline void wgmma_pin(uint32_t& value) { asm volatile("" : "+r"(value)::"memory"); }

// ---- wgmma.mma_async (9.7.15.5.2) ----------------------------------------------------------------------------------

// With what follows the columns in the instruction's name, and its last operands.
#define LOWBIT_BF16(X, ...) X("+f", "k16.f32.bf16.bf16", ", 1, 1, 0", __VA_ARGS__)
#define LOWBIT_F16(X, ...) X("+f", "k16.f32.f16.f16", ", 1, 1, 0", __VA_ARGS__)
#define LOWBIT_E4M3(X, ...) X("+f", "k32.f32.e4m3.e4m3", ", 1, 1", __VA_ARGS__)
#define LOWBIT_E5M2(X, ...) X("+f", "k32.f32.e5m2.e4m3", ", 1, 1", __VA_ARGS__)
#define LOWBIT_S8(X, ...) X("+r", "k32.s32.s8.s8", "", __VA_ARGS__)

// %b is the descriptor of B, %p whether D is added to; `a` and `d` are lists of registers.
#define LOWBIT_START(p) "{.reg .pred p; setp.ne.b32 p, " p ", 0;\n"
#define LOWBIT_FENCE "wgmma.fence.sync.aligned;\n"
#define LOWBIT_WGMMA(n, kind, tail, d, a, b) \
  "wgmma.mma_async.sync.aligned.m64n" #n kind " {" d "}, {" a "}, " b ", p" tail ";\n"
#define LOWBIT_COMMIT "wgmma.commit_group.sync.aligned;\n"
#define LOWBIT_A(a) "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])

// One of several, by a branch that all threads take: of the labels, the one that %i counts to.
#define LOWBIT_PICK(i, labels) "t: .branchtargets " labels "; brx.idx.uni " i ", t;\n"
#define LOWBIT_CASE(n, kind, tail, b, a)                                                 \
  "n" #n ": " LOWBIT_FENCE LOWBIT_WGMMA(n, kind, tail, LOWBIT_D_##n, a, b) LOWBIT_COMMIT \
      "bra.uni end;\n"
#define LOWBIT_CASE_2(n, kind, tail, b, a0, a1)                              \
  "n" #n ": " LOWBIT_FENCE LOWBIT_WGMMA(n, kind, tail, LOWBIT_D0_##n, a0, b) \
      LOWBIT_WGMMA(n, kind, tail, LOWBIT_D1_##n, a1, b) LOWBIT_COMMIT "bra.uni end;\n"

#define LOWBIT_ONE_FRAGMENT(c, kind, tail, most, labels, cases, a, b, p, i)    \
  asm volatile(LOWBIT_START(p) LOWBIT_PICK(i, labels)                          \
                   cases(LOWBIT_CASE, kind, tail, b, a) "end:\n}"              \
               : LOWBIT_O_##most(c, d[0], 0)                                   \
               : LOWBIT_A(a_[0]), "l"(b_), "r"(accumulate ? 1 : 0), "r"(which) \
               : "memory")
#define LOWBIT_TWO_FRAGMENTS(c, kind, tail, most, labels, cases, a0, a1, b, p, i)               \
  asm volatile(LOWBIT_START(p) LOWBIT_PICK(i, labels)                                           \
                   cases(LOWBIT_CASE_2, kind, tail, b, a0, a1) "end:\n}"                        \
               : LOWBIT_OO_##most(c, d, 0)                                                      \
               : LOWBIT_A(a_[0]), LOWBIT_A(a_[1]), "l"(b_), "r"(accumulate ? 1 : 0), "r"(which) \
               : "memory")
#define LOWBIT_256_COLUMNS(c, kind, tail, a, b, p)                                            \
  asm volatile(LOWBIT_START(p) LOWBIT_FENCE LOWBIT_WGMMA(256, kind, tail, LOWBIT_D_256, a, b) \
                   LOWBIT_COMMIT "}"                                                          \
               : LOWBIT_O_256(c, d[0], 0)                                                     \
               : LOWBIT_A(a_[0]), "l"(b_), "r"(accumulate ? 1 : 0)                            \
               : "memory")

#define LOWBIT_8_TO_64(X, ...) \
  X(8, __VA_ARGS__)            \
  X(16, __VA_ARGS__)           \
  X(24, __VA_ARGS__)           \
  X(32, __VA_ARGS__) X(40, __VA_ARGS__) X(48, __VA_ARGS__) X(56, __VA_ARGS__) X(64, __VA_ARGS__)
#define LOWBIT_8_TO_64_S8(X, ...) \
  X(8, __VA_ARGS__)               \
  X(16, __VA_ARGS__) X(24, __VA_ARGS__) X(32, __VA_ARGS__) X(48, __VA_ARGS__) X(64, __VA_ARGS__)
#define LOWBIT_72_TO_128(X, ...) \
  X(72, __VA_ARGS__)             \
  X(80, __VA_ARGS__)             \
  X(88, __VA_ARGS__)             \
  X(96, __VA_ARGS__) X(104, __VA_ARGS__) X(112, __VA_ARGS__) X(120, __VA_ARGS__) X(128, __VA_ARGS__)
#define LOWBIT_80_TO_128_S8(X, ...) \
  X(80, __VA_ARGS__) X(96, __VA_ARGS__) X(112, __VA_ARGS__) X(128, __VA_ARGS__)

// Sums of so many fragments, and what picks the columns.
#define LOWBIT_2_64(X)                                                                 \
  X(LOWBIT_TWO_FRAGMENTS, 64, "n8, n16, n24, n32, n40, n48, n56, n64", LOWBIT_8_TO_64, \
    "%64, %65, %66, %67", "%68, %69, %70, %71", "%72", "%73", "%74")
#define LOWBIT_2_64_S8(X)                                                       \
  X(LOWBIT_TWO_FRAGMENTS, 64, "n8, n16, n24, n32, n48, n64", LOWBIT_8_TO_64_S8, \
    "%64, %65, %66, %67", "%68, %69, %70, %71", "%72", "%73", "%74")
#define LOWBIT_2_128(X)                                                                        \
  X(LOWBIT_TWO_FRAGMENTS, 128, "n72, n80, n88, n96, n104, n112, n120, n128", LOWBIT_72_TO_128, \
    "%128, %129, %130, %131", "%132, %133, %134, %135", "%136", "%137", "%138")
#define LOWBIT_1_128(X)                                                                       \
  X(LOWBIT_ONE_FRAGMENT, 128, "n72, n80, n88, n96, n104, n112, n120, n128", LOWBIT_72_TO_128, \
    "%64, %65, %66, %67", "%68", "%69", "%70")
#define LOWBIT_1_128_S8(X)                                                                       \
  X(LOWBIT_ONE_FRAGMENT, 128, "n80, n96, n112, n128", LOWBIT_80_TO_128_S8, "%64, %65, %66, %67", \
    "%68", "%69", "%70")
#define LOWBIT_1_256(X) X(LOWBIT_256_COLUMNS, "%128, %129, %130, %131", "%132", "%133")

// d[i] = a[i] b + (accumulate ? d[i] : 0) of as many columns as wgmma_choice() says, the number of which is `which`, in the
// first registers of d[i]; a fence before them, and they are a group.
template <Wgmma kKind, int kFragments, int kCount>
__device__ inline void wgmma(WgmmaSum<kKind> (&d)[kFragments][kCount],
                             const uint32_t (&a_)[kFragments][4], uint64_t b_, int which,
                             bool accumulate) {
  constexpr bool halves = kKind == Wgmma::kBf16 || kKind == Wgmma::kF16;
  constexpr bool integers = kKind == Wgmma::kS8;
  static_assert((kFragments == 2 && kCount == 32) ||
                    (halves ? kFragments * kCount == 128 : kFragments == 1 && kCount == 64),
                "what tiles use");
  if constexpr (kFragments == 2 && kCount == 32 && integers) {
    LOWBIT_2_64_S8(LOWBIT_S8);
  } else if constexpr (integers) {
    LOWBIT_1_128_S8(LOWBIT_S8);
  } else if constexpr (kFragments == 2 && kCount == 32 && kKind == Wgmma::kBf16) {
    LOWBIT_2_64(LOWBIT_BF16);
  } else if constexpr (kFragments == 2 && kCount == 32 && kKind == Wgmma::kF16) {
    LOWBIT_2_64(LOWBIT_F16);
  } else if constexpr (kFragments == 2 && kCount == 32 && kKind == Wgmma::kE4m3) {
    LOWBIT_2_64(LOWBIT_E4M3);
  } else if constexpr (kFragments == 2 && kCount == 32) {
    LOWBIT_2_64(LOWBIT_E5M2);
  } else if constexpr (kFragments == 2 && kKind == Wgmma::kBf16) {
    LOWBIT_2_128(LOWBIT_BF16);
  } else if constexpr (kFragments == 2) {
    LOWBIT_2_128(LOWBIT_F16);
  } else if constexpr (kKind == Wgmma::kE4m3) {
    LOWBIT_1_128(LOWBIT_E4M3);
  } else if constexpr (kKind == Wgmma::kE5m2) {
    LOWBIT_1_128(LOWBIT_E5M2);
  } else if constexpr (kKind == Wgmma::kBf16) {
    LOWBIT_1_256(LOWBIT_BF16);
  } else {
    LOWBIT_1_256(LOWBIT_F16);
  }
}

#undef LOWBIT_BF16
#undef LOWBIT_F16
#undef LOWBIT_E4M3
#undef LOWBIT_E5M2
#undef LOWBIT_S8
#undef LOWBIT_START
#undef LOWBIT_FENCE
#undef LOWBIT_WGMMA
#undef LOWBIT_COMMIT
#undef LOWBIT_A
#undef LOWBIT_PICK
#undef LOWBIT_CASE
#undef LOWBIT_CASE_2
#undef LOWBIT_ONE_FRAGMENT
#undef LOWBIT_TWO_FRAGMENTS
#undef LOWBIT_256_COLUMNS
#undef LOWBIT_8_TO_64
#undef LOWBIT_8_TO_64_S8
#undef LOWBIT_72_TO_128
#undef LOWBIT_80_TO_128_S8
#undef LOWBIT_2_64
#undef LOWBIT_2_64_S8
#undef LOWBIT_2_128
#undef LOWBIT_1_128
#undef LOWBIT_1_128_S8
#undef LOWBIT_1_256

// ---- register budgets (9.7.19.5, setmaxnreg); all four warps of a warpgroup ----------------------------------------

template <int kRegisters>
__device__ inline void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- tensor copies (9.7.9.25.5.2, cp.async.bulk.tensor) ------------------------------------------------------------

// A box of the matrix behind `map`, whose first element is (row, column), to shared memory at a multiple of 1024 bytes. What
// lies outside of the matrix becomes zeros; all bytes of the box count for the barrier.
__device__ inline void copy_box(void* to, const TensorMap& map, int32_t row, int32_t column,
                                uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, "
      "%3}], [%4];" ::"r"(shared_address(to)),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
}

// The same, to every block of the cluster whose bit is set in `blocks` (copy_bulk_shared, ptx_hopper.cuh).
__device__ inline void copy_box_shared(void* to, const TensorMap& map, int32_t row, int32_t column,
                                       uint64_t* barrier, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(column), "r"(row), "r"(shared_address(barrier)),
      "h"(blocks)
      : "memory");
}

// Fetches a map, so that the first copy need not wait for it (9.7.9.25.3, prefetch).
__device__ inline void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(&map)) : "memory");
}

}  // namespace lowbit::cuda::ptx

#endif  // LOWBIT_EMULATOR
