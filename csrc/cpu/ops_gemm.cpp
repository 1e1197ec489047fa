// gemm, linear, gemm_a8, gemm_grad_input and their out variants on the CPU: checks, prepared activations, threads.

#include <algorithm>
#include <cstring>
#include <numeric>

#include "common/op_checks.h"
#include "common/strict.h"
#include "cpu/isa.h"
#include "cpu/kernel_table.h"
#include "cpu/kernels/amx.h"
#include "cpu/scratch.h"
#include "cpu/split.h"
#include "cpu/weight.h"
#include "cpu/workspace.h"
#include "formats/codebooks.h"
#include "op_namespace.h"

namespace lowbit {
namespace {

// Rows worth a thread of their own where threads share a strip, which each of them decodes again.
constexpr int64_t kRowsPerPiece = 32;

struct Chosen {
  const KernelRow& row;
  // Threads may share a strip: there are rows enough, each of them has the same bits whatever the others are, and they
  // stand one behind the other.
  bool may_cut_rows;
};

Chosen choose(const char* op, Problem problem, const PackedWeight& weight, const IsaKernels& isa) {
  const KernelRow& row = select_kernel(problem, weight.tile, isa);
  LOWBIT_CHECK(!row.general || !strict(), op,
               ": LOWBIT_STRICT is set and only the general kernel takes M=", problem.M,
               " N=", problem.N, " K=", problem.K, " ", to_string(weight.desc),
               " on cpu:", isa.isa);
  const bool plain_rows =
      row.x == XForm::kFloats || row.x == XForm::kBFloats || row.x == XForm::kCodes;
  problem.flags |= kBatchInvariant;
  return {row, problem.M >= 2 * kRowsPerPiece && plain_rows &&
                   !row.refuse(problem, weight.tile, isa, Why())};
}

// Bias as fp32, in place where it already is.
const float* prepare_bias(const char* op, const IsaKernels& isa, const OptionalTensor& bias,
                          int64_t N, Scratch& scratch) {
  if (!bias.has_value()) return nullptr;
  if (bias->scalar_type() == ScalarType::Float) return const_data_of<float>(*bias);
  float* values = scratch.take<float>(N);
  isa.load_rows({bias->const_data_ptr(), float_element(op, "bias", *bias), N, N, nullptr, nullptr},
                0, 1, values, N);
  return values;
}

// ---- gemm ----------------------------------------------------------------------------------------------------------

// Some of a job's rows.
GemmJob rows_of_job(const GemmJob& job, int64_t m0, int64_t count, int64_t element_size) {
  GemmJob part = job;
  Activations& x = part.x;
  const int64_t segments = job.w.groups * x.segments_per_group;
  x.M = count;
  if (x.values != nullptr) x.values += m0 * x.stride;
  if (x.bfloats != nullptr) x.bfloats += m0 * x.stride;
  if (x.codes != nullptr) x.codes += m0 * x.stride;
  if (x.sums != nullptr) x.sums += m0 * segments;
  if (x.scales != nullptr) x.scales += m0;
  if (x.zeros != nullptr) x.zeros += m0;
  part.y.data = static_cast<uint8_t*>(job.y.data) + m0 * job.y.stride * element_size;
  return part;
}

// How many pieces the rows are cut into, so that few strips still give every thread as much to do: one, three or five
// strips do not divide among two threads, twice as many pieces do.
int64_t row_pieces(int64_t strips, int64_t M) {
  // Per thread; with more, one too many for one of them does not matter.
  constexpr int64_t kFewStrips = 8;
  if (M < 2 * kRowsPerPiece) return 1;
  const int64_t threads = torch::stable::get_num_threads();
  if (threads == 1 || strips >= kFewStrips * threads) return 1;
  return std::min(threads / std::gcd(strips, threads), M / kRowsPerPiece);
}

// Strips of the weight over threads, in passes of some rows; prepare(m0, job.x) fills the activations of a pass.
template <class Prepare>
void run_gemm(const Chosen& chosen, const IsaKernels& isa, GemmJob& job, int64_t M, int64_t pass,
              const Prepare& prepare) {
  const int64_t element_size = job.y.dtype == Element::kFloat32 ? 4 : 2;
  uint8_t* out = static_cast<uint8_t*>(job.y.data);
  const auto gemm = chosen.row.gemm;
  const int64_t strips = job.w.tile->strips;
  for (int64_t m0 = 0; m0 < M; m0 += pass) {
    job.x.M = std::min(pass, M - m0);
    prepare(m0, job.x);
    job.y.data = out + m0 * job.y.stride * element_size;
    const int64_t work = job.x.M * job.w.K_padded * kTileRows;
    const int64_t pieces = chosen.may_cut_rows ? row_pieces(strips, job.x.M) : 1;
    if (pieces == 1) {
      parallel_items(strips, work, [&](int64_t begin, int64_t end) { gemm(isa, job, begin, end); });
      continue;
    }
    const int64_t per_piece = round_up(div_up(job.x.M, pieces), int64_t{16});
    parallel_items(strips * pieces, work / pieces, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t strip = item % strips, from = item / strips * per_piece;
        const int64_t count = std::min(per_piece, job.x.M - from);
        if (count > 0) gemm(isa, rows_of_job(job, from, count, element_size), strip, strip + 1);
      }
    });
  }
}

