// The kernels by tile shape, and what each of them takes.

#include "cuda/select.h"
#include "formats/format_table.h"

namespace lowbit::cuda {
namespace {

// ---- what each kernel takes --------------------------------------------------------------------------------------------

bool refuse_nothing(const Problem&, const CudaTile64&, const Why&) { return false; }

// A cell of 16 k must lie in one group, so that its codes share scales.
bool refuse_group(const Problem& p, const CudaTile64& weight, int64_t multiple, const Why& why) {
  if (weight.groups == 1 || weight.group_size % multiple == 0) return false;
  if (p.desc.scaling == Scaling::kFlat)
    return why("blocks of ", p.desc.group_size, " across rows of K=", p.K, " have no more than ",
               weight.group_size, " k in common, which is not a multiple of ", multiple);
  return why("group_size=", weight.group_size, " is not a multiple of ", multiple);
}

bool refuse_16_bit(const Problem& p, const CudaTile64& weight, const Why& why) {
  if (p.x == Element::kFloat32)
    return why(p.op == Op::kGradInput ? "dy is" : "activations are",
               " float32, which tensor cores do not take");
  return refuse_group(p, weight, 16, why);
}

// Stages of the kernels for Hopper hold a tile as it lies in the layout: no room for floats that are made of other scales
// (expand.cuh).
bool refuse_stored(const Problem& p, const CudaTile64& weight, const Why& why) {
  if (weight.plain) return false;
  return why("scales in ", name_of(p.desc.scale_dtype),
             " are no floats, which is what its stages hold");
}

bool refuse_hopper(const Problem& p, const CudaTile64& weight, const Why& why) {
  return refuse_stored(p, weight, why) || refuse_16_bit(p, weight, why);
}

// The perm sorts columns of W by group; scales per 128 columns of x do not survive it.
bool refuse_grouped_perm(const Problem& p, const Why& why) {
  if (!p.grouped_x || !p.desc.has_perm) return false;
  return why("activation scales per 128 of K do not go with a perm");
}

bool refuse_a8_int(const Problem& p, const CudaTile64& weight, const Why& why) {
  if (p.x != Element::kInt8) return why("activations are not int8");
  const FormatInfo& info = format_info(p.desc.format);
  if (!info.is_integer) return why(info.name, " weights are not integers");
  if (p.desc.zero_kind != ZeroKind::kNone && p.desc.zero_kind != ZeroKind::kInt)
    return why("weights with zeros=", name_of(p.desc.zero_kind), " are not integers");
  return refuse_grouped_perm(p, why) || refuse_group(p, weight, 16, why);
}

bool refuse_a8_fp8(const Problem& p, const CudaTile64& weight, const Why& why) {
  if (p.x != Element::kFp8E4m3) return why("activations are not fp8");
  if (p.desc.format != Format::kFp8E4m3 && p.desc.format != Format::kFp8E5m2)
    return why(format_info(p.desc.format).name, " weights are not fp8");
  return refuse_grouped_perm(p, why) || refuse_group(p, weight, 16, why);
}

// Two cells of 16 k are one wgmma: 32 k of one group.
bool refuse_hopper_a8_int(const Problem& p, const CudaTile64& weight, const Why& why) {
  if (refuse_a8_int(p, weight, why) || refuse_stored(p, weight, why)) return true;
  if (p.x_zeros) return why("activations have zeros");
  if (p.desc.format == Format::kInt8 && p.desc.zero_kind == ZeroKind::kInt)
    return why("int8 weights less their zeros do not fit int8");
  return refuse_group(p, weight, 32, why);
}

bool refuse_hopper_a8_fp8(const Problem& p, const CudaTile64& weight, const Why& why) {
  if (p.x != Element::kFp8E4m3) return why("activations are not fp8");
  const FormatInfo& info = format_info(p.desc.format);
  if (p.desc.format != Format::kFp8E4m3 && p.desc.format != Format::kFp8E5m2 &&
      p.desc.format != Format::kFp4E2m1 && p.desc.format != Format::kInt4)
    return why(info.name, " weights are neither fp8 nor made fp8");
  if (info.is_integer && p.desc.zero_kind != ZeroKind::kNone)
    return why("weights with zeros=", name_of(p.desc.zero_kind), " are not made fp8");
  return refuse_grouped_perm(p, why) || refuse_stored(p, weight, why) ||
         refuse_group(p, weight, 32, why);
}

bool refuse_a8_decode(const Problem& p, const CudaTile64& weight, const Why& why) {
  const FormatInfo& info = format_info(p.desc.format);
  if (!info.exact16) return why(info.name, "'s levels are not exact in bf16");
  if (p.desc.zero_kind == ZeroKind::kFloat || p.desc.zero_kind == ZeroKind::kOffset)
    return why("weights with zeros=", name_of(p.desc.zero_kind), " are not exact in bf16");
  return refuse_grouped_perm(p, why) || refuse_group(p, weight, 16, why);
}

// ---- the table ---------------------------------------------------------------------------------------------------------

// What all tile shapes of a kernel have in common.
struct Family {
  Kernel kernel;
  int capability;
  const char* takes;
  bool (*refuse)(const Problem&, const CudaTile64&, const Why&);
  bool hopper = false;
};

constexpr const char* kEverything = "everything";

constexpr Family kFamilies[] = {
    {Kernel::kHopperStream, 90,
     "few rows of bf16 or fp16 x on sm_90, groups in multiples of 16: weights copied in bulk, K "
     "cut among the blocks of a cluster",
     refuse_hopper, true},
    {Kernel::kStream, 80,
     "few rows of bf16 or fp16 x, groups in multiples of 16: weights read once, decoded in "
     "registers",
     refuse_16_bit},
    {Kernel::kHopperMatrix, 90,
     "bf16 or fp16 x on sm_90, groups in multiples of 16: wgmma, weights decoded into its "
     "registers",
     refuse_hopper, true},
    {Kernel::kMatrix, 80,
     "bf16 or fp16 x, groups in multiples of 16: tensor cores, weights decoded from shared memory",
     refuse_16_bit},
    {Kernel::kHopperA8Int, 90,
     "int8 x without zeros times integers on sm_90, groups in multiples of 32: wgmma, exact in "
     "int32",
     refuse_hopper_a8_int, true},
    {Kernel::kHopperA8Fp8, 90,
     "fp8 x times fp8, fp4 or int4 on sm_90, groups in multiples of 32: wgmma, promoted to fp32",
     refuse_hopper_a8_fp8, true},
    {Kernel::kA8Int, 80,
     "int8 x times integers without or with integer zeros, groups in multiples of 16: exact in "
     "int32",
     refuse_a8_int},
    {Kernel::kA8Fp8, 89,
     "fp8 x times fp8 weights, groups in multiples of 16: fp8 tensor cores, promoted to fp32",
     refuse_a8_fp8},
    {Kernel::kA8Decode, 80,
     "8-bit x times codes that bf16 holds exactly, groups in multiples of 16: bf16 tensor cores",
     refuse_a8_decode},
    {Kernel::kGrad, 80, "bf16 or fp16 dy, groups in multiples of 16: tensor cores", refuse_16_bit},
    {Kernel::kGeneral, 80, kEverything, refuse_nothing},
    {Kernel::kGeneralGrad, 80, kEverything, refuse_nothing},
};

bool is_general(Kernel kernel) {
  return kernel == Kernel::kGeneral || kernel == Kernel::kGeneralGrad;
}

std::vector<Op> ops_of(Kernel kernel) {
  switch (kernel) {
    case Kernel::kHopperStream:
    case Kernel::kStream:
    case Kernel::kHopperMatrix:
    case Kernel::kMatrix:
      return {Op::kGemm};
    case Kernel::kHopperA8Int:
    case Kernel::kHopperA8Fp8:
    case Kernel::kA8Int:
    case Kernel::kA8Fp8:
    case Kernel::kA8Decode:
      return {Op::kGemmA8};
    case Kernel::kGrad:
    case Kernel::kGeneralGrad:
      return {Op::kGradInput};
    case Kernel::kGeneral:
      return {Op::kGemm, Op::kGemmA8};
  }
  return {};
}

}  // namespace

const std::vector<KernelRow>& kernel_table() {
  static const std::vector<KernelRow> table = [] {
    std::vector<KernelRow> rows;
    for (int i = 0; i < kTileCount; ++i) {
      for (const Family& family : kFamilies) {
        if (family.kernel != kTiles[i].kernel) continue;
        for (Op op : ops_of(family.kernel)) {
          rows.push_back({op, i, family.capability, is_general(family.kernel), family.hopper,
                          family.takes, family.refuse});
        }
      }
    }
    return rows;
  }();
  return table;
}

std::vector<KernelInfo> kernels() {
  std::vector<KernelInfo> list;
  for (const KernelRow& row : kernel_table())
    list.push_back({"cuda", name_of(row.op), row.name(), concat("sm_", row.capability), row.takes,
                    row.general});
  return list;
}

}  // namespace lowbit::cuda
