#include "cpu/kernel_table.h"

#include <algorithm>

#include "cpu/amx.h"
#include "cpu/expanded.h"
#include "cpu/isa.h"
#include "cpu/kernels/general.h"
#include "cpu/plane_shape.h"
#include "formats/format_table.h"

namespace lowbit {
namespace {

// Vector kernels walk blocks of 32 k, or halves of them, which no group may straddle.
bool refuse_straddled(const Problem& p, const CpuTile16& tile, int64_t step, const Why& why) {
  const int64_t size = tile.shape.group_size;
  if (tile.kb == 32 && (tile.shape.groups == 1 || size % step == 0)) return false;
  if (p.desc.scaling == Scaling::kFlat)
    return why("blocks of ", p.desc.group_size, " across rows of K=", p.K, " have no more than ",
               size, " k in common, which is not a multiple of ", step);
  return why("group_size=", size, " is not a multiple of ", step);
}
bool refuse_short_groups(const Problem& p, const CpuTile16& tile, const Why& why) {
  return refuse_straddled(p, tile, 16, why);
}
bool refuse_short_blocks(const Problem& p, const CpuTile16& tile, const Why& why) {
  return refuse_straddled(p, tile, 32, why);
}

bool refuse_panel(const Problem& p, const CpuTile16& tile, const IsaKernels&, const Why& why) {
  return refuse_short_groups(p, tile, why);
}

// Tensor and tile instructions multiply bf16: q - zero, and the values of most code books, are exact in it.
bool refuse_inexact_codes(const Problem& p, const Why& why) {
  const FormatInfo& format = format_info(p.desc.format);
  if (!format.exact16) return why(format.name, "'s levels are not exact in bf16");
  return (p.desc.zero_kind == ZeroKind::kFloat || p.desc.zero_kind == ZeroKind::kOffset) &&
         why("weights with zeros=", name_of(p.desc.zero_kind), " are not exact in bf16");
}

bool refuse_panel_bf16(const Problem& p, const CpuTile16& tile, const IsaKernels& isa,
                       const Why& why) {
  if (isa.gemm_panel_bf16 == nullptr) return why("not built for ", isa.isa);
  if (p.x != Element::kBFloat16) return why("activations are not bf16");
  return refuse_short_blocks(p, tile, why);
}

// ---- tiles: the numbers are counted (docs/amx.md), not yet measured on hardware -----------------------------------

// Fewer rows are faster from registers: there a panel of 32 x 256 weights takes 256 (2 + M) cycles as floats and about
// 200 + 128 M as int8 digits, in tiles at most 1056 for up to 16 rows.
int64_t least_tile_rows(const Problem& p, const IsaKernels& isa) {
  const FormatInfo& format = format_info(p.desc.format);
  const bool digits =
      isa.planes.gemm != nullptr && format.is_integer && format.bits <= isa.planes.bits;
  return digits || tile_planes(p.x) == 3 ? 8 : 4;
}

// From this M on, rounding each weight once to bf16 is cheaper than scaling the sums of every group: decoding to scaled
// weights costs 730 cycles more a panel, folding 1024 / group for every row.
constexpr int64_t kNever = int64_t{1} << 62;
int64_t weight_tile_rows(const CpuTile16& tile) {
  const int64_t group = tile.shape.group_size;
  return group >= 1024 ? kNever : group * 3 / 4;
}

bool refuse_few_rows(const Problem& p, int64_t least, const Why& why) {
  return p.M < least && (p.flags & kBatchInvariant) == 0 &&
         why("M=", p.M, ": tiles are faster from M=", least);
}

bool refuse_tiles_codes(const Problem& p, const CpuTile16& tile, const IsaKernels& isa,
                        const Why& why) {
  if (isa.amx == nullptr) return why("not built for ", isa.isa);
  if (refuse_inexact_codes(p, why) || refuse_short_blocks(p, tile, why)) return true;
  const int64_t rounded = p.x == Element::kBFloat16 ? weight_tile_rows(tile) : kNever;
  if ((p.flags & kBatchInvariant) != 0 && rounded != kNever)
    return why("tiles_bf16 serves large M and batch_invariant is set");
  if (p.M >= rounded) return why("M=", p.M, ": scaled weights are faster from M=", rounded);
  return refuse_few_rows(p, least_tile_rows(p, isa), why);
}

bool refuse_tiles_bf16(const Problem& p, const CpuTile16& tile, const IsaKernels& isa,
                       const Why& why) {
  if (isa.amx == nullptr) return why("not built for ", isa.isa);
  if (p.x != Element::kBFloat16)
    return why("activations are not bf16, so weights must not be rounded to it");
  return refuse_short_blocks(p, tile, why) || refuse_few_rows(p, least_tile_rows(p, isa), why);
}

// int4 group 128: 0.92 of panel_bf16's time at M = 16, 1.12 at M = 32; int8 0.79 at M = 16 (Zen 4, 4096 x 4096).
constexpr int64_t kPlaneRowsBesideBf16 = 16;

bool refuse_planes(const Problem& p, const CpuTile16& tile, const IsaKernels& isa, const Why& why) {
  const FormatInfo& format = format_info(p.desc.format);
  const PlaneKernels& planes = isa.planes;
  if (planes.gemm == nullptr) return why("not built for ", isa.isa);
  if (!format.is_integer) return why(format.name, " weights are not integers");
  if (format.bits > planes.bits)
    return why(isa.isa, " has fast dot products for codes of ", planes.bits, " bits, not of ",
               format.bits);
  if (refuse_short_blocks(p, tile, why)) return true;
  const bool two = plane_count(p.x) == 2;
  if ((p.flags & kBatchInvariant) != 0) {
    return !(two && planes.every_m) &&
           why("batch_invariant is set, and other kernels are faster at large M");
  }
  int64_t rows = two ? planes.rows_of_two : planes.rows_of_four;
  if (!refuse_panel_bf16(p, tile, isa, Why())) rows = std::min(rows, kPlaneRowsBesideBf16);
  return p.M > rows && why("M=", p.M, ": multiplying floats is faster from M=", rows + 1);
}

// Bytes take twice the instructions of narrower codes to look up, for every four rows: fp8 0.93 of panel_bf16's time at M = 16,
// 1.17 at M = 32 (Zen 4). Zeros take some more: 0.92 at M = 32, 1.05 at 128. All else is 0.82 .. 0.91 at M = 32 and 0.92 .. 1.01 at
// M = 128. Offsets too, (q - r) * s + rest as in zeros-inl.h, were 0.82 .. 0.86 of planes_i8's time at M = 4 and 16, but where q = r an
// infinite x then gives no infinity.
constexpr int64_t kStreamByteRows = 16, kStreamZeroRows = 64;

bool refuse_stream_bf16(const Problem& p, const CpuTile16& tile, const IsaKernels& isa,
                        const Why& why) {
  const FormatInfo& format = format_info(p.desc.format);
  const bool any_m = (p.flags & kBatchInvariant) != 0;
  if (isa.gemm_stream_bf16 == nullptr) return why("not built for ", isa.isa);
  if (p.x != Element::kBFloat16) return why("activations are not bf16");
  if (p.desc.zero_kind != ZeroKind::kNone &&
      !(p.desc.zero_kind == ZeroKind::kInt && format.bits == 4))
    return why(format.name, " weights with zeros=", name_of(p.desc.zero_kind), " have no table");
  if (format.bits == 8 && format.is_integer)
    return why("digits of x times ", format.name, " are faster");
  const int64_t most = format.bits == 8                     ? kStreamByteRows
                       : p.desc.zero_kind == ZeroKind::kInt ? kStreamZeroRows
                                                            : kNever;
  if (most != kNever && any_m)
    return why("batch_invariant is set, and other kernels are faster at large M");
  if (p.M > most) return why("M=", p.M, ": decoding to a panel is faster from M=", most + 1);
  // By digits one row of int2 takes 0.96 of the time and one of int3 0.90, two rows 1.07 and 1.00 (Zen 4).
  if (format.bits <= 3 && p.M == 1 && !any_m && !refuse_planes(p, tile, isa, Why()))
    return why("M=1: digits of x times ", format.name, " are faster");
  return refuse_short_blocks(p, tile, why);
}

bool refuse_stream(const Problem& p, const CpuTile16& tile, const IsaKernels& isa, const Why& why) {
  if (isa.gemm_stream == nullptr) return why("not built for ", isa.isa);
  if ((p.flags & kBatchInvariant) != 0)
    return why("its order of additions depends on M; batch_invariant is set");
  if (p.M > isa.stream_rows)
    return why("M=", p.M, " exceeds its ", isa.stream_rows, " rows, two passes over a strip");
  return refuse_short_groups(p, tile, why);
}

bool refuse_integer_dot(const Problem& p, const Why& why) {
  if (p.x != Element::kInt8) return why("activations are not int8");
  if (p.grouped_x) return why("activation scales are per group of K, not per token");
  const FormatInfo& info = format_info(p.desc.format);
  return !info.is_integer && why(info.name, " weights are not integers");
}

bool refuse_dot(const Problem& p, const CpuTile16& tile, const IsaKernels&, const Why& why) {
  return refuse_integer_dot(p, why) || refuse_short_groups(p, tile, why);
}

// dot_i8 reads a weight again for every eight rows, and needs no tiles of x.
bool refuse_tiles_i8(const Problem& p, const CpuTile16& tile, const IsaKernels& isa,
                     const Why& why) {
  if (isa.amx == nullptr) return why("not built for ", isa.isa);
  if (refuse_integer_dot(p, why) || refuse_short_blocks(p, tile, why)) return true;
  const int64_t least = tile.shape.group_size < 64 ? 16 : 8;
  return p.M < least && why("M=", p.M, ": tiles are faster from M=", least);
}

// Integer problems stay in integers, also on the general kernel: their sums are exact.
bool refuse_general_dot(const Problem& p, const CpuTile16&, const IsaKernels&, const Why& why) {
  return refuse_integer_dot(p, why);
}

bool refuse_integers(const Problem& p, const Why& why) {
  return p.op == Op::kGemmA8 && !refuse_integer_dot(p, Why()) &&
         why("int8 activations and integer weights are summed in int32");
}

bool refuse_a8_stream(const Problem& p, const CpuTile16& tile, const IsaKernels& isa,
                      const Why& why) {
  return refuse_integers(p, why) || refuse_stream(p, tile, isa, why);
}
bool refuse_a8_panel(const Problem& p, const CpuTile16& tile, const IsaKernels& isa,
                     const Why& why) {
  return refuse_integers(p, why) || refuse_panel(p, tile, isa, why);
}

bool refuse_a8_tiles(const Problem& p, const CpuTile16& tile, const IsaKernels& isa,
                     const Why& why) {
  return refuse_integers(p, why) || refuse_tiles_codes(p, tile, isa, why);
}

bool refuse_nothing(const Problem&, const CpuTile16&, const IsaKernels&, const Why&) {
  return false;
}

void run_stream(const IsaKernels& isa, const GemmJob& job, int64_t begin, int64_t end) {
  run_on_floats(isa, job, begin, end, isa.gemm_stream);
}
void run_planes(const IsaKernels& isa, const GemmJob& job, int64_t begin, int64_t end) {
  run_on_floats(isa, job, begin, end, isa.planes.gemm);
}
void run_stream_bf16(const IsaKernels& isa, const GemmJob& job, int64_t begin, int64_t end) {
  run_on_floats(isa, job, begin, end, isa.gemm_stream_bf16);
}
void run_panel(const IsaKernels& isa, const GemmJob& job, int64_t begin, int64_t end) {
  run_on_floats(isa, job, begin, end, isa.gemm_panel);
}
void run_panel_bf16(const IsaKernels& isa, const GemmJob& job, int64_t begin, int64_t end) {
  run_on_floats(isa, job, begin, end, isa.gemm_panel_bf16);
}
void run_tiles_codes(const IsaKernels& isa, const GemmJob& job, int64_t begin, int64_t end) {
  run_on_floats(isa, job, begin, end, isa.amx->gemm_codes);
}
void run_tiles_bf16(const IsaKernels& isa, const GemmJob& job, int64_t begin, int64_t end) {
  run_on_floats(isa, job, begin, end, isa.amx->gemm_weights);
}
void run_tiles_i8(const IsaKernels& isa, const GemmJob& job, int64_t begin, int64_t end) {
  run_on_floats(isa, job, begin, end, isa.amx->gemm_i8);
}
void run_dot(const IsaKernels& isa, const GemmJob& job, int64_t begin, int64_t end) {
  run_on_floats(isa, job, begin, end, isa.gemm_dot);
}
void run_general_f32(const IsaKernels&, const GemmJob& job, int64_t begin, int64_t end) {
  gemm_general_f32(job, begin, end);
}
void run_general_i8(const IsaKernels&, const GemmJob& job, int64_t begin, int64_t end) {
  gemm_general_i8(job, begin, end);
}
void run_grad(const IsaKernels& isa, const GradJob& job, int64_t begin, int64_t end) {
  isa.grad_input(job, begin, end);
}
void run_grad_general(const IsaKernels&, const GradJob& job, int64_t begin, int64_t end) {
  grad_input_general(job, begin, end);
}

const IsaKernels& parse_device(const std::string& device) {
  if (device == "cpu") return kernels();
  const IsaKernels* isa = device.rfind("cpu:", 0) == 0 ? kernels_of(device.substr(4)) : nullptr;
  LOWBIT_CHECK(isa != nullptr, "device='", device,
               "' has no kernels in this build; expected cpu or cpu:<isa> with one of the compiled "
               "instruction sets");
  return *isa;
}

}  // namespace

const std::vector<KernelRow>& kernel_table() {
  constexpr bool kGeneral = true, kFast = false;
  static const std::vector<KernelRow> table = {
      {Op::kGemm, "tiles_codes", kFast,
       "codes exact in bf16, groups in multiples of 32, x in bf16 or split into planes of it: AMX, "
       "scales applied to sums",
       XForm::kTiles, refuse_tiles_codes, run_tiles_codes, nullptr},
      {Op::kGemm, "tiles_bf16", kFast,
       "bf16 x, groups in multiples of 32, more rows: AMX, weights rounded once to bf16",
       XForm::kTiles, refuse_tiles_bf16, run_tiles_bf16, nullptr},
      {Op::kGemm, "stream_bf16", kFast,
       "bf16 x, codes of up to six bits without zeros, int4 with integer zeros, few rows of fp8, "
       "groups in multiples of 32: looked up as bf16 in registers, nf4 and bnb_fp4 rounded once",
       XForm::kBFloats, refuse_stream_bf16, run_stream_bf16, nullptr},
      {Op::kGemm, "planes_i8", kFast,
       "integer weights, groups in multiples of 32: x as int8 digits, exactly; int32 dot products",
       XForm::kPlanes, refuse_planes, run_planes, nullptr},
      {Op::kGemm, "stream_f32", kFast,
       "few rows of x, groups in multiples of 16: weights decoded in registers, read once",
       XForm::kFloats, refuse_stream, run_stream, nullptr},
      {Op::kGemm, "panel_bf16", kFast, "bf16 x, groups in multiples of 32: bf16 dot products",
       XForm::kBFloats, refuse_panel_bf16, run_panel_bf16, nullptr},
      {Op::kGemm, "panel_f32", kFast,
       "any M, groups in multiples of 16: weights decoded to L1 once per 128 rows", XForm::kFloats,
       refuse_panel, run_panel, nullptr},
      {Op::kGemm, "general_f32", kGeneral, "everything", XForm::kFloats, refuse_nothing,
       run_general_f32, nullptr},
      {Op::kGemmA8, "tiles_i8", kFast,
       "int8 per token x integer weights, groups in multiples of 32, more rows: AMX, int32 sums",
       XForm::kCodeTiles, refuse_tiles_i8, run_tiles_i8, nullptr},
      {Op::kGemmA8, "dot_i8", kFast,
       "int8 per token x integer weights, groups in multiples of 16: int32 dot products",
       XForm::kCodes, refuse_dot, run_dot, nullptr},
      {Op::kGemmA8, "tiles_codes", kFast, "as gemm, on dequantized activations", XForm::kTiles,
       refuse_a8_tiles, run_tiles_codes, nullptr},
      {Op::kGemmA8, "stream_f32", kFast, "as gemm, on dequantized activations", XForm::kFloats,
       refuse_a8_stream, run_stream, nullptr},
      {Op::kGemmA8, "panel_f32", kFast, "as gemm, on dequantized activations", XForm::kFloats,
       refuse_a8_panel, run_panel, nullptr},
      {Op::kGemmA8, "general_i8", kGeneral, "int8 per token x integer weights, any group",
       XForm::kCodes, refuse_general_dot, run_general_i8, nullptr},
      {Op::kGemmA8, "general_f32", kGeneral, "everything", XForm::kFloats, refuse_nothing,
       run_general_f32, nullptr},
      {Op::kGradInput, "grad_panel", kFast, "any M, groups in multiples of 16", XForm::kFloats,
       refuse_panel, nullptr, run_grad},
      {Op::kGradInput, "grad_general", kGeneral, "everything", XForm::kFloats, refuse_nothing,
       nullptr, run_grad_general},
  };
  return table;
}

// int8 and fp8 are multiplied by their scale first, in fp32.
int tile_planes(Element x) { return x == Element::kBFloat16 ? 1 : x == Element::kFloat16 ? 2 : 3; }

// Whether an ISA has the function a row runs; a row that is absent everywhere still shows in explain().
bool is_built(const KernelRow& row, const IsaKernels& isa) {
  if (row.gemm == run_stream) return isa.gemm_stream != nullptr;
  if (row.gemm == run_planes) return isa.planes.gemm != nullptr;
  if (row.gemm == run_stream_bf16) return isa.gemm_stream_bf16 != nullptr;
  if (row.gemm == run_panel_bf16) return isa.gemm_panel_bf16 != nullptr;
  if (reads_tiles(row)) return isa.amx != nullptr;
  return !row.general || std::string(isa.isa) == "portable";  // general kernels are compiled once
}

const KernelRow& select_kernel(const Problem& problem, const CpuTile16& tile,
                               const IsaKernels& isa) {
  const KernelRow* last = nullptr;
  for (const KernelRow& row : kernel_table()) {
    if (row.op != problem.op) continue;
    if (!row.refuse(problem, tile, isa, Why())) return row;
    last = &row;
  }
  return *last;
}

std::vector<KernelInfo> cpu_kernels(bool compiled) {
  std::vector<KernelInfo> list;
  for (const std::string& level : compiled ? compiled_isa_levels() : isa_levels()) {
    for (const KernelRow& row : kernel_table()) {
      if (is_built(row, *kernels_of(level))) {
        list.push_back({"cpu", name_of(row.op), row.name, level, row.takes, row.general});
      }
    }
  }
  return list;
}

std::vector<Verdict> explain_cpu(const Problem& problem, const std::string& device) {
  const IsaKernels& isa = parse_device(device);
  const CpuTile16 tile = cpu_tile16(problem.N, problem.K, problem.desc);
  std::vector<Verdict> verdicts;
  bool found = false;
  for (const KernelRow& row : kernel_table()) {
    if (row.op != problem.op) continue;
    std::string reason;
    row.refuse(problem, tile, isa, Why(&reason));
    // Of the machine itself, not of a level that is asked about by name.
    if (device == "cpu" && reads_tiles(row) && isa.amx == nullptr && !amx_refusal().empty())
      reason += concat("; amx: ", amx_refusal());
    if (reason.empty() && found) reason = "slower than the chosen one";
    found = found || reason.empty();
    verdicts.push_back(
        {concat("cpu_", row.name, "_", row.general ? "portable" : isa.isa), std::move(reason)});
  }
  return verdicts;
}

}  // namespace lowbit