// A row of 16-bit values, gathered and padded with zeros, the middle two of every four exchanged: the order in which
// decode_bf16-inl.h makes pairs.
void load_bfloats(const Rows& rows, const int32_t* perm, int64_t m, uint16_t* to, int64_t stride) {
  const uint16_t* row = reinterpret_cast<const uint16_t*>(rows.data) + m * rows.stride;
  const int64_t whole = perm == nullptr ? rows.K / 4 * 4 : 0;
  for (int64_t k = 0; k < whole; k += 4) {  // as one number, which compilers make vectors of
    uint64_t four;
    std::memcpy(&four, row + k, 8);
    four =
        (four & 0xffff00000000ffffu) | (four >> 16 & 0xffff0000u) | (four << 16 & 0xffff00000000u);
    std::memcpy(to + k, &four, 8);
  }
  std::fill(to + whole, to + stride, uint16_t{0});
  for (int64_t k = whole; k < rows.K; ++k) {
    const int64_t exchanged = k % 4 == 1 ? k + 1 : k % 4 == 2 ? k - 1 : k;
    to[exchanged] = row[perm == nullptr ? k : perm[k]];
  }
}

// Tiles of rows [0, count) of `source`, 16 at a time, from row m0 on.
void pack_tiles(const IsaKernels& isa, const RowSource& source, int64_t m0, const CpuTile16& tile,
                uint8_t* tiles, Activations& x) {
  const int64_t bytes = float_tile_bytes(x.tile_planes, tile);
  parallel_items(div_up(x.M, 16), 16 * tile.K_padded, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      isa.amx->pack_floats(source, m0 + 16 * i, std::min<int64_t>(16, x.M - 16 * i), x.tile_planes,
                           tile.K_padded, tiles + i * bytes);
    }
  });
  x.tiles = tiles;
}

void gemm_on_tiles(const Chosen& chosen, const IsaKernels& isa, GemmJob& job, int64_t M,
                   const RowSource& source, Scratch& scratch) {
  const CpuTile16& tile = *job.w.tile;
  job.x.tile_planes = tile_planes(source.dtype);
  const int64_t pass = std::min(M, pass_rows(true, job.x.tile_planes));
  uint8_t* tiles =
      scratch.take<uint8_t>(div_up(pass, 16) * float_tile_bytes(job.x.tile_planes, tile));
  run_gemm(chosen, isa, job, M, pass,
           [&](int64_t m0, Activations& a) { pack_tiles(isa, source, m0, tile, tiles, a); });
}

