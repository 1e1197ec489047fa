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

// Before the first wgmma, and before any that reads registers which other instructions wrote.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
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

// Registers %0 .. of D, and the same as operands.
#define LOWBIT_D8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define LOWBIT_D16 \
  LOWBIT_D8        \
  ", %8, %9, %10, %11, %12, %13, %14, %15"
#define LOWBIT_D32 \
  LOWBIT_D16       \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LOWBIT_D64                                                                   \
  LOWBIT_D32                                                                         \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define LOWBIT_D128                                                                              \
  LOWBIT_D64                                                                                     \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"             \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"             \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, " \
  "%127"
#define LOWBIT_O8(c, d, i) \
  c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3]), c(d[i + 4]), c(d[i + 5]), c(d[i + 6]), c(d[i + 7])
#define LOWBIT_O16(c, d, i) LOWBIT_O8(c, d, i), LOWBIT_O8(c, d, i + 8)
#define LOWBIT_O32(c, d, i) LOWBIT_O16(c, d, i), LOWBIT_O16(c, d, i + 16)
#define LOWBIT_O64(c, d, i) LOWBIT_O32(c, d, i), LOWBIT_O32(c, d, i + 32)
#define LOWBIT_O128(c, d, i) LOWBIT_O64(c, d, i), LOWBIT_O64(c, d, i + 64)

// %a .. are the registers of A, %b the descriptor of B, %p whether D is added to.
#define LOWBIT_WGMMA_A(c, kind, n, tail, count, a0, a1, a2, a3, b, p)                             \
  asm volatile("{.reg .pred p; setp.ne.b32 p, " p ", 0; wgmma.mma_async.sync.aligned.m64n" n kind \
               " {" LOWBIT_D##count "}, {" a0 ", " a1 ", " a2 ", " a3 "}, " b ", p" tail ";}"     \
               : LOWBIT_O##count(c, d, 0)                                                         \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_), "r"(accumulate ? 1 : 0))
#define LOWBIT_WGMMA_KINDS(n, count, ...)                                          \
  if constexpr (kKind == Wgmma::kBf16) {                                           \
    LOWBIT_WGMMA_A("+f", "k16.f32.bf16.bf16", n, ", 1, 1, 0", count, __VA_ARGS__); \
  } else if constexpr (kKind == Wgmma::kF16) {                                     \
    LOWBIT_WGMMA_A("+f", "k16.f32.f16.f16", n, ", 1, 1, 0", count, __VA_ARGS__);   \
  } else if constexpr (kKind == Wgmma::kE4m3) {                                    \
    LOWBIT_WGMMA_A("+f", "k32.f32.e4m3.e4m3", n, ", 1, 1", count, __VA_ARGS__);    \
  } else if constexpr (kKind == Wgmma::kE5m2) {                                    \
    LOWBIT_WGMMA_A("+f", "k32.f32.e5m2.e4m3", n, ", 1, 1", count, __VA_ARGS__);    \
  } else {                                                                         \
    LOWBIT_WGMMA_A("+r", "k32.s32.s8.s8", n, "", count, __VA_ARGS__);              \
  }

// d = a b + (accumulate ? d : 0), with A in registers.
template <Wgmma kKind, int kN>
__device__ inline void wgmma(WgmmaSum<kKind> (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b_,
                             bool accumulate) {
  static_assert(kN == 16 || kN == 32 || kN == 64 || kN == 128 || kN == 256, "what tiles use");
  if constexpr (kN == 16) {
    LOWBIT_WGMMA_KINDS("16", 8, "%8", "%9", "%10", "%11", "%12", "%13")
  } else if constexpr (kN == 32) {
    LOWBIT_WGMMA_KINDS("32", 16, "%16", "%17", "%18", "%19", "%20", "%21")
  } else if constexpr (kN == 64) {
    LOWBIT_WGMMA_KINDS("64", 32, "%32", "%33", "%34", "%35", "%36", "%37")
  } else if constexpr (kN == 128) {
    LOWBIT_WGMMA_KINDS("128", 64, "%64", "%65", "%66", "%67", "%68", "%69")
  } else {
    LOWBIT_WGMMA_KINDS("256", 128, "%128", "%129", "%130", "%131", "%132", "%133")
  }
}

#undef LOWBIT_WGMMA_KINDS
#undef LOWBIT_WGMMA_A

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

}  // namespace lowbit::cuda::ptx

#endif  // LOWBIT_EMULATOR
