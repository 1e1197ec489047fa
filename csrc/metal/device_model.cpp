// Apple's GPUs by name: what selection needs to answer for them.

#include <algorithm>
#include <cctype>
#include <cstdlib>

#if defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include "metal/select.h"

namespace lowbit::metal {
namespace {

// Generations of the M series, their GPU family (Metal Feature Set Tables) and the cores that the largest chip of each tier has.
struct Generation {
  const char* name;
  int family;
  int cores[4];  // plain, Pro, Max, Ultra
};
constexpr Generation kGenerations[] = {
    {"M1", 7, {8, 16, 32, 64}},  {"M2", 8, {10, 19, 38, 76}},  {"M3", 9, {10, 18, 40, 80}},
    {"M4", 9, {10, 20, 40, 80}}, {"M5", 10, {10, 20, 40, 80}},
};
constexpr const char* kTiers[] = {"", "Pro", "Max", "Ultra"};

// Digits only, and few of them.
bool parse_number(const std::string& text, int& value) {
  if (text.empty() || text.size() > 6 ||
      !std::all_of(text.begin(), text.end(), [](char c) { return c >= '0' && c <= '9'; }))
    return false;
  value = std::stoi(text);
  return true;
}

// "Apple M3 Max"; empty where the machine has no name for its chip.
std::string chip_name() {
#if defined(__APPLE__)
  char name[128] = {};
  size_t size = sizeof name - 1;
  if (sysctlbyname("machdep.cpu.brand_string", name, &size, nullptr, 0) == 0) return name;
#endif
  return {};
}

}  // namespace

const DeviceInfo& this_device() {
  static const DeviceInfo device = [] {
    // For tests, and for a chip whose name is not known yet.
    const char* model = std::getenv("LOWBIT_METAL_MODEL");
    return model != nullptr && *model != '\0' ? device_model(model) : chip_model(chip_name());
  }();
  return device;
}

std::string model_name(const DeviceInfo& device) {
  return concat("apple", device.family, ":", device.cores);
}

DeviceInfo device_model(const std::string& name) {
  std::string text = name.rfind("mps:", 0) == 0 ? name.substr(4) : name;
  int ordinal = 0;
  if (text == "mps" || parse_number(text, ordinal)) text = kDefaultModel;
  const size_t colon = text.find(':');
  DeviceInfo device{0, 0};
  bool valid =
      text.rfind("apple", 0) == 0 &&
      parse_number(text.substr(5, colon == std::string::npos ? colon : colon - 5), device.family);
  if (valid && colon != std::string::npos)
    valid = parse_number(text.substr(colon + 1), device.cores) && device.cores >= 1;
  LOWBIT_CHECK(valid, "device='", name,
               "' is not mps, apple<family> or apple<family>:<cores>, such as apple9:40");
  LOWBIT_CHECK(device.family >= 7, "device='", name,
               "': lowbit's shaders need GPU family apple7 (M1) or later");
  if (device.cores == 0) {
    for (const Generation& g : kGenerations) {
      if (g.family <= device.family) device.cores = g.cores[0];
    }
  }
  return device;
}

DeviceInfo chip_model(const std::string& brand) {
  for (const Generation& g : kGenerations) {
    const size_t at = brand.find(g.name);
    if (at == std::string::npos) continue;
    const size_t end = at + 2;
    if (end < brand.size() && std::isdigit(static_cast<unsigned char>(brand[end]))) continue;
    int tier = 0;
    for (int i = 1; i < 4; ++i) {
      if (brand.find(kTiers[i], end) != std::string::npos) tier = i;
    }
    return {g.family, g.cores[tier]};
  }
  return device_model(kDefaultModel);
}

}  // namespace lowbit::metal