// Scratch for one pass of a kernel.
int64_t scratch_for(const KernelRow& row, int64_t M, Element x, const CpuTile16& tile) {
  const int planes = row.x == XForm::kTiles ? tile_planes(x) : 1;
  const int64_t rows = std::min(M, pass_rows(reads_tiles(row), planes));
  const int64_t bias = scratch_bytes(tile.shape.N, 4), tiles = div_up(rows, 16);
  const bool quantized = x == Element::kInt8 || x == Element::kFp8E4m3;
  switch (row.x) {
    case XForm::kTiles:
      return bias + tiles * float_tile_bytes(planes, tile) +
             (quantized ? float_rows_bytes(rows, tile) : 0);
    case XForm::kCodeTiles:
      return bias + tiles * code_tile_bytes(tile) + code_rows_bytes(rows, tile);
    case XForm::kPlanes:
      return bias + split_scratch_bytes(M, tile);
    case XForm::kCodes:
      return bias + code_rows_bytes(rows, tile);
    default:
      return bias + float_rows_bytes(rows, tile);
  }
}

void gemm_into(const char* op, const Tensor& x, const Tensor& w, const OptionalTensor& bias,
               int64_t N, int64_t K, int64_t desc, int64_t flags, const Rows& rows, Element element,
               void* out, const OptionalTensor& workspace) {
  const PackedWeight weight(op, w, N, K, desc);
  check_columns(op, "x", x, rows.K, "K", K);
  check_bias(op, bias, cpu_place(), N);
  check_flags(op, flags);
  const IsaKernels& isa = kernels();
  const Chosen chosen =
      choose(op, {Op::kGemm, rows.M, N, K, weight.desc, element, false, flags}, weight, isa);
  const KernelRow& row = chosen.row;
  Scratch scratch(scratch_for(row, rows.M, element, weight.tile), workspace, op);

  GemmJob job{weight.view, {}, {out, N, element, prepare_bias(op, isa, bias, N, scratch)}};
  const RowSource source{rows.data, element, rows.stride, K, weight.perm, nullptr};
  if (row.x == XForm::kPlanes) {
    SplitRows split(weight.view, element, rows.M, scratch);
    run_gemm(chosen, isa, job, rows.M, kMaxPlaneRows,
             [&](int64_t m0, Activations& a) { split.prepare(isa, source, m0, a); });
    return;
  }
  if (row.x == XForm::kTiles) return gemm_on_tiles(chosen, isa, job, rows.M, source, scratch);
  const bool as_bf16 = row.x == XForm::kBFloats;
  // Rows of fp32 that need no padding and no gather are read where they are.
  const bool direct = !as_bf16 && element == Element::kFloat32 && weight.perm == nullptr &&
                      K == weight.tile.K_padded;
  const int64_t stride = direct ? rows.stride : weight.tile.K_padded;
  const int64_t count = direct ? 0 : std::min<int64_t>(rows.M, kMaxRows) * stride;
  float* values = as_bf16 ? nullptr : scratch.take<float>(count);
  uint16_t* bfloats = as_bf16 ? scratch.take<uint16_t>(count) : nullptr;
  run_gemm(chosen, isa, job, rows.M, kMaxRows, [&](int64_t m0, Activations& a) {
    a.stride = stride;
    a.values = direct ? reinterpret_cast<const float*>(rows.data) + m0 * stride : values;
    a.bfloats = bfloats;
    if (direct) return;
    parallel_items(a.M, K, [&](int64_t begin, int64_t end) {
      if (as_bf16) {
        for (int64_t m = begin; m < end; ++m)
          load_bfloats(rows, weight.perm, m0 + m, bfloats + m * stride, stride);
      } else {
        isa.load_rows(source, m0 + begin, m0 + end, values + begin * stride, stride);
      }
    });
  });
}

Tensor gemm(const Tensor& x, const Tensor& w, const OptionalTensor& bias, int64_t N, int64_t K,
            int64_t desc, int64_t flags) {
  const char* op = "lowbit::gemm";
  const Rows rows = rows_of(op, "x", x, cpu_place());
  const Element element = float_element(op, "x", x);
  LOWBIT_CHECK(N >= 1, op, ": N=", N, " is not positive");
  Tensor out = empty_on(cpu_place(), with_last(x, N), x.scalar_type());
  gemm_into(op, x, w, bias, N, K, desc, flags, rows, element, out.mutable_data_ptr(), {});
  return out;
}

