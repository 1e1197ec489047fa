// gemm, linear, gemm_a8, gemm_grad_input and their out variants on CUDA: checks, selection, workspace, launch.

#include <vector>

#include "common/half.h"
#include "common/strict.h"
#include "cuda/tensor.h"
#include "formats/format_table.h"

namespace lowbit::cuda {
namespace {

// The bytes of a code book's levels as `type` holds them, and of what it loses.
BookBytes book_bytes(const float* code, Element type) {
  const auto nearest = [type](float level) -> uint32_t {
    return type == Element::kFloat16 ? to_half(level).bits : to_bfloat16(level).bits;
  };
  const auto value = [type](uint32_t bits) {
    const uint16_t stored = static_cast<uint16_t>(bits);
    return type == Element::kFloat16 ? to_float(Half{stored}) : to_float(BFloat16{stored});
  };
  BookBytes book{};
  for (int i = 0; i < 16; ++i) {
    const uint32_t level = nearest(code[i]), rest = nearest(code[i] - value(level));
    for (int byte = 0; byte < 2; ++byte) {
      book.nearest[byte][i / 4] |= (level >> (8 * byte) & 0xffu) << (8 * (i % 4));
      book.rest[byte][i / 4] |= (rest >> (8 * byte) & 0xffu) << (8 * (i % 4));
    }
  }
  return book;
}

// Of every book and both types, made once. 8-bit activations meet a book as bf16.
const BookBytes& book_of(Format format, Element type) {
  struct Books {
    BookBytes half, bfloat;
  };
  static const std::vector<Books> all = [] {
    std::vector<Books> books;
    for (Format book : kBooks) {
      const float* code = format_info(book).code;
      books.push_back({book_bytes(code, Element::kFloat16), book_bytes(code, Element::kBFloat16)});
    }
    return books;
  }();
  const Books& found = all[static_cast<size_t>(index_of_book(format))];
  return type == Element::kFloat16 ? found.half : found.bfloat;
}

Config choose(const char* op, const Problem& problem, const Weight& weight,
              const DeviceInfo& device) {
  const Config config = select(problem, weight.tile, device);
  LOWBIT_CHECK(!config.row->general || !strict(), op,
               ": LOWBIT_STRICT is set and only the general kernel takes M=", problem.M,
               " N=", problem.N, " K=", problem.K, " ", to_string(weight.desc), " on cuda:sm_",
               device.capability);
  return config;
}

// What only builds with code for sm_90a have.
void launch_on_hopper(const Config& config, const GemmParams& p, Stream stream) {
#if defined(LOWBIT_HOPPER)
  const int tile = config.row->tile;
  switch (config.row->shape().kernel) {
    case Kernel::kHopperStream:
      return launch_hopper_stream(p, tile, stream);
    case Kernel::kHopperMatrix:
      return launch_hopper_matrix(p, tile, stream);
    case Kernel::kHopperA8Int:
      return launch_hopper_a8_int(p, tile, stream);
    case Kernel::kHopperA8Fp8:
      return launch_hopper_a8_fp8(p, tile, stream);
    default:
      break;
  }
#endif
  (void)p, (void)stream;
  fail(config.row->name(), ": this build has no code for sm_90a");  // not reached: selection knows
}

void launch_kernel(const Config& config, const GemmParams& p, Stream stream) {
  const int tile = config.row->tile;
  switch (config.row->shape().kernel) {
    case Kernel::kHopperStream:
    case Kernel::kHopperMatrix:
    case Kernel::kHopperA8Int:
    case Kernel::kHopperA8Fp8:
      return launch_on_hopper(config, p, stream);
    case Kernel::kStream:
      return launch_stream(p, tile, stream);
    case Kernel::kMatrix:
      return launch_matrix(p, tile, stream);
    case Kernel::kA8Int:
      return launch_a8_int(p, tile, stream);
    case Kernel::kA8Fp8:
      return launch_a8_fp8(p, tile, stream);
    case Kernel::kA8Decode:
      return launch_a8_decode(p, tile, stream);
    case Kernel::kGrad:
      return launch_grad(p, tile, stream);
    case Kernel::kGeneral:
      return launch_general(p, stream);
    case Kernel::kGeneralGrad:
      return launch_general_grad(p, stream);
  }
}

// Vector loads of 16 bytes from the start of every row; tensor copies want rows that do not overlap, too.
bool is_aligned(const RowsParams& x, int64_t columns) {
  const int64_t row_bytes = x.stride * element_bytes(x.type);
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 &&
         (x.M == 1 || (row_bytes % 16 == 0 && x.stride >= columns));
}

// Everything between checked arguments and the kernel. `y.stride` is that of a contiguous result.
void run(const char* op, Problem problem, const Weight& weight, RowsParams x, OutParams y,
         const OptionalTensor& workspace, const Place& place, const Scope& scope) {
  const bool is_grad = problem.op == Op::kGradInput;
  const int64_t columns = is_grad ? problem.N : problem.K;
  problem.x_aligned = is_aligned(x, columns);
  problem.x_zeros = x.zeros != nullptr;
  const Config config = choose(op, problem, weight, scope.device());
  const Workspace memory(op, config, workspace, place, scope.stream());
  const bool boxes = has_warpgroups(config.row->shape().kernel);
  GemmParams p{weight.params,
               x,
               y,
               config.schedule,
               config.stages,
               config.hopper.strips,
               boxes ? config.boxes.blocks() : config.hopper.cluster,
               config.tokens,
               config.boxes.rows};
  if (has_book(weight.desc.format)) p.w.book = book_of(weight.desc.format, x.type);
  if (config.shares_tiles) {
    p.schedule.counters = memory.counters();
    p.schedule.partials = reinterpret_cast<float*>(memory.partials());
  }
  if (config.prepares) {
    uint8_t* rows = memory.prepared(config);
    const bool ordered = orders_bytes(config.row->shape().kernel);
    launch_prepare_rows(x, columns, is_grad ? nullptr : weight.params.perm,
                        ordered ? RowOrder::kBytes : RowOrder::kPlain, rows,
                        config.prepared_columns, scope.stream());
    p.x.data = rows;
    p.x.stride = config.prepared_columns;
  }
  if (!config.row->general) p.w.perm = nullptr;  // x is gathered, dx will be scattered
  if (config.unordered_bytes > 0) p.y.data = memory.unordered(config);
  launch_kernel(config, p, scope.stream());
  if (config.unordered_bytes > 0)
    launch_scatter_columns(p.y.data, problem.M, problem.K, weight.params.perm, y.type, y.data,
                           scope.stream());
}

RowsParams rows_params(const Rows& rows, Element type) {
  RowsParams x{};
  x.data = rows.data;
  x.stride = rows.stride;
  x.M = static_cast<int32_t>(rows.M);
  x.type = type;
  return x;
}

OutParams out_params(const Tensor& out, int64_t columns, Element type) {
  return {out.mutable_data_ptr(), columns, type, nullptr, Element::kFloat32};
}

void add_bias(const char* op, const OptionalTensor& bias, OutParams& y) {
  if (!bias.has_value()) return;
  y.bias = bias->const_data_ptr();
  y.bias_type = float_element(op, "bias", *bias);
}

// ---- gemm --------------------------------------------------------------------------------------------------------------

void gemm_into(const char* op, const Tensor& x, const Tensor& w, const OptionalTensor& bias,
               int64_t N, int64_t K, int64_t desc, int64_t flags, const Rows& rows, Element element,
               const Tensor& out, const OptionalTensor& workspace, const Place& place,
               const Scope& scope) {
  const Weight weight(op, w, place, N, K, desc);
  check_columns(op, "x", x, rows.K, "K", K);
  check_bias(op, bias, place, N);
  check_flags(op, flags);
  if (rows.M == 0) return;
  OutParams y = out_params(out, N, element);
  add_bias(op, bias, y);
  run(op, {Op::kGemm, rows.M, N, K, weight.desc, element, false, flags}, weight,
      rows_params(rows, element), y, workspace, place, scope);
}

Tensor gemm(const Tensor& x, const Tensor& w, const OptionalTensor& bias, int64_t N, int64_t K,
            int64_t desc, int64_t flags) {
  const char* op = "lowbit::gemm";
  const Place place = place_of(w, "the weight");
  const Scope scope(op, place);
  const Rows rows = rows_of(op, "x", x, place);
  const Element element = float_element(op, "x", x);
  LOWBIT_CHECK(N >= 1, op, ": N=", N, " is not positive");
  Tensor out = empty_on(place, with_last(x, N), x.scalar_type());
  gemm_into(op, x, w, bias, N, K, desc, flags, rows, element, out, {}, place, scope);
  return out;
}

void gemm_out(const Tensor& x, const Tensor& w, const OptionalTensor& bias, int64_t N, int64_t K,
              int64_t desc, int64_t flags, const Tensor& out, const OptionalTensor& workspace) {
  const char* op = "lowbit::gemm_out";
  const Place place = place_of(w, "the weight");
  const Scope scope(op, place);
  const Rows rows = rows_of(op, "x", x, place);
  const Element element = float_element(op, "x", x);
  check_out(op, out, place, x, N);
  check_dtype(op, "out", out, x.scalar_type());
  gemm_into(op, x, w, bias, N, K, desc, flags, rows, element, out, workspace, place, scope);
}

// ---- gemm_a8 -----------------------------------------------------------------------------------------------------------

void gemm_a8_into(const char* op, const Tensor& xq, const Tensor& x_scales,
                  const OptionalTensor& x_zeros, const Tensor& w, const OptionalTensor& bias,
                  int64_t N, int64_t K, int64_t desc, int64_t flags, const Tensor& out,
                  const OptionalTensor& workspace, const Place& place, const Scope& scope) {
  const Weight weight(op, w, place, N, K, desc);
  const QuantizedRows q = check_quantized(op, xq, x_scales, x_zeros, place, K);
  check_bias(op, bias, place, N);
  check_flags(op, flags);
  if (q.rows.M == 0) return;
  RowsParams x = rows_params(q.rows, q.element);
  x.scales = q.scales;
  x.scale_groups = static_cast<int32_t>(q.groups);
  x.zeros = q.zeros;
  OutParams y = out_params(out, N, float_element(op, "out", out));
  add_bias(op, bias, y);
  run(op, {Op::kGemmA8, q.rows.M, N, K, weight.desc, q.element, q.groups != 1, flags}, weight, x, y,
      workspace, place, scope);
}

Tensor gemm_a8(const Tensor& xq, const Tensor& x_scales, const OptionalTensor& x_zeros,
               const Tensor& w, const OptionalTensor& bias, int64_t N, int64_t K, int64_t desc,
               int64_t flags, ScalarType out_dtype) {
  const char* op = "lowbit::gemm_a8";
  const Place place = place_of(w, "the weight");
  const Scope scope(op, place);
  float_element(op, "out_dtype", out_dtype);
  LOWBIT_CHECK(N >= 1, op, ": N=", N, " is not positive");
  LOWBIT_CHECK(xq.dim() >= 1, op, ": xq is a scalar, expected shape [..., K]");
  Tensor out = empty_on(place, with_last(xq, N), out_dtype);
  gemm_a8_into(op, xq, x_scales, x_zeros, w, bias, N, K, desc, flags, out, {}, place, scope);
  return out;
}

void gemm_a8_out(const Tensor& xq, const Tensor& x_scales, const OptionalTensor& x_zeros,
                 const Tensor& w, const OptionalTensor& bias, int64_t N, int64_t K, int64_t desc,
                 int64_t flags, const Tensor& out, const OptionalTensor& workspace) {
  const char* op = "lowbit::gemm_a8_out";
  const Place place = place_of(w, "the weight");
  const Scope scope(op, place);
  LOWBIT_CHECK(xq.dim() >= 1, op, ": xq is a scalar, expected shape [..., K]");
  check_out(op, out, place, xq, N);
  gemm_a8_into(op, xq, x_scales, x_zeros, w, bias, N, K, desc, flags, out, workspace, place, scope);
}

// ---- gemm_grad_input ---------------------------------------------------------------------------------------------------

Tensor gemm_grad_input(const Tensor& dy, const Tensor& w, int64_t N, int64_t K, int64_t desc,
                       int64_t flags) {
  const char* op = "lowbit::gemm_grad_input";
  const Place place = place_of(w, "the weight");
  const Scope scope(op, place);
  const Rows rows = rows_of(op, "dy", dy, place);
  const Element element = float_element(op, "dy", dy);
  const Weight weight(op, w, place, N, K, desc);
  check_columns(op, "dy", dy, rows.K, "N", N);
  check_flags(op, flags);
  Tensor dx = empty_on(place, with_last(dy, K), dy.scalar_type());
  if (rows.M == 0) return dx;
  run(op, {Op::kGradInput, rows.M, N, K, weight.desc, element, false, flags}, weight,
      rows_params(rows, element), out_params(dx, K, element), {}, place, scope);
  return dx;
}

}  // namespace

LOWBIT_IMPL(LOWBIT_CUDA_KEY, m) {
  m.impl("gemm", TORCH_BOX(&gemm));
  m.impl("gemm_out", TORCH_BOX(&gemm_out));
  m.impl("linear", TORCH_BOX(&gemm));
  m.impl("gemm_grad_input", TORCH_BOX(&gemm_grad_input));
  m.impl("gemm_a8", TORCH_BOX(&gemm_a8));
  m.impl("gemm_a8_out", TORCH_BOX(&gemm_a8_out));
}

}  // namespace lowbit::cuda
