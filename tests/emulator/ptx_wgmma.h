// csrc/cuda/ptx_wgmma.cuh on the CPU, as ptx.h is ptx.cuh.
#pragma once

#include <cstdint>

#include "emulator/ptx.h"

namespace lowbit::emulator {

// One warp's share of a wgmma: registers of the running lane, and what all lanes agree on.
struct WgmmaOperands {
  int kind;     // cuda::Wgmma
  int columns;  // N
  uint32_t* d;  // [columns / 2]
  const uint32_t* a;
  uint64_t b;
  bool accumulate;
};
void wgmma(const WgmmaOperands& operands, Site at);
// Those of the instruction of this number; ends the launch where there is none.
int wgmma_columns(bool integers, int most, int number, Site at);
void wgmma_wait(int pending, Site at);
// What a wgmma of ptx_wgmma.cuh begins and ends with.
void wgmma_fence(Site at = Site::here());
void wgmma_commit(Site at = Site::here());
void set_registers(int count, bool more, Site at);

}  // namespace lowbit::emulator

namespace lowbit::cuda::ptx {

// ---- order -------------------------------------------------------------------------------------------------------------

template <int kPending>
void wgmma_wait(Site at = Site::here()) {
  static_assert(kPending >= 0 && kPending <= 7, "a number of groups");
  emulator::wgmma_wait(kPending, at);
}

inline void wgmma_pin(float&) {}
inline void wgmma_pin(int32_t&) {}
inline void wgmma_pin(uint32_t&) {}

// ---- wgmma.mma_async ---------------------------------------------------------------------------------------------------

template <Wgmma kKind, int kFragments, int kCount>
void wgmma(WgmmaSum<kKind> (&d)[kFragments][kCount], const uint32_t (&a)[kFragments][4], uint64_t b,
           int which, bool accumulate, Site at = Site::here()) {
  const int columns = emulator::wgmma_columns(kKind == Wgmma::kS8, 2 * kCount, which, at);
  emulator::wgmma_fence(at);
  for (int i = 0; i < kFragments; ++i)
    emulator::wgmma({static_cast<int>(kKind), columns, reinterpret_cast<uint32_t*>(&d[i][0]), a[i],
                     b, accumulate},
                    at);
  emulator::wgmma_commit(at);
}

// ---- register budgets --------------------------------------------------------------------------------------------------

template <int kRegisters>
void raise_registers(Site at = Site::here()) {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0, "as setmaxnreg");
  emulator::set_registers(kRegisters, true, at);
}
template <int kRegisters>
void lower_registers(Site at = Site::here()) {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0, "as setmaxnreg");
  emulator::set_registers(kRegisters, false, at);
}

// ---- tensor copies -----------------------------------------------------------------------------------------------------

void copy_box(void* to, const TensorMap& map, int32_t row, int32_t column, uint64_t* barrier,
              Site at = Site::here());
void copy_box_shared(void* to, const TensorMap& map, int32_t row, int32_t column, uint64_t* barrier,
                     uint16_t blocks, Site at = Site::here());
void prefetch_map(const TensorMap& map, Site at = Site::here());

}  // namespace lowbit::cuda::ptx