void gemm_out(const Tensor& x, const Tensor& w, const OptionalTensor& bias, int64_t N, int64_t K,
              int64_t desc, int64_t flags, const Tensor& out, const OptionalTensor& workspace) {
  const char* op = "lowbit::gemm_out";
  const Rows rows = rows_of(op, "x", x, cpu_place());
  const Element element = float_element(op, "x", x);
  check_out(op, out, cpu_place(), x, N);
  check_dtype(op, "out", out, x.scalar_type());
  gemm_into(op, x, w, bias, N, K, desc, flags, rows, element, out.mutable_data_ptr(), workspace);
}

// ---- gemm_a8 -------------------------------------------------------------------------------------------------------

// (xq - zero) * scale as fp32, gathered and padded: for the kernels that multiply floats.
void load_dequantized(const QuantizedRows& q, const int32_t* perm, int64_t m, float* to,
                      int64_t stride) {
  const int64_t K = q.rows.K;
  const uint8_t* row = q.rows.data + m * q.rows.stride;
  const float* scales = q.scales + m * q.groups;
  const float* table = fp8_e4m3_code().data();
  const float zero = q.zeros == nullptr ? 0.0f : static_cast<float>(q.zeros[m]);
  for (int64_t j = 0; j < K; ++j) {
    const int64_t k = perm == nullptr ? j : perm[j];
    const float value = q.element == Element::kInt8
                            ? static_cast<float>(static_cast<int8_t>(row[k])) - zero
                            : table[row[k]];
    to[j] = value * scales[q.groups == 1 ? 0 : k / 128];
  }
  std::fill(to + K, to + stride, 0.0f);
}

// int8 codes, gathered and padded, and their sums per segment of K.
void load_codes(const QuantizedRows& q, const PackedWeight& weight, const Activations& shape,
                int64_t m, int8_t* to, int32_t* sums) {
  const int64_t K = q.rows.K;
  const int8_t* row = reinterpret_cast<const int8_t*>(q.rows.data) + m * q.rows.stride;
  if (weight.perm == nullptr) {
    std::copy_n(row, K, to);
  } else {
    for (int64_t j = 0; j < K; ++j) to[j] = row[weight.perm[j]];
  }
  std::fill(to + K, to + shape.stride, int8_t{0});
  for (int64_t g = 0; g < weight.view.groups; ++g) {
    const int64_t group_end = std::min((g + 1) * weight.view.group_size, K);
    for (int64_t s = 0; s < shape.segments_per_group; ++s) {
      const int64_t begin = std::min(g * weight.view.group_size + s * shape.segment, group_end);
      const int64_t end = std::min(begin + shape.segment, group_end);
      int32_t sum = 0;
      for (int64_t k = begin; k < end; ++k) sum += to[k];
      sums[g * shape.segments_per_group + s] = sum;
    }
  }
}

// Codes stay integers.
void multiply_codes(const Chosen& chosen, const IsaKernels& isa, GemmJob& job,
                    const PackedWeight& weight, const QuantizedRows& q, Scratch& scratch) {
  const CpuTile16& tile = weight.tile;
  const bool as_tiles = chosen.row.x == XForm::kCodeTiles;
  const int64_t stride = job.x.stride, pass = std::min(q.rows.M, pass_rows(as_tiles, 1));
  const int64_t segments = weight.view.groups * job.x.segments_per_group;
  int8_t* codes = scratch.take<int8_t>(pass * stride);
  int32_t* sums = scratch.take<int32_t>(pass * segments);
  const int64_t tile_bytes = code_tile_bytes(tile);
  uint8_t* tiles = as_tiles ? scratch.take<uint8_t>(div_up(pass, 16) * tile_bytes) : nullptr;
  job.x.codes = codes;
  job.x.sums = sums;
  job.x.tiles = tiles;
  job.x.tile_planes = 1;
  run_gemm(chosen, isa, job, q.rows.M, pass, [&](int64_t m0, Activations& a) {
    a.scales = q.scales + m0;
    a.zeros = q.zeros == nullptr ? nullptr : q.zeros + m0;
    parallel_items(a.M, stride, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m)
        load_codes(q, weight, a, m0 + m, codes + m * stride, sums + m * segments);
    });
    if (!as_tiles) return;
    parallel_items(div_up(a.M, 16), 16 * stride, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        isa.amx->pack_codes(job.w, a, 16 * i, std::min<int64_t>(16, a.M - 16 * i),
                            tiles + i * tile_bytes);
    });
  });
}

