#include "cuda/select.h"

#include <algorithm>
#include <cstring>

#include "cuda/box_plan.h"
#include "cuda/choice.h"
#include "cuda/schedule.h"
#include "cuda/stages.h"
#include "cuda/tuning.h"

namespace lowbit::cuda {
namespace {

// ---- what selection knows of a row -------------------------------------------------------------------------------------

const Tuning* tuning_of(const Tile& tile) {
  for (const Tuning& row : kTuning) {
    if (std::strcmp(row.tile, tile.name) == 0) return &row;
  }
  return nullptr;  // general kernels have none
}

// The plan that is asked for, or that a sweep has measured.
HopperWish wish_for(const KernelRow& row, const Problem& p, const DeviceInfo& device) {
  const auto is_row = [&](const char* kernel) { return std::strcmp(kernel, row.name()) == 0; };
  const Choice forced = forced_choice();
  if (forced.kernel != nullptr) return is_row(forced.kernel) ? forced.wish : HopperWish{};
  const Measured* const measured = measured_for(p, device);
  return measured != nullptr && is_row(measured->choice.kernel)
             ? measured_wish(*measured, p, device)
             : HopperWish{};
}

BoxPlan box_plan(const KernelRow& row, const Problem& p, const CudaTile64& weight,
                 const DeviceInfo& device) {
  const Tuning& tuning = *tuning_of(row.shape());
  return plan_boxes(row.shape(), p, weight, device,
                    {device.sm_count, tuning.min_steps, tuning.most_sharers},
                    wish_for(row, p, device));
}

// Whether a plan says how its work is cut, and not ranges of steps.
bool has_plan(const KernelRow& row) { return row.shape().kernel == Kernel::kHopperStream; }

HopperPlan plan(const KernelRow& row, const Problem& p, const CudaTile64& weight,
                const DeviceInfo& device) {
  return plan_hopper(row.shape(), p.M, weight, device, wish_for(row, p, device));
}

// ---- cutting the work --------------------------------------------------------------------------------------------------

// The rows of a grad tile are columns of dx, and its steps run over N.
Schedule cut(const Problem& p, const Tile& tile, const Tuning& tuning, int64_t slots) {
  const int64_t columns = p.op == Op::kGradInput ? p.K : p.N;
  const int64_t depth = p.op == Op::kGradInput ? p.N : p.K;
  const int64_t tiles_n = div_up(columns, tile.rows), tiles_m = div_up(p.M, tile.tokens);
  LOWBIT_CHECK(tiles_n * tiles_m < (int64_t{1} << 31), "M=", p.M, " N=", p.N, " K=", p.K,
               " makes more tiles than one launch takes");
  LOWBIT_CHECK(tiles_n * tiles_m * div_up(depth, tile.step) < (int64_t{1} << 32), "M=", p.M,
               " N=", p.N, " K=", p.K, " makes more steps than one launch takes");
  const bool whole = (p.flags & kBatchInvariant) != 0 || tiles_n * tiles_m > kMaxShared;
  return make_schedule(
      static_cast<int>(tiles_n), static_cast<int>(tiles_m),
      static_cast<int>(div_up(depth, tile.step)),
      {static_cast<int>(slots), tuning.min_steps, whole ? 1 : tuning.most_sharers});
}

// Steps of the problem, over the steps that all slots could do until the last block is done.
double efficiency_of(const Schedule& s, int64_t slots) {
  const int64_t longest = div_up(s.total, s.blocks);
  return static_cast<double>(s.total) /
         static_cast<double>(longest * div_up(s.blocks, slots) * slots);
}

int64_t piece(int64_t bytes) { return round_up(bytes, 256); }

void cut_ranges(const KernelRow& row, const Problem& p, const CudaTile64& weight,
                const DeviceInfo& device, Config& config) {
  const Tile& tile = row.shape();
  const Residency resident = residency(tile, weight, device.shared_per_block, device.shared_per_sm);
  config.stages = resident.stages;
  config.shared_bytes = resident.shared_bytes;
  const int64_t slots = int64_t{std::max(resident.blocks_per_sm, 1)} * device.sm_count;
  config.schedule = cut(p, tile, *tuning_of(tile), slots);
  config.efficiency = efficiency_of(config.schedule, slots);
  config.shares_tiles = shares_tiles(config.schedule);
  if (config.shares_tiles)
    config.partial_bytes = piece(int64_t{2} * config.schedule.blocks * tile.rows * tile.tokens * 4);
}

void cut_boxes(const KernelRow& row, const Problem& p, const CudaTile64& weight,
               const DeviceInfo& device, Config& config) {
  const BoxPlan chosen = box_plan(row, p, weight, device);
  config.boxes = chosen.cluster;
  config.tokens = chosen.tokens;
  config.stages = chosen.resident.stages;
  config.shared_bytes = chosen.resident.shared_bytes;
  config.schedule = chosen.schedule;
  config.efficiency = efficiency_of(chosen.schedule, chosen.slots);
  config.shares_tiles = shares_tiles(chosen.schedule);
  const int64_t blocks = int64_t{chosen.schedule.blocks} * chosen.cluster.blocks();
  if (config.shares_tiles)
    config.partial_bytes = piece(2 * blocks * row.shape().rows * config.tokens * 4);
}

void cut_hopper(const KernelRow& row, const Problem& p, const CudaTile64& weight,
                const DeviceInfo& device, Config& config) {
  const Tile& tile = row.shape();
  const HopperPlan& chosen = config.hopper = plan(row, p, weight, device);
  config.stages = chosen.stages;
  config.shared_bytes = chosen.shared_bytes;
  const int64_t blocks = hopper_blocks(tile, p.M, weight, chosen);
  LOWBIT_CHECK(blocks < (int64_t{1} << 31), "M=", p.M, " N=", p.N, " K=", p.K,
               " makes more tiles than one launch takes");
  Schedule& s = config.schedule;
  s.tiles_n = static_cast<int32_t>(div_up(weight.strips, chosen.strips));
  s.tiles_m = static_cast<int32_t>(div_up(p.M, tile.tokens));
  s.steps_per_tile = static_cast<int32_t>(weight.tiles);
  s.blocks = static_cast<int32_t>(blocks);
  s.total = int64_t{s.tiles_n} * s.tiles_m * s.steps_per_tile;
  // Tiles of weights, over those that all multiprocessors could read until the last block is done.
  const int64_t longest =
      div_up(blocks, device.sm_count) * chosen.strips * div_up(weight.tiles, chosen.cluster);
  config.efficiency = static_cast<double>(weight.strips * s.tiles_m * weight.tiles) /
                      static_cast<double>(longest * device.sm_count);
}

Config configure(const KernelRow& row, const Problem& p, const CudaTile64& weight,
                 const DeviceInfo& device) {
  Config config{};
  config.row = &row;
  config.efficiency = 1.0;
  if (row.general) return config;
  if (has_plan(row)) {
    cut_hopper(row, p, weight, device, config);
  } else if (has_warpgroups(row.shape().kernel)) {
    cut_boxes(row, p, weight, device, config);
  } else {
    cut_ranges(row, p, weight, device, config);
  }
  const bool gathers = p.desc.has_perm && p.op != Op::kGradInput;
  config.prepares = gathers || !p.x_aligned || orders_bytes(row.shape().kernel);
  const int64_t columns = p.op == Op::kGradInput ? p.N : p.K;
  // Rows that start on a cache line cost nothing and spare a sector each.
  config.prepared_columns = round_up(columns, 128 / element_bytes(p.x));
  if (config.prepares)
    config.prepared_bytes = piece(p.M * config.prepared_columns * element_bytes(p.x));
  if (p.desc.has_perm && p.op == Op::kGradInput)
    config.unordered_bytes = piece(p.M * p.K * element_bytes(p.x));
  const int64_t pieces = config.partial_bytes + config.prepared_bytes + config.unordered_bytes;
  config.workspace_bytes = pieces == 0 ? 0 : kCounterBytes + pieces;
  return config;
}

// ---- choosing ----------------------------------------------------------------------------------------------------------

// Tiles that add along K in one order whatever M is, and the same in every tile of their kernel: with whole tiles, the bits
// of a row then depend on nothing but the row. (Two matrix tiles slice K among their warps alike, the widest does not.)
constexpr const char* kInvariantTiles[] = {"matrix_m32",  "matrix_m64", "a8_int_m64",
                                           "a8_int_m128", "a8_fp8_m64", "a8_decode_m64",
                                           "grad_m64"};

bool refuse_order(const KernelRow& row, const Problem& p, const Why& why) {
  if ((p.flags & kBatchInvariant) == 0 || row.general) return false;
  for (const char* name : kInvariantTiles) {
    if (std::strcmp(name, row.name()) == 0) return false;
  }
  return why("its order of additions is not that of other tiles; batch_invariant is set");
}

// Whether the kernel cannot run the problem on the device.
bool refuses(const KernelRow& row, const Problem& p, const CudaTile64& weight,
             const DeviceInfo& device, const Why& why) {
  if (device.capability < row.capability || (row.hopper && device.capability != row.capability))
    return why("needs sm_", row.capability, ", the device is sm_", device.capability);
  if (row.hopper && !device.hopper) return why("this build has no code for 90a");
  if (row.refuse(p, weight, why) || refuse_order(row, p, why)) return true;
  if (has_plan(row)) {
    const int32_t cluster = wish_for(row, p, device).cluster;
    if (cluster > weight.tiles)
      return why("clusters of ", cluster, " blocks have no share each in the ", weight.tiles,
                 " tiles of K=", p.K);
    if (plan(row, p, weight, device).strips > 0) return false;
  } else if (has_warpgroups(row.shape().kernel)) {
    if (box_plan(row, p, weight, device).cluster.rows > 0) return false;
    const HopperWish wish = wish_for(row, p, device);
    if (wish.strips > 2 || wish.cluster > 2)
      return why("there are no clusters of ", wish.strips, " x ", wish.cluster, " blocks");
  } else if (row.general ||
             residency(row.shape(), weight, device.shared_per_block, device.shared_per_sm)
                     .blocks_per_sm > 0) {
    return false;
  }
  return why("a block's shared memory, ", device.shared_per_block / 1024,
             " KB on the device, does not hold its tiles");
}

// Whether it leaves the problem to a faster one.
bool defers(const KernelRow& row, const Problem& p, const Why& why) {
  const Tuning* tuning = tuning_of(row.shape());
  if (tuning == nullptr) return false;
  if (p.M > tuning->most_rows)
    return why("M=", p.M, " exceeds ", tuning->most_rows, " (", tuning->because, ")");
  return row.hopper && why(kUnmeasured);
}

// Null: the op has no kernel of this name.
const KernelRow* find_row(Op op, const char* name) {
  for (const KernelRow& row : kernel_table()) {
    if (row.op == op && std::strcmp(row.name(), name) == 0) return &row;
  }
  return nullptr;
}

// Null: nothing is forced, or no row of this op.
const KernelRow* forced_row(Op op) {
  const char* name = forced_choice().kernel;
  return name == nullptr ? nullptr : find_row(op, name);
}

// The row that a sweep has found fastest, if it takes the problem.
const KernelRow* pick_measured(const Problem& p, const CudaTile64& weight,
                               const DeviceInfo& device) {
  const Measured* const measured = measured_for(p, device);
  if (measured == nullptr) return nullptr;
  const KernelRow* const row = find_row(p.op, measured->choice.kernel);
  return row == nullptr || refuses(*row, p, weight, device, Why()) ? nullptr : row;
}

// The first row that neither refuses nor defers. Those that deferred to wider tiles which then refused stand in before
// the general kernel does. Deferring is asked first: a refusal may cost a plan of the work, on every call.
const KernelRow& pick(const Problem& p, const CudaTile64& weight, const DeviceInfo& device) {
  if (const KernelRow* row = forced_row(p.op)) {
    std::string reason;
    LOWBIT_CHECK(!refuses(*row, p, weight, device, Why(&reason)), "kernel ", row->name(),
                 " is forced and cannot run M=", p.M, " N=", p.N, " K=", p.K, " ",
                 to_string(p.desc), ": ", reason);
    return *row;
  }
  if (const KernelRow* row = pick_measured(p, weight, device)) return *row;
  const std::vector<KernelRow>& rows = kernel_table();
  const KernelRow* general = nullptr;
  for (const KernelRow& row : rows) {
    if (row.op != p.op) continue;
    if (row.general) {
      general = &row;
    } else if (!defers(row, p, Why()) && !refuses(row, p, weight, device, Why())) {
      return row;
    }
  }
  for (auto row = rows.rbegin(); row != rows.rend(); ++row) {
    if (row->op == p.op && !row->general && !refuses(*row, p, weight, device, Why())) return *row;
  }
  return *general;  // each op's last row
}

}  // namespace

Config select(const Problem& p, const CudaTile64& weight, const DeviceInfo& device) {
  LOWBIT_CHECK(p.M >= 1 && p.M < (int64_t{1} << 30), "M=", p.M, " is outside 1..2^30");
  return configure(pick(p, weight, device), p, weight, device);
}

std::vector<Verdict> explain(const Problem& p, const DeviceInfo& device) {
  const CudaTile64 weight = cuda_tile64(p.N, p.K, p.desc);
  const KernelRow* const forced = forced_row(p.op);
  const KernelRow* chosen = forced == nullptr ? &pick(p, weight, device) : nullptr;
  const KernelRow* measured = forced == nullptr ? pick_measured(p, weight, device) : nullptr;
  std::vector<Verdict> verdicts;
  for (const KernelRow& row : kernel_table()) {
    if (row.op != p.op) continue;
    std::string reason;
    const Why why(&reason);
    if (!refuses(row, p, weight, device, why)) {
      if (forced != nullptr && forced != &row) {
        why("kernel ", forced->name(), " is forced");
      } else if (chosen != nullptr && chosen == measured) {
        if (chosen != &row)
          why("slower than the chosen one: ", to_string(*measured_for(p, device)));
      } else if (chosen != nullptr && chosen != &row && !defers(row, p, why)) {
        why("slower than the chosen one");
      }
    }
    verdicts.push_back({concat("cuda_", row.name(), "_sm_", row.capability), std::move(reason)});
  }
  return verdicts;
}

namespace {

int64_t workspace_on(Op op, int64_t M, int64_t N, int64_t K, const Desc& desc,
                     const CudaTile64& weight, const DeviceInfo& device) {
  if (M == 0) return 0;
  Problem p{op, M, N, K, desc, Element::kBFloat16, false, 0, false};
  if (op == Op::kGemm) return select(p, weight, device).workspace_bytes;
  int64_t most = 0;
  for (Element x : {Element::kInt8, Element::kFp8E4m3}) {
    for (bool grouped : {false, true}) {
      p.x = x;
      p.grouped_x = grouped;
      most = std::max(most, select(p, weight, device).workspace_bytes);
    }
  }
  return most;
}

}  // namespace

int64_t workspace_size(Op op, int64_t M, int64_t N, int64_t K, const Desc& desc,
                       const std::string& device) {
  const CudaTile64 weight = cuda_tile64(N, K, desc);
  int64_t bytes = 0;
  const bool one = device.find("sm_") != std::string::npos;
  if (!device.empty()) bytes = workspace_on(op, M, N, K, desc, weight, device_model(device));
  if (!one) {
    for (DeviceInfo known :
         known_devices()) {  // and every smaller one: partitions, models with fewer units enabled
      for (; known.sm_count >= 1; --known.sm_count)
        bytes = std::max(bytes, workspace_on(op, M, N, K, desc, weight, known));
    }
  }
  return bytes == 0 ? 0 : bytes + kWorkspaceSlack;
}

std::string to_string(const Config& c) {
  const Tile& t = c.row->shape();
  if (c.row->general) return concat(t.name, ": one warp per output");
  const Schedule& s = c.schedule;
  std::ostringstream percent;
  percent.precision(0);
  percent << std::fixed << 100 * c.efficiency;
  if (has_plan(*c.row)) {
    const HopperPlan& plan = c.hopper;
    return concat(t.name, ": tiles of ", plan.strips * t.rows, " x ", t.tokens, ", steps of ",
                  t.step, ", ", t.warps(), " warps and one that copies, clusters of ", plan.cluster,
                  ", ", c.stages, " stages, ", c.shared_bytes, " bytes shared; ", s.tiles_n, " x ",
                  s.tiles_m, " tiles of ", s.steps_per_tile, " steps on ", s.blocks, " blocks, ",
                  plan.in_flight / 1024, " KB in flight per multiprocessor, ", percent.str(),
                  "% busy; workspace ", c.workspace_bytes, " bytes",
                  c.prepares ? ", x copied" : "");
  }
  // Where blocks share what they copy, a tile of the schedule is that of a cluster.
  const bool boxes = has_warpgroups(t.kernel);
  const std::string cluster =
      c.boxes.blocks() == 1 ? "" : concat(", clusters of ", c.boxes.rows, " x ", c.boxes.tokens);
  return concat(t.name, ": tiles of ", t.rows, " x ", boxes ? c.tokens : t.tokens, ", steps of ",
                t.step, ", ", t.warps(), " warps", cluster, ", ", c.stages, " stages, ",
                c.shared_bytes, " bytes shared; ", s.tiles_n, " x ", s.tiles_m, " tiles of ",
                s.steps_per_tile, " steps on ", s.blocks, cluster.empty() ? " blocks" : " clusters",
                c.shares_tiles ? ", shared" : "", ", ", percent.str(), "% busy; workspace ",
                c.workspace_bytes, " bytes", c.prepares ? ", x copied" : "");
}

}  // namespace lowbit::cuda
