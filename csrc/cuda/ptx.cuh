// One function per PTX instruction that kernels use. Nothing else in csrc/cuda writes assembly, so that the emulator
// (tests/emulator) runs every kernel by giving these names a host definition.
//
// Section numbers are those of NVIDIA's "Parallel Thread Execution ISA". 16-bit pairs travel as uint32_t: element 0 in
// the low half. Register fragments are drawn at `mma`.
#pragma once

#include <cstdint>

#include "cuda/device.cuh"

#if defined(LOWBIT_EMULATOR)
#include "emulator/ptx.h"
#else

namespace lowbit::cuda::ptx {

// ---- asynchronous copies (9.7.9.25.3, cp.async) ------------------------------------------------------------------------

// An address in shared memory as instructions take it (5.2, state spaces).
__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes from global to shared memory past L1; `bytes` (0..16) are read, the rest is filled with zeros. With
// bytes = 0 the source is not touched. Both addresses are multiples of 16.
__device__ inline void cp_async_16(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
               "l"(from), "r"(bytes)
               : "memory");
}

// The same 16 bytes, marked to leave the L2 first: for weights, which are read exactly once.
__device__ inline void cp_async_16_once(void* to, const void* from, uint64_t policy) {
  asm volatile(
      "cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
      "l"(from), "l"(policy)
      : "memory");
}
// (9.7.9.18, createpolicy)
__device__ inline uint64_t policy_evict_first() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kPending of this thread's groups are in flight.
template <int kPending>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- loads that bypass what they would pollute (9.7.9.9, ld.global.nc) -------------------------------------------------

__device__ inline uint4 load_once(const uint4* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}

// ---- synchronisation ---------------------------------------------------------------------------------------------------

__device__ inline void sync_block() { __syncthreads(); }  // 9.7.13.1, bar.sync
__device__ inline void sync_warp() { __syncwarp(); }      // 9.7.13.3, bar.warp.sync
// kThreads of the block, whole warps, meet at its barrier kId; number 0 is sync_block's.
template <int kId, int kThreads>
__device__ inline void sync_some() {
  static_assert(kId >= 0 && kId <= 15 && kThreads % 32 == 0, "a barrier's number, whole warps");
  asm volatile("bar.sync %0, %1;" ::"n"(kId), "n"(kThreads) : "memory");
}
__device__ inline void fence_device() { __threadfence(); }  // 9.7.13.4, membar.gl
// Adds one, returns the value before (9.7.13.5, atom).
__device__ inline uint32_t atomic_increment(uint32_t* counter) { return atomicAdd(counter, 1u); }

// ---- exchange in a warp (9.7.9.6, shfl.sync); every lane takes part ----------------------------------------------------