// (xq - zero) * scale in fp32, for kernels that multiply floats.
void multiply_dequantized(const Chosen& chosen, const IsaKernels& isa, GemmJob& job,
                          const PackedWeight& weight, const QuantizedRows& q, Scratch& scratch) {
  const CpuTile16& tile = weight.tile;
  const bool as_tiles = chosen.row.x == XForm::kTiles;
  job.x.tile_planes = tile_planes(Element::kFloat32);
  const int64_t stride = job.x.stride;
  const int64_t pass = std::min(q.rows.M, pass_rows(as_tiles, job.x.tile_planes));
  float* values = scratch.take<float>(pass * stride);
  uint8_t* tiles =
      as_tiles ? scratch.take<uint8_t>(div_up(pass, 16) * float_tile_bytes(job.x.tile_planes, tile))
               : nullptr;
  job.x.values = values;
  run_gemm(chosen, isa, job, q.rows.M, pass, [&](int64_t m0, Activations& a) {
    parallel_items(a.M, stride, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m)
        load_dequantized(q, weight.perm, m0 + m, values + m * stride, stride);
    });
    const RowSource source{values, Element::kFloat32, stride, stride, nullptr, nullptr};
    if (as_tiles) pack_tiles(isa, source, 0, tile, tiles, a);
  });
}

void gemm_a8_into(const char* op, const Tensor& xq, const Tensor& x_scales,
                  const OptionalTensor& x_zeros, const Tensor& w, const OptionalTensor& bias,
                  int64_t N, int64_t K, int64_t desc, int64_t flags, Element out_element, void* out,
                  const OptionalTensor& workspace) {
  const PackedWeight weight(op, w, N, K, desc);
  const QuantizedRows q = check_quantized(op, xq, x_scales, x_zeros, cpu_place(), K);
  check_bias(op, bias, cpu_place(), N);
  check_flags(op, flags);
  const int64_t M = q.rows.M;
  if (M == 0) return;
  const IsaKernels& isa = kernels();
  const Chosen chosen =
      choose(op, {Op::kGemmA8, M, N, K, weight.desc, q.element, q.groups != 1, flags}, weight, isa);
  const KernelRow& row = chosen.row;
  Scratch scratch(scratch_for(row, M, q.element, weight.tile), workspace, op);
  GemmJob job{weight.view, {}, {out, N, out_element, prepare_bias(op, isa, bias, N, scratch)}};
  job.x.stride = weight.tile.K_padded;
  job.x.segment = int32_segment(weight.tile);
  job.x.segments_per_group = div_up(weight.view.group_size, job.x.segment);
  if (row.x == XForm::kCodes || row.x == XForm::kCodeTiles) {
    multiply_codes(chosen, isa, job, weight, q, scratch);
  } else {
    multiply_dequantized(chosen, isa, job, weight, q, scratch);
  }
}

Tensor gemm_a8(const Tensor& xq, const Tensor& x_scales, const OptionalTensor& x_zeros,
               const Tensor& w, const OptionalTensor& bias, int64_t N, int64_t K, int64_t desc,
               int64_t flags, ScalarType out_dtype) {
  const char* op = "lowbit::gemm_a8";
  const Element element = float_element(op, "out_dtype", out_dtype);
  LOWBIT_CHECK(N >= 1, op, ": N=", N, " is not positive");
  LOWBIT_CHECK(xq.dim() >= 1, op, ": xq is a scalar, expected shape [..., K]");
  Tensor out = empty_on(cpu_place(), with_last(xq, N), out_dtype);
  gemm_a8_into(op, xq, x_scales, x_zeros, w, bias, N, K, desc, flags, element,
               out.mutable_data_ptr(), {});
  return out;
}

