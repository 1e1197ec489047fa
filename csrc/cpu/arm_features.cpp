#if defined(__aarch64__)
#include "cpu/arm_features.h"

#if defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__linux__)
#include <sys/auxv.h>
#endif

namespace lowbit {

#if defined(__APPLE__)

static bool has(const char* name) {
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}

ArmFeatures arm_features() {
  return {has("hw.optional.arm.FEAT_DotProd"), has("hw.optional.arm.FEAT_I8MM")};
}

#elif defined(__linux__)

// Bits of the kernel's interface, which headers of older systems lack.
constexpr unsigned long kHwcapDotProd = 1ul << 20, kHwcap2I8mm = 1ul << 13;

ArmFeatures arm_features() {
  return {(getauxval(AT_HWCAP) & kHwcapDotProd) != 0, (getauxval(AT_HWCAP2) & kHwcap2I8mm) != 0};
}

#else

ArmFeatures arm_features() { return {}; }  // no way known to ask: NEON alone

#endif

}  // namespace lowbit
#endif
