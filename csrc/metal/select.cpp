#include "metal/select.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "formats/format_table.h"

namespace lowbit::metal {
namespace {

// ---- what each kernel takes --------------------------------------------------------------------------------------------

// A chunk of 8 k takes one scale per row. Groups are multiples of 8, but for those of blocks that run across rows.
bool refuse_short_groups(const Problem& p, const MetalTile4& weight, const Why& why) {
  if (weight.groups == 1 || weight.group_size % 8 == 0) return false;
  return why("blocks of ", p.desc.group_size, " across rows of K=", p.K, " have no more than ",
             weight.group_size, " k in common, which is not a multiple of 8");
}

bool refuse_nothing(const KernelRow&, const Problem&, const MetalTile4&, const Why&) {
  return false;
}
bool defer_never(const KernelRow&, const Problem&, const Why&) { return false; }

// The perm sorts columns of W by group; scales per 128 columns of x do not survive it.
bool refuse_grouped_perm(const Problem& p, const Why& why) {
  if (!p.grouped_x || !p.desc.has_perm) return false;
  return why("activation scales per 128 of K do not go with a perm");
}

bool refuse_stream(const KernelRow&, const Problem& p, const MetalTile4& weight, const Why& why) {
  return refuse_grouped_perm(p, why) || refuse_short_groups(p, weight, why);
}

// The last of them also makes several passes, where every row must be summed as if it were alone.
bool defer_stream(const KernelRow& row, const Problem& p, const Why& why) {
  if (p.M <= row.tokens) return false;
  if (row.tokens == 8 && (p.flags & kBatchInvariant) != 0) return false;
  return why("M=", p.M, " exceeds its ", row.tokens, row.tokens == 1 ? " row" : " rows");
}

bool refuse_grad(const KernelRow&, const Problem& p, const MetalTile4& weight, const Why& why) {
  return refuse_short_groups(p, weight, why);
}

bool refuse_matrix(const KernelRow&, const Problem& p, const MetalTile4& weight, const Why& why) {
  if (refuse_short_groups(p, weight, why)) return true;
  if ((p.flags & kBatchInvariant) == 0) return false;
  return why("batch_invariant is set, and few rows are summed in another order");
}

bool defer_matrix(const KernelRow& row, const Problem& p, const Why& why) {
  if (row.tokens >= 64 || p.M <= row.tokens) return false;
  return why("M=", p.M, " exceeds its ", row.tokens, " rows");
}

bool refuse_exact(const KernelRow& row, const Problem& p, const MetalTile4& weight,
                  const Why& why) {
  const FormatInfo& info = format_info(p.desc.format);
  if (!info.exact16) return why(info.name, "'s levels are not exact in half");
  if (p.desc.zero_kind == ZeroKind::kFloat || p.desc.zero_kind == ZeroKind::kOffset)
    return why("weights with zeros=", name_of(p.desc.zero_kind), " are not exact in half");
  if (weight.groups > 1 && weight.group_size % 32 != 0)
    return why("group_size=", weight.group_size, " is not a multiple of 32");
  return refuse_grouped_perm(p, why) || refuse_matrix(row, p, weight, why);
}

// ---- the table ---------------------------------------------------------------------------------------------------------

constexpr const char* kStreamTakes =
    "few rows of any x, any group: weights read once, decoded in registers";
constexpr const char* kMatrixTakes =
    "bf16, fp16 or fp32 x, any group: 8x8 matrices, weights decoded in threadgroup memory";
constexpr const char* kExactTakes =
    "8-bit x times codes that half holds exactly, groups in multiples of 32: exact sums, then "
    "scales";

std::vector<KernelRow> make_table() {
  std::vector<KernelRow> rows;
  static const char* const names[] = {"stream_m1", "stream_m2", "stream_m4", "stream_m8"};
  for (Op op : {Op::kGemm, Op::kGemmA8}) {
    for (int i = 0; i < 4; ++i)
      rows.push_back({op, Kernel::kStream, names[i], 1 << i, false, kStreamTakes, refuse_stream,
                      defer_stream});
  }
  rows.push_back({Op::kGemm, Kernel::kMatrix, "matrix_m32", 32, false, kMatrixTakes, refuse_matrix,
                  defer_matrix});
  rows.push_back({Op::kGemm, Kernel::kMatrix, "matrix_m64", 64, false, kMatrixTakes, refuse_matrix,
                  defer_matrix});
  rows.push_back({Op::kGemmA8, Kernel::kMatrixExact, "matrix_exact_m64", 64, false, kExactTakes,
                  refuse_exact, defer_never});
  rows.push_back({Op::kGradInput, Kernel::kGrad, "grad_m64", 64, false,
                  "bf16, fp16 or fp32 dy, any group: 8x8 matrices", refuse_grad, defer_never});
  for (Op op : {Op::kGemm, Op::kGemmA8})
    rows.push_back(
        {op, Kernel::kGeneral, "general", 1, true, "everything", refuse_nothing, defer_never});
  rows.push_back({Op::kGradInput, Kernel::kGeneralGrad, "general", 1, true, "everything",
                  refuse_nothing, defer_never});
  return rows;
}

// ---- forced kernels ----------------------------------------------------------------------------------------------------

const char* find_name(const std::string& name) {
  for (const KernelRow& row : kernel_table()) {
    if (name == row.name) return row.name;
  }
  return nullptr;
}

// Null: not forced. The pointer is to a name in the table.
std::atomic<const char*> forced{nullptr};

const char* forced_for(Op op) {
  static const bool asked = [] {
    const char* value = std::getenv("LOWBIT_KERNEL");
    if (value == nullptr || *value == '\0') return true;
    const char* found = find_name(value);
    LOWBIT_CHECK(found != nullptr, "LOWBIT_KERNEL=", value, " is not one of the Metal kernels");
    forced.store(found);
    return true;
  }();
  (void)asked;
  const char* name = forced.load(std::memory_order_acquire);
  if (name == nullptr) return nullptr;
  for (const KernelRow& row : kernel_table()) {
    if (row.op == op && std::strcmp(row.name, name) == 0) return name;
  }
  return nullptr;
}

const KernelRow& pick(const Problem& p, const MetalTile4& weight) {
  const char* name = forced_for(p.op);
  for (const KernelRow& row : kernel_table()) {
    if (row.op != p.op || (name != nullptr && std::strcmp(row.name, name) != 0)) continue;
    if (name == nullptr) {
      if (!row.refuse(row, p, weight, Why()) && !row.defer(row, p, Why())) return row;
      continue;
    }
    std::string reason;
    LOWBIT_CHECK(!row.refuse(row, p, weight, Why(&reason)), "kernel ", name,
                 " is forced and cannot run M=", p.M, " N=", p.N, " K=", p.K, " ",
                 to_string(p.desc), ": ", reason);
    return row;
  }
  fail("no kernel for ", name_of(p.op));  // the last row of an op takes everything
}

// ---- how the work is cut -----------------------------------------------------------------------------------------------

// A core keeps about this many SIMD-groups of a kernel that waits for memory busy. Unmeasured.
constexpr int64_t kSimdGroupsPerCore = 32;
constexpr int kStreamGroups = 4;  // SIMD-groups of a threadgroup (shaders/stream.h)

// More SIMD-groups per strip while there are too few for the cores, as long as each lane gets two chunks. Depends on nothing
// but the weight's shape and the device: a row's bits must not depend on M.
int split_of(const MetalTile4& weight, const DeviceInfo& device) {
  int split = 1;
  while (split < kStreamGroups && weight.strips / 2 * split < kSimdGroupsPerCore * device.cores &&
         weight.chunks >= 128 * split)
    split *= 2;
  return split;
}

uint32_t pieces(int64_t whole, int64_t piece) {
  return static_cast<uint32_t>((whole + piece - 1) / piece);
}

}  // namespace

const std::vector<KernelRow>& kernel_table() {
  static const std::vector<KernelRow> table = make_table();
  return table;
}

bool force_kernel(const std::string& name) {
  const char* found = find_name(name);
  forced.store(found, std::memory_order_release);
  return found != nullptr;
}

Config select(const Problem& p, const MetalTile4& weight, const DeviceInfo& device) {
  const KernelRow& row = pick(p, weight);
  Config c{&row, 1, false, {1, pieces(p.M, row.tokens), 1}, 128};
  c.prepares = !row.general && p.op != Op::kGradInput && (p.desc.has_perm || p.op == Op::kGemmA8);
  switch (row.kernel) {
    case Kernel::kStream:
      c.split = split_of(weight, device);
      c.groups[0] = pieces(weight.strips, row.strips() * (kStreamGroups / c.split));
      break;
    case Kernel::kMatrix:
    case Kernel::kMatrixExact:
      c.groups[0] = pieces(p.N, 64);
      break;
    case Kernel::kGrad:
      c.groups[0] = pieces(p.K, 64);
      break;
    case Kernel::kGeneral:
      c.groups[0] = static_cast<uint32_t>(weight.strips);
      c.threads = 32;
      break;
    case Kernel::kGeneralGrad:
      c.groups[0] = static_cast<uint32_t>(weight.chunks);
      c.threads = 32;
  }
  return c;
}

std::string to_string(const Config& c) {
  return concat(c.row->name, ": ", c.groups[0], " x ", c.groups[1], " threadgroups of ", c.threads,
                " threads",
                c.row->kernel == Kernel::kStream
                    ? concat(", ", c.row->strips(), " strips per SIMD-group, K in ", c.split)
                    : "",
                c.prepares ? ", x copied" : "");
}

std::vector<KernelInfo> kernels() {
  std::vector<KernelInfo> list;
  for (const KernelRow& row : kernel_table())
    list.push_back({"metal", name_of(row.op), row.name, "apple7", row.takes, row.general});
  return list;
}

std::vector<Verdict> explain(const Problem& p, const DeviceInfo&) {
  const MetalTile4 weight = metal_tile4(p.N, p.K, p.desc);
  const char* name = forced_for(p.op);
  bool found = false;
  std::vector<Verdict> verdicts;
  for (const KernelRow& row : kernel_table()) {
    if (row.op != p.op) continue;
    std::string reason;
    const Why why(&reason);
    if (!row.refuse(row, p, weight, why)) {
      if (name != nullptr) {
        if (std::strcmp(row.name, name) != 0) why("kernel ", name, " is forced");
      } else if (!row.defer(row, p, why)) {
        if (found) why("slower than the chosen one");
        found = true;
      }
    }
    verdicts.push_back({concat("metal_", row.name, "_apple7"), std::move(reason)});
  }
  return verdicts;
}

}  // namespace lowbit::metal
