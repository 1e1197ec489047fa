#include "cpu/amx.h"

#include "common/check.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#endif
#endif

namespace lowbit {
namespace {

#if defined(__x86_64__)

struct CpuBits {
  bool tile = false, int8 = false, bf16 = false;
  bool saved = false;  // the operating system saves tile registers on a context switch
};

CpuBits read_cpu() {
  CpuBits bits;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return bits;
  bits.bf16 = (d >> 22 & 1u) != 0;
  bits.tile = (d >> 24 & 1u) != 0;
  bits.int8 = (d >> 25 & 1u) != 0;
  constexpr unsigned kOsXsave = 1u << 27;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0 || (c & kOsXsave) == 0) return bits;
  unsigned low = 0, high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr unsigned kTileState = 3u << 17;  // configuration and data
  bits.saved = (low & kTileState) == kTileState;
  return bits;
}

// Since Linux 5.16 a process asks before it uses tiles; a denied one would get SIGILL at the first of them.
std::string ask_for_permission() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023,
                 kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0) return {};
  return concat("Linux refuses tile registers to this process: ", std::strerror(errno));
#else
  return "only Linux is asked for tile registers";
#endif
}

std::string find_refusal() {
  const CpuBits cpu = read_cpu();
  std::string missing;
  for (const auto& [name, there] : amx_features()) {
    if (!there) missing += missing.empty() ? name : ", " + name;
  }
  if (!missing.empty()) return "the CPU lacks " + missing;
  if (!cpu.saved) return "the operating system does not save tile registers";
  return ask_for_permission();
}

#else

std::string find_refusal() { return "not an x86-64 CPU"; }

#endif

}  // namespace

const std::string& amx_refusal() {
  static const std::string refusal = find_refusal();
  return refusal;
}

std::vector<std::pair<std::string, bool>> amx_features() {
#if defined(__x86_64__)
  const CpuBits cpu = read_cpu();
  return {{"amx-tile", cpu.tile}, {"amx-int8", cpu.int8}, {"amx-bf16", cpu.bf16}};
#else
  return {};
#endif
}

}  // namespace lowbit
