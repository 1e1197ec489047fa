#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>

#include "cpu/amx.h"
#if defined(__aarch64__)
#include "cpu/arm_features.h"
#endif

namespace lowbit {
namespace {

struct Level {
  const IsaKernels* kernels;
  bool available;
};

#if defined(__x86_64__)
// avx512vnni's kernels, and those on tiles. Not avx512bf16's: Intel's CPUs have AMX and slow bf16 dot products.
const IsaKernels& kernels_amx() {
  static const IsaKernels table = [] {
    IsaKernels all = kernels_avx512vnni();
    all.isa = "amx";
    all.amx = &amx_kernels();
    return all;
  }();
  return table;
}
#endif

const std::vector<Level>& levels() {
  static const std::vector<Level> all = [] {
    std::vector<Level> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    // With VBMI: Ice Lake, Zen 4 and later. Cascade Lake, which has VNNI alone, takes the level below.
    const bool vnni =
        avx512 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
    // Intel issues a bf16 dot product every other cycle, which makes it slower than two fp32 multiply-adds.
    const bool fast_bf16 = __builtin_cpu_is("amd") && __builtin_cpu_supports("avx512bf16");
    // Asked for only where it could be used, so that other machines see no request.
    const bool amx = vnni && __builtin_cpu_supports("avx512bf16") && amx_refusal().empty();
    found.push_back({&kernels_amx(), amx});
    found.push_back({&kernels_avx512bf16(), vnni && fast_bf16});
    found.push_back({&kernels_avx512vnni(), vnni});
    found.push_back({&kernels_avx512(), avx512});
    found.push_back({&kernels_avx2(), avx2});
#elif defined(__aarch64__)
    const ArmFeatures arm = arm_features();
    found.push_back({&kernels_neoni8mm(), arm.dotprod && arm.i8mm});
    found.push_back({&kernels_neondotprod(), arm.dotprod});
    found.push_back({&kernels_neon(), true});
#endif
    found.push_back({&kernels_portable(), true});
    return found;
  }();
  return all;
}

// See set_extra_isa.
std::atomic<const IsaKernels*> extra{nullptr};

std::string available_names() {
  std::string names;
  for (const std::string& name : isa_levels()) names += names.empty() ? name : ", " + name;
  return names;
}

const IsaKernels* find_available(const std::string& name) {
  for (const Level& level : levels()) {
    if (level.available && name == level.kernels->isa) return level.kernels;
  }
  const IsaKernels* added = extra.load(std::memory_order_acquire);
  if (added != nullptr && name == added->isa) return added;
  std::string why;
  for (const auto& [level, reason] : isa_refusals()) {
    if (level == name) why = concat(" (", level, ": ", reason, ")");
  }
  fail("instruction set '", name, "' is not one that this CPU can run: ", available_names(), why);
}

const IsaKernels* initial() {
  const char* forced = std::getenv("LOWBIT_ISA");
  if (forced != nullptr && *forced != '\0') return find_available(forced);
  for (const Level& level : levels()) {
    if (level.available) return level.kernels;
  }
  return &kernels_portable();
}

std::atomic<const IsaKernels*> chosen{nullptr};

}  // namespace

std::vector<std::string> isa_levels() {
  std::vector<std::string> names;
  for (const Level& level : levels()) {
    if (level.available) names.emplace_back(level.kernels->isa);
  }
  // Before the last, which stays "portable"; not first, because the first is the best.
  const IsaKernels* added = extra.load(std::memory_order_acquire);
  if (added != nullptr) names.insert(names.end() - 1, added->isa);
  return names;
}

std::vector<std::string> compiled_isa_levels() {
  std::vector<std::string> names;
  for (const Level& level : levels()) names.emplace_back(level.kernels->isa);
  return names;
}

std::vector<std::pair<std::string, std::string>> isa_refusals() {
  if (amx_refusal().empty()) return {};
  return {{"amx", amx_refusal()}};
}

// LOWBIT_ISA is read at the first use and not at load, so that a wrong value is an exception and not a crash.
const IsaKernels& kernels() {
  const IsaKernels* now = chosen.load(std::memory_order_acquire);
  if (now == nullptr) {
    now = initial();
    chosen.store(now, std::memory_order_release);
  }
  return *now;
}

const IsaKernels* kernels_of(const std::string& name) {
  for (const Level& level : levels()) {
    if (name == level.kernels->isa) return level.kernels;
  }
  const IsaKernels* added = extra.load(std::memory_order_acquire);
  return added != nullptr && name == added->isa ? added : nullptr;
}

std::string current_isa() { return kernels().isa; }

void set_isa(const std::string& name) {
  chosen.store(find_available(name), std::memory_order_release);
}

void set_extra_isa(const std::string& name, const AmxKernels* tiles) {
#if defined(__x86_64__)
  static IsaKernels table;
  static std::string kept;  // the table points to it
  if (chosen.load() == &table) set_isa(isa_levels().front());
  extra.store(nullptr, std::memory_order_release);
  if (tiles == nullptr) return;
  for (const Level& level : levels()) {
    if (!level.available ||
        (level.kernels != &kernels_avx512vnni() && level.kernels != &kernels_avx512()))
      continue;
    table = *level.kernels;
    kept = name;
    table.isa = kept.c_str();
    table.amx = tiles;
    extra.store(&table, std::memory_order_release);
    return;
  }
#endif
  LOWBIT_CHECK(tiles == nullptr, "tile kernels need AVX-512, which this CPU lacks; ", name,
               " was not added");
}

std::vector<std::pair<std::string, bool>> cpu_features() {
  std::vector<std::pair<std::string, bool>> features;
#if defined(__x86_64__)
  __builtin_cpu_init();
#define LOWBIT_FEATURE(name) features.emplace_back(name, __builtin_cpu_supports(name) != 0)
  LOWBIT_FEATURE("sse4.2");
  LOWBIT_FEATURE("avx");
  LOWBIT_FEATURE("f16c");
  LOWBIT_FEATURE("fma");
  LOWBIT_FEATURE("avx2");
  LOWBIT_FEATURE("avx512f");
  LOWBIT_FEATURE("avx512bw");
  LOWBIT_FEATURE("avx512dq");
  LOWBIT_FEATURE("avx512vl");
  LOWBIT_FEATURE("avx512vnni");
  LOWBIT_FEATURE("avx512vbmi");
  LOWBIT_FEATURE("avx512bf16");
#undef LOWBIT_FEATURE
  for (auto& feature : amx_features()) features.push_back(std::move(feature));
#elif defined(__aarch64__)
  const ArmFeatures arm = arm_features();
  features.emplace_back("neon", true);
  features.emplace_back("dotprod", arm.dotprod);
  features.emplace_back("i8mm", arm.i8mm);
#endif
  return features;
}

}  // namespace lowbit