void gemm_a8_out(const Tensor& xq, const Tensor& x_scales, const OptionalTensor& x_zeros,
                 const Tensor& w, const OptionalTensor& bias, int64_t N, int64_t K, int64_t desc,
                 int64_t flags, const Tensor& out, const OptionalTensor& workspace) {
  const char* op = "lowbit::gemm_a8_out";
  LOWBIT_CHECK(xq.dim() >= 1, op, ": xq is a scalar, expected shape [..., K]");
  check_out(op, out, cpu_place(), xq, N);
  gemm_a8_into(op, xq, x_scales, x_zeros, w, bias, N, K, desc, flags, float_element(op, "out", out),
               out.mutable_data_ptr(), workspace);
}

// ---- gemm_grad_input -----------------------------------------------------------------------------------------------

// fp32 sums in packed column order -> dx in dy's dtype, columns scattered back by perm.
void store_grad(const IsaKernels& isa, const float* from, int64_t K, const int32_t* perm,
                Element dtype, uint8_t* to, float* original) {
  if (perm != nullptr) {
    for (int64_t k = 0; k < K; ++k) original[perm[k]] = from[k];
    from = original;
  }
  isa.store_row(from, K, dtype, to);
}

Tensor gemm_grad_input(const Tensor& dy, const Tensor& w, int64_t N, int64_t K, int64_t desc,
                       int64_t flags) {
  const char* op = "lowbit::gemm_grad_input";
  const Rows rows = rows_of(op, "dy", dy, cpu_place());
  const Element element = float_element(op, "dy", dy);
  const PackedWeight weight(op, w, N, K, desc);
  check_columns(op, "dy", dy, rows.K, "N", N);
  check_flags(op, flags);
  Tensor dx = empty_on(cpu_place(), with_last(dy, K), dy.scalar_type());
  if (rows.M == 0) return dx;
  const IsaKernels& isa = kernels();
  const KernelRow& row =
      choose(op, {Op::kGradInput, rows.M, N, K, weight.desc, element, false, flags}, weight, isa)
          .row;
  const CpuTile16& tile = weight.tile;
  const int64_t N_padded = tile.strips * kTileRows, chunk = std::min<int64_t>(rows.M, kMaxRows);
  Scratch scratch(scratch_bytes(chunk * N_padded, 4) + 2 * scratch_bytes(chunk * tile.K_padded, 4),
                  {}, op);
  float* dy_rows = scratch.take<float>(chunk * N_padded);
  float* sums = scratch.take<float>(chunk * tile.K_padded);
  float* original = scratch.take<float>(chunk * tile.K_padded);
  const RowSource source{rows.data, element, rows.stride, N, nullptr, nullptr};
  const int64_t element_size = element == Element::kFloat32 ? 4 : 2;
  uint8_t* out = data_of<uint8_t>(dx);
  for (int64_t m0 = 0; m0 < rows.M; m0 += kMaxRows) {
    const int64_t count = std::min<int64_t>(kMaxRows, rows.M - m0);
    parallel_items(count, N, [&](int64_t begin, int64_t end) {
      isa.load_rows(source, m0 + begin, m0 + end, dy_rows + begin * N_padded, N_padded);
    });
    const GradJob job{weight.view, count, dy_rows, sums};
    parallel_items(div_up(tile.K_padded, kGradColumns), count * N_padded * kGradColumns,
                   [&](int64_t begin, int64_t end) { row.grad(isa, job, begin, end); });
    parallel_items(count, K, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) {
        store_grad(isa, sums + m * tile.K_padded, K, weight.perm, element,
                   out + (m0 + m) * K * element_size, original + m * tile.K_padded);
      }
    });
  }
  return dx;
}

}  // namespace

LOWBIT_IMPL(CPU, m) {
  m.impl("gemm", TORCH_BOX(&gemm));
  m.impl("gemm_out", TORCH_BOX(&gemm_out));
  m.impl("linear", TORCH_BOX(&gemm));
  m.impl("gemm_grad_input", TORCH_BOX(&gemm_grad_input));
  m.impl("gemm_a8", TORCH_BOX(&gemm_a8));
  m.impl("gemm_a8_out", TORCH_BOX(&gemm_a8_out));
}

}  // namespace lowbit
