// The numbers of devices that are not here: what selection needs to answer for them.

#include <algorithm>

#include "cuda/select.h"

namespace lowbit::cuda {
namespace {

// One row per compute capability: shared memory from the CUDA C++ Programming Guide's table of technical specifications
// (per multiprocessor; a block may have 1 KB less), and the multiprocessors of devices that people have.
struct Model {
  int capability;
  int shared_kb;
  int sms;  // of the model meant when no number is given
  int most_sms;
  const char* devices;
};

constexpr Model kModels[] = {
    {80, 164, 108, 108, "A100, A30 (56)"},
    {86, 100, 84, 84, "RTX A6000, A40, RTX 3090 (82)"},
    {87, 164, 16, 16, "Jetson Orin"},
    {89, 100, 128, 142, "RTX 4090, L40S (142), L4 (58)"},
    {90, 228, 132, 132, "H100, H200, H100 PCIe (114)"},
    {100, 228, 148, 148, "B200"},
    {103, 228, 148, 148, "B300"},
    {110, 228, 20, 20, "Jetson Thor"},
    {120, 100, 170, 188, "RTX 5090, RTX PRO 6000 (188)"},
    {121, 100, 48, 48, "GB10"},
};

DeviceInfo info_of(const Model& model, int sms) {
  const int64_t shared = int64_t{model.shared_kb} * 1024;
  return {model.capability, sms, shared - 1024, shared, model.capability == 90};
}

// A later device of a known generation has at least the shared memory of the nearest one below.
const Model& nearest(int capability) {
  const Model* found = &kModels[0];
  for (const Model& model : kModels) {
    if (model.capability <= capability) found = &model;
  }
  return *found;
}

// Digits only, and few of them.
bool parse_number(const std::string& text, int& value) {
  if (text.empty() || text.size() > 6 ||
      !std::all_of(text.begin(), text.end(), [](char c) { return c >= '0' && c <= '9'; }))
    return false;
  value = std::stoi(text);
  return true;
}

}  // namespace

void check_capability(const char* op, const DeviceInfo& device) {
  LOWBIT_CHECK(device.capability >= 80, op, ": the device is sm_", device.capability,
               "; lowbit's CUDA kernels need compute capability 8.0 (Ampere) or later");
}

DeviceInfo device_model(const std::string& name) {
  std::string text = name.rfind("cuda:", 0) == 0 ? name.substr(5) : name;
  int ordinal = 0;
  if (text == "cuda" || parse_number(text, ordinal)) text = kDefaultModel;
  const size_t colon = text.find(':');
  int capability = 0, sms = 0;
  bool valid =
      text.rfind("sm_", 0) == 0 &&
      parse_number(text.substr(3, colon == std::string::npos ? colon : colon - 3), capability);
  if (valid && colon != std::string::npos)
    valid = parse_number(text.substr(colon + 1), sms) && sms >= 1;
  LOWBIT_CHECK(
      valid, "device='", name,
      "' is not cuda, sm_<capability> or sm_<capability>:<multiprocessors>, such as sm_90:132");
  DeviceInfo device = info_of(nearest(capability), sms == 0 ? nearest(capability).sms : sms);
  device.capability = capability;
  device.hopper = capability == 90;
  check_capability(concat("device='", name, "'").c_str(), device);
  return device;
}

std::vector<DeviceInfo> known_devices() {
  std::vector<DeviceInfo> devices;
  for (const Model& model : kModels) devices.push_back(info_of(model, model.most_sms));
  return devices;
}

}  // namespace lowbit::cuda
