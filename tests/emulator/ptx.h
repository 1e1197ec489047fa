// csrc/cuda/ptx.cuh on the CPU: the same functions (tests/test_emulator.py compares the two lists), one host definition
// each. What happens between threads is in the emulator's own files; the rest is here, to be inlined.
//
// Functions at which threads meet take their place in the source as a last, defaulted argument, for messages and to tell
// one barrier from another.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulator/language.h"
#include "emulator/numbers.h"

namespace lowbit::emulator {

struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

inline constexpr uint64_t kEvictFirst = 0x12f0000000000000u;  // what policy_evict_first returns

void copy_16(void* to, const void* from, int bytes, Site at);
void copy_wait(int pending);
void sync_some(int id, int threads, Site at);

template <uint32_t (*kOfPair)(uint32_t, uint32_t, uint32_t)>
uint32_t per_half(uint32_t a, uint32_t b, uint32_t c) {
  return kOfPair(a & 0xffffu, b & 0xffffu, c & 0xffffu) | kOfPair(a >> 16, b >> 16, c >> 16) << 16;
}
// Products of two 16-bit numbers are exact in double; the sum is rounded once, by way of odd.
inline uint32_t fma_f16(uint32_t a, uint32_t b, uint32_t c) {
  return round_to_half(
      add_to_odd(static_cast<double>(half_value(a)) * half_value(b), half_value(c)));
}
inline uint32_t fma_bf16(uint32_t a, uint32_t b, uint32_t c) {
  return round_to_bfloat16(
      add_to_odd(static_cast<double>(bfloat16_value(a)) * bfloat16_value(b), bfloat16_value(c)));
}
inline uint32_t sub_f16(uint32_t a, uint32_t b, uint32_t) {
  return round_to_half(static_cast<double>(half_value(a)) -
                       half_value(b));  // exact before it is rounded
}
inline uint32_t mul_f16(uint32_t a, uint32_t b, uint32_t) {
  return round_to_half(static_cast<double>(half_value(a)) * half_value(b));
}

}  // namespace lowbit::emulator

namespace lowbit::cuda::ptx {

using emulator::Site;

// ---- asynchronous copies -----------------------------------------------------------------------------------------------

uint32_t shared_address(const void* pointer);
// Between the copy's issue and the issuing thread's wait for it, the 16 bytes hold poison (scheduler.cpp).
inline void cp_async_16(void* to, const void* from, int bytes, Site at = Site::here()) {
  emulator::copy_16(to, from, bytes, at);
}
void cp_async_16_once(void* to, const void* from, uint64_t policy, Site at = Site::here());
inline uint64_t policy_evict_first() { return emulator::kEvictFirst; }
void cp_async_commit();
template <int kPending>
void cp_async_wait() {
  static_assert(kPending >= 0, "a number of groups");
  emulator::copy_wait(kPending);
}

// ---- loads that bypass what they would pollute -------------------------------------------------------------------------

uint4 load_once(const uint4* from, Site at = Site::here());

// ---- synchronisation ---------------------------------------------------------------------------------------------------

void sync_block(Site at = Site::here());
void sync_warp(Site at = Site::here());
template <int kId, int kThreads>
void sync_some(Site at = Site::here()) {
  static_assert(kId >= 0 && kId <= 15 && kThreads % 32 == 0, "a barrier's number, whole warps");
  emulator::sync_some(kId, kThreads, at);
}
void fence_device();
uint32_t atomic_increment(uint32_t* counter, Site at = Site::here());

// ---- exchange in a warp ------------------------------------------------------------------------------------------------

uint32_t shuffle(uint32_t value, int lane, Site at = Site::here());
uint32_t shuffle_xor(uint32_t value, int mask, Site at = Site::here());
float shuffle(float value, int lane, Site at = Site::here());
float shuffle_xor(float value, int mask, Site at = Site::here());
double shuffle(double value, int lane, Site at = Site::here());
bool any_lane(bool value, Site at = Site::here());

// ---- matrices ----------------------------------------------------------------------------------------------------------

void ldmatrix_x4(uint32_t (&r)[4], const void* row, Site at = Site::here());
void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row, Site at = Site::here());
uint32_t movmatrix_transposed(uint32_t value, Site at = Site::here());

void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
             Site at = Site::here());
void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
              Site at = Site::here());
void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
            Site at = Site::here());
void mma_u8s8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
              Site at = Site::here());
void mma_e4m3(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
              Site at = Site::here());
void mma_e5m2(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
              Site at = Site::here());

// ---- bits --------------------------------------------------------------------------------------------------------------

template <int kTable>
constexpr uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  static_assert(kTable >= 0 && kTable < 256, "eight bits, one per combination of three");
  uint32_t d = 0;
  if constexpr ((kTable & 1) != 0) d |= ~a & ~b & ~c;
  if constexpr ((kTable & 2) != 0) d |= ~a & ~b & c;
  if constexpr ((kTable & 4) != 0) d |= ~a & b & ~c;
  if constexpr ((kTable & 8) != 0) d |= ~a & b & c;
  if constexpr ((kTable & 16) != 0) d |= a & ~b & ~c;
  if constexpr ((kTable & 32) != 0) d |= a & ~b & c;
  if constexpr ((kTable & 64) != 0) d |= a & b & ~c;
  if constexpr ((kTable & 128) != 0) d |= a & b & c;
  return d;
}
// A selector nibble above 7 repeats the sign of the byte that its low three bits pick (9.7.9.8).
inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t d = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = selector >> (4 * i);
    uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (nibble & 7u))) & 0xffu;
    if (nibble & 8u) byte = byte & 0x80u ? 0xffu : 0u;
    d |= byte << (8 * i);
  }
  return d;
}

// ---- 16-bit pairs ------------------------------------------------------------------------------------------------------

inline uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
  return emulator::per_half<emulator::fma_f16>(a, b, c);
}
inline uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  return emulator::per_half<emulator::fma_bf16>(a, b, c);
}
inline uint32_t sub_f16x2(uint32_t a, uint32_t b) {
  return emulator::per_half<emulator::sub_f16>(a, b, 0);
}
inline uint32_t mul_f16x2(uint32_t a, uint32_t b) {
  return emulator::per_half<emulator::mul_f16>(a, b, 0);
}

// ---- conversions -------------------------------------------------------------------------------------------------------

inline uint32_t pack_f16x2(float low, float high) {
  return emulator::round_to_half(low) | emulator::round_to_half(high) << 16;
}
inline uint32_t pack_bf16x2(float low, float high) {
  return emulator::round_to_bfloat16(low) | emulator::round_to_bfloat16(high) << 16;
}
inline float f16_to_float(uint32_t bits) { return emulator::half_value(bits & 0xffffu); }
inline uint32_t float_as_bits(float value) { return emulator::bits_of(value); }
inline float bits_as_float(uint32_t bits) { return emulator::float_of(bits); }

// ---- fp32 with the rounding spelled out; compiled with -ffp-contract=off -----------------------------------------------

inline float add_rn(float a, float b) { return a + b; }
inline float sub_rn(float a, float b) { return a - b; }
inline float mul_rn(float a, float b) { return a * b; }
inline float div_rn(float a, float b) { return a / b; }
inline float fma_rn(float a, float b, float c) { return std::fma(a, b, c); }

}  // namespace lowbit::cuda::ptx