__device__ inline uint32_t shuffle(uint32_t value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
__device__ inline uint32_t shuffle_xor(uint32_t value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
__device__ inline float shuffle(float value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
__device__ inline float shuffle_xor(float value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
__device__ inline double shuffle(double value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
__device__ inline bool any_lane(bool value) { return __any_sync(0xffffffffu, value); }

// ---- matrices (9.7.14.5) -----------------------------------------------------------------------------------------------

// Four 8x8 matrices of 16-bit elements. Lane l gives the address of row l % 8 (16 bytes, aligned) of matrix l / 8;
// lane l gets elements 2*(l % 4) and 2*(l % 4) + 1 of row l / 4 of each.
__device__ inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
// The same, each matrix transposed: lane l gets elements [2*(l % 4)][l / 4] and [2*(l % 4) + 1][l / 4].
__device__ inline void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
// Transposes an 8x8 matrix of 16-bit elements that is spread over the warp (9.7.14.5.17, movmatrix).
__device__ inline uint32_t movmatrix_transposed(uint32_t value) {
  uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(value));
  return result;
}

// d[16, 8] += a[16, 16] b[16, 8], fp32 sums. With g = lane / 4 and t = lane % 4 a lane holds
//   a[0]: (row g,     k 2t, 2t+1)   a[1]: (row g + 8, k 2t, 2t+1)   a[2]: (row g, k 2t+8, 2t+9)   a[3]: (row g + 8, k 2t+8, 2t+9)
//   b[0]: (k 2t, 2t+1; column g)    b[1]: (k 2t+8, 2t+9; column g)
//   d[0], d[1]: (row g, columns 2t, 2t+1)      d[2], d[3]: (row g + 8, columns 2t, 2t+1)
__device__ inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, "
      "%9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d[16, 8] += a[16, 32] b[32, 8] of bytes, int32 sums. A register holds four bytes, the lowest k in the lowest byte:
//   a[0]: (row g, k 4t..4t+3)   a[1]: (row g + 8, k 4t..)   a[2]: (row g, k 4t+16..)   a[3]: (row g + 8, k 4t+16..)
//   b[0]: (k 4t..4t+3; column g)   b[1]: (k 4t+16..4t+19; column g)   d as above
__device__ inline void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, "
      "%9}, "
      "{%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// The same with unsigned bytes in a.
__device__ inline void mma_u8s8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, "
      "%9}, "
      "{%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// fp8 needs sm_89; kernels that use it are compiled empty below that and never selected there. Files that are compiled once
// for all architectures do not have it (cmake/cuda.cmake: LOWBIT_CUDA_ARCH_DEPENDENT lists those that are not).
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
__device__ inline void mma_e4m3(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// a in e5m2, b in e4m3.
__device__ inline void mma_e5m2(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.f32.e5m2.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#elif !defined(LOWBIT_ONE_PASS)
__device__ inline void mma_e4m3(float (&)[4], const uint32_t (&)[4], uint32_t, uint32_t) {
  __trap();
}
__device__ inline void mma_e5m2(float (&)[4], const uint32_t (&)[4], uint32_t, uint32_t) {
  __trap();
}
#endif

// ---- bits --------------------------------------------------------------------------------------------------------------

// Any function of three bits, per bit: bit i of the table is f(a, b, c) for i = 4a + 2b + c (9.7.8.6, lop3).
template <int kTable>
__device__ inline uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(kTable));
  return d;
}
// Four bytes out of the eight of (a, b): selector nibble i picks byte i of the result, 0..3 from a, 4..7 from b
// (9.7.9.8, prmt).
__device__ inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}

// ---- 16-bit pairs (9.7.4) ----------------------------------------------------------------------------------------------

// a * b + c, rounded once.
__device__ inline uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
__device__ inline uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
__device__ inline uint32_t sub_f16x2(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
__device__ inline uint32_t mul_f16x2(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

// ---- conversions (9.7.9.21, cvt) ---------------------------------------------------------------------------------------

// Two floats to a pair, ties to even.
__device__ inline uint32_t pack_f16x2(float low, float high) {
  uint32_t d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
__device__ inline uint32_t pack_bf16x2(float low, float high) {
  uint32_t d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
// The low 16 bits as fp16.
__device__ inline float f16_to_float(uint32_t bits) {
  float d;
  asm("{.reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h;}" : "=f"(d) : "r"(bits));
  return d;
}
__device__ inline uint32_t float_as_bits(float value) { return __float_as_uint(value); }
__device__ inline float bits_as_float(uint32_t bits) { return __uint_as_float(bits); }

// ---- fp32 with the rounding spelled out (9.7.3); none of these is ever contracted --------------------------------------

__device__ inline float add_rn(float a, float b) { return __fadd_rn(a, b); }
__device__ inline float sub_rn(float a, float b) { return __fsub_rn(a, b); }
__device__ inline float mul_rn(float a, float b) { return __fmul_rn(a, b); }
__device__ inline float div_rn(float a, float b) { return __fdiv_rn(a, b); }
__device__ inline float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }

}  // namespace lowbit::cuda::ptx

#endif  // LOWBIT_EMULATOR
