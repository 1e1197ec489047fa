// gemm, linear, gemm_a8, gemm_grad_input and their out variants on Metal: checks, selection, launch.

#include "common/strict.h"
#include "metal/tensor.h"

namespace lowbit::metal {
namespace {

namespace mp = metal_params;

// What every product is made of, as the op boundary has checked it.
struct Product {
  const char* op;
  Problem problem;
  const Weight& weight;
  Rows rows;
  Element x;                // of rows
  Element y;                // of out
  OptionalTensor bias;      // gemm, gemm_a8
  OptionalTensor x_scales;  // gemm_a8
  OptionalTensor x_zeros;
  int64_t x_groups;
  Tensor out;
  int64_t out_stride;
  Place place;
};

Config choose(const Product& p) {
  const Config config = select(p.problem, p.weight.tile, this_device());
  LOWBIT_CHECK(!config.row->general || !strict(), p.op,
               ": LOWBIT_STRICT is set and only the general kernel takes M=", p.problem.M,
               " N=", p.problem.N, " K=", p.problem.K, " ", to_string(p.weight.desc),
               " on mps:", model_name(this_device()));
  return config;
}

// Rows of x as the kernels want them: gathered by perm; 8-bit codes minus their zeros, in half.
void prepare(Product& p) {
  const MetalTile4& tile = p.weight.tile;
  const bool is_a8 = p.problem.op == Op::kGemmA8;
  const Element to = is_a8 ? Element::kFloat16 : p.x;
  const int64_t columns = round_up(tile.K, 8);
  Tensor rows = empty_on(p.place, {p.rows.M, columns},
                         to == Element::kFloat32   ? ScalarType::Float
                         : to == Element::kFloat16 ? ScalarType::Half
                                                   : ScalarType::BFloat16);
  mp::Rows r{};
  r.M = static_cast<int32_t>(p.rows.M);
  r.K = static_cast<int32_t>(tile.K);
  r.stride = checked_int(p.op, "the stride of x", p.rows.stride);
  r.to_stride = static_cast<int32_t>(columns);
  r.kinds = mp::make_kinds(ScaleDtype::kFloat32, ZeroKind::kNone, p.x, to, Element::kFloat32,
                           Format::kInt4);
  if (p.weight.desc.has_perm) r.kinds |= mp::kHasPerm;
  if (p.x_zeros.has_value()) r.kinds |= mp::kHasXZeros;
  r.perm_low = static_cast<uint32_t>(tile.perm_offset);
  r.perm_high = static_cast<uint32_t>(tile.perm_offset >> 32);
  Command(p.op, {{Shader::kPrepareRows, Format(0), true, to}, 0})
      .params(r)
      .tensor(p.rows.keep)
      .tensor(p.weight.data)
      .tensor(p.x_zeros, p.weight.data)
      .tensor(rows)
      .run(static_cast<uint32_t>(div_up(tile.K, 256)), static_cast<uint32_t>(p.rows.M), 256);
  p.rows.keep = rows;
  p.rows.stride = columns;
  p.x = to;
}

// Vector loads from the start of every row.
bool has_vectors(const Rows& rows, Element x) {
  const int64_t bytes = x == Element::kFloat32 ? 4 : 2;
  return starts_at(rows.keep, 16) && (rows.M == 1 || rows.stride * bytes % 16 == 0);
}

mp::Gemm params_of(const Product& p, const Config& config) {
  mp::Gemm g = gemm_params(p.weight.tile, p.weight.desc);
  g.M = checked_int(p.op, "M", p.rows.M);
  g.x_stride = checked_int(p.op, "the stride of x", p.rows.stride);
  g.y_stride = static_cast<int32_t>(p.out_stride);
  g.x_groups = static_cast<int32_t>(p.x_groups);
  g.split = config.split;
  g.kinds |=
      mp::make_kinds(p.weight.desc.scale_dtype, p.weight.desc.zero_kind, p.x, p.y,
                     p.bias.has_value() ? float_element(p.op, "bias", *p.bias) : Element::kFloat32,
                     p.weight.desc.format);
  if (p.bias.has_value()) g.kinds |= mp::kHasBias;
  if (p.x_scales.has_value()) g.kinds |= mp::kHasXScales;
  if (p.weight.desc.has_perm) g.kinds |= mp::kHasPerm;
  if (p.x_zeros.has_value()) g.kinds |= mp::kHasXZeros;
  if (has_vectors(p.rows, p.x)) g.kinds |= mp::kVectors;
  return g;
}

Pipeline pipeline_of(const Config& config, const Product& p) {
  const Desc& desc = p.weight.desc;
  const Variant typed{Shader::kStream, desc.format, true, p.x};
  const bool affine = desc.zero_kind == ZeroKind::kFloat || desc.zero_kind == ZeroKind::kOffset;
  const int tokens = config.row->tokens;
  switch (config.row->kernel) {
    case Kernel::kStream:
      return {typed, (tokens == 1 ? 0 : tokens == 2 ? 1 : tokens == 4 ? 2 : 3) + (affine ? 4 : 0)};
    case Kernel::kMatrix:
      return {{Shader::kMatrix, desc.format, true, p.x}, tokens == 32 ? 0 : 1};
    case Kernel::kMatrixExact:
      return {{Shader::kMatrixExact, desc.format, false, p.x}, 0};
    case Kernel::kGrad:
      return {{Shader::kGrad, desc.format, true, p.x}, 0};
    case Kernel::kGeneral:
      return {{Shader::kGeneral, Format(0), false, p.x}, 0};
    default:
      return {{Shader::kGeneral, Format(0), false, p.x}, 1};
  }
}

void run(Product p) {
  const Config config = choose(p);
  if (config.prepares) prepare(p);
  const Tensor& absent = p.weight.data;
  Command command(p.op, pipeline_of(config, p));
  command.params(params_of(p, config)).tensor(p.weight.data).tensor(p.rows.keep).tensor(p.out);
  if (p.problem.op != Op::kGradInput) {
    command.tensor(p.bias, absent).tensor(p.x_scales, absent);
    if (config.row->general) command.tensor(p.x_zeros, absent);
  }
  command.run(config.groups[0], config.groups[1], config.threads);
}

// ---- gemm --------------------------------------------------------------------------------------------------------------

void gemm_into(const char* op, const Tensor& x, const Tensor& w, const OptionalTensor& bias,
               int64_t N, int64_t K, int64_t desc, int64_t flags, const Rows& rows, Element element,
               const Tensor& out, const Place& place) {
  const Weight weight(op, w, place, N, K, desc);
  check_columns(op, "x", x, rows.K, "K", K);
  check_bias(op, bias, place, N);
  check_flags(op, flags);
  if (rows.M == 0) return;
  run({op,
       {Op::kGemm, rows.M, N, K, weight.desc, element, false, flags},
       weight,
       rows,
       element,
       element,
       bias,
       {},
       {},
       1,
       out,
       N,
       place});
}

// Kernels here need none; a caller that passes one for all backends is told if it is not what the others take.
void check_workspace(const char* op, const OptionalTensor& workspace, const Place& place) {
  if (!workspace.has_value()) return;
  check_place(op, "workspace", *workspace, place);
  check_dtype(op, "workspace", *workspace, ScalarType::Byte);
}

Tensor gemm(const Tensor& x, const Tensor& w, const OptionalTensor& bias, int64_t N, int64_t K,
            int64_t desc, int64_t flags) {
  const char* op = "lowbit::gemm";
  const Place place = place_of(w, "the weight");
  check_mps(op, place);
  const Rows rows = rows_of(op, "x", x, place);
  const Element element = float_element(op, "x", x);
  LOWBIT_CHECK(N >= 1, op, ": N=", N, " is not positive");
  Tensor out = empty_on(place, with_last(x, N), x.scalar_type());
  gemm_into(op, x, w, bias, N, K, desc, flags, rows, element, out, place);
  return out;
}

void gemm_out(const Tensor& x, const Tensor& w, const OptionalTensor& bias, int64_t N, int64_t K,
              int64_t desc, int64_t flags, const Tensor& out, const OptionalTensor& workspace) {
  const char* op = "lowbit::gemm_out";
  const Place place = place_of(w, "the weight");
  check_mps(op, place);
  const Rows rows = rows_of(op, "x", x, place);
  const Element element = float_element(op, "x", x);
  check_out(op, out, place, x, N);
  check_dtype(op, "out", out, x.scalar_type());
  check_workspace(op, workspace, place);
  gemm_into(op, x, w, bias, N, K, desc, flags, rows, element, out, place);
}

// ---- gemm_a8 -----------------------------------------------------------------------------------------------------------

void gemm_a8_into(const char* op, const Tensor& xq, const Tensor& x_scales,
                  const OptionalTensor& x_zeros, const Tensor& w, const OptionalTensor& bias,
                  int64_t N, int64_t K, int64_t desc, int64_t flags, const Tensor& out,
                  const Place& place) {
  const Weight weight(op, w, place, N, K, desc);
  const QuantizedRows q = check_quantized(op, xq, x_scales, x_zeros, place, K);
  check_bias(op, bias, place, N);
  check_flags(op, flags);
  if (q.rows.M == 0) return;
  run({op,
       {Op::kGemmA8, q.rows.M, N, K, weight.desc, q.element, q.groups != 1, flags},
       weight,
       q.rows,
       q.element,
       float_element(op, "out", out),
       bias,
       x_scales,
       x_zeros,
       q.groups,
       out,
       N,
       place});
}

Tensor gemm_a8(const Tensor& xq, const Tensor& x_scales, const OptionalTensor& x_zeros,
               const Tensor& w, const OptionalTensor& bias, int64_t N, int64_t K, int64_t desc,
               int64_t flags, ScalarType out_dtype) {
  const char* op = "lowbit::gemm_a8";
  const Place place = place_of(w, "the weight");
  check_mps(op, place);
  float_element(op, "out_dtype", out_dtype);
  LOWBIT_CHECK(N >= 1, op, ": N=", N, " is not positive");
  LOWBIT_CHECK(xq.dim() >= 1, op, ": xq is a scalar, expected shape [..., K]");
  Tensor out = empty_on(place, with_last(xq, N), out_dtype);
  gemm_a8_into(op, xq, x_scales, x_zeros, w, bias, N, K, desc, flags, out, place);
  return out;
}

void gemm_a8_out(const Tensor& xq, const Tensor& x_scales, const OptionalTensor& x_zeros,
                 const Tensor& w, const OptionalTensor& bias, int64_t N, int64_t K, int64_t desc,
                 int64_t flags, const Tensor& out, const OptionalTensor& workspace) {
  const char* op = "lowbit::gemm_a8_out";
  const Place place = place_of(w, "the weight");
  check_mps(op, place);
  LOWBIT_CHECK(xq.dim() >= 1, op, ": xq is a scalar, expected shape [..., K]");
  check_out(op, out, place, xq, N);
  check_workspace(op, workspace, place);
  gemm_a8_into(op, xq, x_scales, x_zeros, w, bias, N, K, desc, flags, out, place);
}

// ---- gemm_grad_input ---------------------------------------------------------------------------------------------------

Tensor gemm_grad_input(const Tensor& dy, const Tensor& w, int64_t N, int64_t K, int64_t desc,
                       int64_t flags) {
  const char* op = "lowbit::gemm_grad_input";
  const Place place = place_of(w, "the weight");
  check_mps(op, place);
  const Rows rows = rows_of(op, "dy", dy, place);
  const Element element = float_element(op, "dy", dy);
  const Weight weight(op, w, place, N, K, desc);
  check_columns(op, "dy", dy, rows.K, "N", N);
  check_flags(op, flags);
  Tensor dx = empty_on(place, with_last(dy, K), dy.scalar_type());
  if (rows.M == 0) return dx;
  run({op,
       {Op::kGradInput, rows.M, N, K, weight.desc, element, false, flags},
       weight,
       rows,
       element,
       element,
       {},
       {},
       {},
       1,
       dx,
       K,
       place});
  return dx;
}

}  // namespace

LOWBIT_IMPL(LOWBIT_METAL_KEY, m) {
  m.impl("gemm", TORCH_BOX(&gemm));
  m.impl("gemm_out", TORCH_BOX(&gemm_out));
  m.impl("linear", TORCH_BOX(&gemm));
  m.impl("gemm_grad_input", TORCH_BOX(&gemm_grad_input));
  m.impl("gemm_a8", TORCH_BOX(&gemm_a8));
  m.impl("gemm_a8_out", TORCH_BOX(&gemm_a8_out));
}

}  // namespace lowbit::metal
