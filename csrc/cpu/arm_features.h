// What an AArch64 CPU and its operating system offer beyond NEON, which every one has.
#pragma once

namespace lowbit {

struct ArmFeatures {
  bool dotprod;  // FEAT_DotProd: Cortex-A76, Neoverse N1, Apple A13 and M1, and later
  bool i8mm;     // FEAT_I8MM: Neoverse V1 and N2, Apple A15 and M2, and later
};

ArmFeatures arm_features();

}  // namespace lowbit
