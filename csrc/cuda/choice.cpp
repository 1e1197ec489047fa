#include "cuda/choice.h"

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <mutex>

#include "cuda/select.h"
#include "formats/format_table.h"

namespace lowbit::cuda {
namespace {

// ---- forced ------------------------------------------------------------------------------------------------------------

std::mutex mutex;
std::atomic<bool> environment_read{false};
// Strips and cluster above the index in kTiles, plus one; 0: nothing is forced.
std::atomic<int64_t> forced{0};

int64_t pack_choice(const Choice& choice) {
  if (choice.kernel == nullptr) return 0;
  return int64_t{choice.wish.cluster} << 48 | int64_t{choice.wish.strips} << 32 |
         (tile_index(choice.kernel) + 1);
}

Choice unpack_choice(int64_t packed) {
  if (packed == 0) return {};
  return {kTiles[(packed & 0xffffffff) - 1].name,
          {static_cast<int32_t>(packed >> 32 & 0xffff), static_cast<int32_t>(packed >> 48)}};
}

// ---- measured ----------------------------------------------------------------------------------------------------------

constexpr const char kBuiltIn[] =
#include "cuda/measured.inc"
    ;

// Shapes farther away than this say little: a factor of four in N and K together.
constexpr double kNear = 2.0;

Element parse_x(const std::string& text) {
  if (text == "half") return Element::kBFloat16;
  return parse_dtype(text);
}

bool parse_row(const char* line, Measured& row) {
  char op[32], x[32], format[32], kernel[64], runner_up[64];
  long long N, K, first, last;
  int length = 0;
  const int found =
      std::sscanf(line, " %31s %31s %31s sm_%d:%d %lldx%lld %lld..%lld %63s %lf %63s %lf %n", op, x,
                  format, &row.capability, &row.sm_count, &N, &K, &first, &last, kernel, &row.us,
                  runner_up, &row.runner_up_us, &length);
  if (found != 13 || line[length] != 0 || N < 1 || K < 1 || first < 1 || last < first) return false;
  const FormatInfo* info = nullptr;
  for (const FormatInfo& known : format_table()) {
    if (std::strcmp(known.name, format) == 0) info = &known;
  }
  if (info == nullptr) return false;
  row.op = parse_op(op);
  row.x = parse_x(x);
  row.format = info->format;
  row.N = N;
  row.K = K;
  row.first = first;
  row.last = last;
  row.choice = parse_choice(kernel);
  row.runner_up = runner_up;
  return true;
}

using Table = std::vector<Measured>;

std::shared_ptr<const Table> parse_table(const std::string& text, const std::string& what) {
  auto table = std::make_shared<Table>();
  std::istringstream lines(text);
  int number = 0;
  for (std::string line; std::getline(lines, line);) {
    ++number;
    if (line.find_first_not_of(" \t\r") == std::string::npos || line[0] == '#') continue;
    Measured row{};
    bool valid = false;
    std::string reason = "is no row of a tuning table";
    try {
      valid = parse_row(line.c_str(), row);
    } catch (const Error& error) {
      reason = error.what();
    }
    LOWBIT_CHECK(valid, what, ": line ", number, ": ", reason, ": '", line, "'");
    table->push_back(std::move(row));
  }
  return table;
}

std::shared_ptr<const Table> default_table() {
  const char* path = std::getenv("LOWBIT_TUNING");
  if (path == nullptr || *path == '\0') return parse_table(kBuiltIn, "measured.inc");
  std::ifstream file(path);
  LOWBIT_CHECK(file.good(), "LOWBIT_TUNING=", path, " cannot be read");
  std::ostringstream text;
  text << file.rdbuf();
  return parse_table(text.str(), concat("LOWBIT_TUNING=", path));
}

std::shared_ptr<const Table> current_table;  // keeps alive what `table` points to
std::atomic<const Table*> table{nullptr};

const Table& measured_table() {
  const Table* found = table.load(std::memory_order_acquire);
  if (found != nullptr) return *found;
  const std::lock_guard<std::mutex> lock(mutex);
  if (current_table == nullptr) current_table = default_table();
  table.store(current_table.get(), std::memory_order_release);
  return *current_table;
}

bool is_half(Element x) { return x == Element::kBFloat16 || x == Element::kFloat16; }

}  // namespace

Choice parse_choice(const std::string& text) {
  const std::string name = text.substr(0, text.find(':'));
  Choice choice;
  if (name.size() < text.size()) {
    const char* const plan = text.c_str() + name.size();
    int length = 0;
    const bool valid =
        std::sscanf(plan, ":%1dx%1d%n", &choice.wish.strips, &choice.wish.cluster, &length) == 2 &&
        plan[length] == 0 && choice.wish.strips >= 1 && choice.wish.cluster >= 1;
    LOWBIT_CHECK(valid && name.compare(0, 7, "hopper_") == 0, "kernel '", text,
                 "': only Hopper's take a plan, such as hopper_stream_m8:2x4");
  }
  std::string known;
  for (const Tile& tile : kTiles) {
    if (name == tile.name) {
      choice.kernel = tile.name;
      return choice;
    }
    if (known.find(tile.name) == std::string::npos)
      known += concat(known.empty() ? "" : ", ", tile.name);
  }
  fail("kernel '", name, "' is not one of the CUDA kernels: ", known);
}

Choice forced_choice() {
  if (!environment_read.load(std::memory_order_acquire)) {
    const char* value = std::getenv("LOWBIT_KERNEL");
    if (value != nullptr && *value != '\0') forced.store(pack_choice(parse_choice(value)));
    environment_read.store(true, std::memory_order_release);
  }
  return unpack_choice(forced.load(std::memory_order_acquire));
}

void force_kernel(const std::string& name) {
  const Choice choice = name.empty() ? Choice{} : parse_choice(name);
  environment_read.store(true, std::memory_order_release);
  forced.store(pack_choice(choice), std::memory_order_release);
}

std::string forced_kernel() {
  const Choice choice = forced_choice();
  if (choice.kernel == nullptr) return "";
  if (choice.wish.strips == 0) return choice.kernel;
  return concat(choice.kernel, ":", choice.wish.strips, "x", choice.wish.cluster);
}

const Measured* measured_for(const Problem& p, const DeviceInfo& device) {
  const Table& rows = measured_table();
  const Measured* best = nullptr;
  double nearest = kNear;
  for (const Measured& row : rows) {
    if (row.op != p.op || row.capability != device.capability || row.format != p.desc.format ||
        p.M < row.first || p.M > row.last || !(row.x == p.x || (is_half(row.x) && is_half(p.x))))
      continue;
    const double distance =
        std::abs(std::log2(static_cast<double>(p.N) / static_cast<double>(row.N))) +
        std::abs(std::log2(static_cast<double>(p.K) / static_cast<double>(row.K)));
    if (distance > nearest || (best != nullptr && distance == nearest)) continue;
    best = &row;
    nearest = distance;
  }
  return best;
}

HopperWish measured_wish(const Measured& row, const Problem& p, const DeviceInfo& device) {
  const bool same = row.N == p.N && row.K == p.K && row.sm_count == device.sm_count;
  return same ? row.choice.wish : HopperWish{};
}

std::string to_string(const Measured& row) {
  return concat(row.us, " us against ", row.runner_up_us, " of ", row.runner_up, " at N=", row.N,
                " K=", row.K, " on sm_", row.capability, ":", row.sm_count);
}

void load_tuning(const std::string& text) {
  std::shared_ptr<const Table> next =
      text.empty() ? default_table() : parse_table(text, "load_tuning");
  const std::lock_guard<std::mutex> lock(mutex);
  table.store(next.get(), std::memory_order_release);
  current_table = std::move(next);
}

}  // namespace lowbit::cuda
