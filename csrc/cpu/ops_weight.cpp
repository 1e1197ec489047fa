// quantize, dequantize, pack, unpack on the CPU.

#include <algorithm>
#include <vector>

#include "common/op_checks.h"
#include "cpu/isa.h"
#include "cpu/scratch.h"
#include "cpu/weight.h"
#include "cpu/weight_memory.h"
#include "formats/format_table.h"
#include "op_namespace.h"
#include "packing/cuda_tile64.h"
#include "packing/metal_tile4.h"

namespace lowbit {
namespace {

// ---- quantize ------------------------------------------------------------------------------------------------------

struct Quantizer {
  const IsaKernels& isa;
  CanonicalShape shape;
  RowSource weight;
  const float* importance;
  QuantizeJob job;  // what all groups share
  uint8_t *packed, *scales, *zeros;

  // Rows that share scales: one row, or a block row of 128.
  void rows(int64_t row_begin, int64_t row_end, int64_t scale_row) const {
    const int64_t count = row_end - row_begin, K = shape.K;
    std::vector<float> values(static_cast<size_t>(count * K));
    std::vector<uint8_t> codes(static_cast<size_t>(count * K));
    isa.load_rows(weight, row_begin, row_end, values.data(), K);
    for (int64_t g = 0; g < shape.groups; ++g) {
      const int64_t k0 = g * shape.group_size, k1 = std::min(k0 + shape.group_size, K);
      QuantizeJob one = job;
      one.scale = scales + (scale_row * shape.groups + g) * shape.scale_bytes;
      one.zero =
          zeros == nullptr ? nullptr : zeros + (scale_row * shape.groups + g) * shape.zero_bytes;
      if (count == 1) {
        one.values = values.data() + k0;
        one.importance = importance == nullptr ? nullptr : importance + k0;
        one.count = k1 - k0;
        one.codes = codes.data() + k0;
        isa.quantize_group(one);
      } else {
        block(one, values.data(), codes.data(), count, k0, k1);
      }
    }
    for (int64_t r = 0; r < count; ++r)
      pack_row(codes.data() + r * K, K, shape.bits, packed + (row_begin + r) * shape.row_bytes);
  }

  // A two-dimensional block as one group: gathered, quantized, scattered.
  void block(QuantizeJob& one, const float* values, uint8_t* codes, int64_t rows, int64_t k0,
             int64_t k1) const {
    const int64_t width = k1 - k0;
    std::vector<float> gathered(static_cast<size_t>(rows * width)), weights;
    std::vector<uint8_t> found(gathered.size());
    for (int64_t r = 0; r < rows; ++r)
      std::copy_n(values + r * shape.K + k0, width, gathered.data() + r * width);
    if (importance != nullptr) {
      for (int64_t r = 0; r < rows; ++r)
        weights.insert(weights.end(), importance + k0, importance + k1);
      one.importance = weights.data();
    }
    one.values = gathered.data();
    one.count = rows * width;
    one.codes = found.data();
    isa.quantize_group(one);
    for (int64_t r = 0; r < rows; ++r)
      std::copy_n(found.data() + r * width, width, codes + r * shape.K + k0);
  }
};

std::tuple<Tensor, Tensor, Tensor> quantize(const Tensor& weight, int64_t desc_bits, bool search,
                                            const OptionalTensor& importance,
                                            const OptionalTensor& super_scales) {
  const char* op = "lowbit::quantize";
  const QuantizeCall call =
      check_quantize(op, weight, cpu_place(), desc_bits, importance, super_scales);
  const Desc& desc = call.desc;
  const CanonicalShape& shape = call.shape;
  const FormatInfo& info = format_info(desc.format);
  Tensor packed = empty_on(cpu_place(), {shape.N, shape.row_bytes}, ScalarType::Byte);
  Tensor scales = empty_table(cpu_place(), shape, desc, kScaleTable);
  Tensor zeros = empty_table(cpu_place(), shape, desc, kZeroTable);

  Quantizer q{kernels(),
              shape,
              {call.rows.data, call.element, call.rows.stride, shape.K, nullptr, nullptr},
              nullptr,
              {},
              data_of<uint8_t>(packed),
              data_of<uint8_t>(scales),
              nullptr};
  if (importance.has_value()) q.importance = const_data_of<float>(*importance);
  if (desc.zero_kind != ZeroKind::kNone) q.zeros = data_of<uint8_t>(zeros);
  q.job.format = desc.format;
  q.job.zero_kind = desc.zero_kind;
  q.job.scale_dtype = desc.scale_dtype;
  q.job.super_scale = call.has_super ? *const_data_of<float>(*super_scales) : 1.0f;
  q.job.bits = info.bits;
  q.job.search = search;
  q.job.max = info.max;
  q.job.code = info.code;

  const int64_t tall = desc.scaling == Scaling::kBlock128 ? 128 : 1;  // rows that share scales
  parallel_items(div_up(shape.N, tall), tall * shape.K * (search ? 64 : 1),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t r = begin; r < end; ++r)
                     q.rows(r * tall, std::min((r + 1) * tall, shape.N), r);
                 });
  return {packed, scales, zeros};
}

// ---- dequantize ----------------------------------------------------------------------------------------------------

void dequantize_into(const CanonicalTensors& c, Element dtype, uint8_t* out) {
  const CanonicalShape& s = c.shape;
  const IsaKernels& isa = kernels();
  const int64_t element_size = dtype == Element::kFloat32 ? 4 : 2;
  const size_t K = static_cast<size_t>(s.K), groups = static_cast<size_t>(s.groups);
  parallel_items(s.N, s.K, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> codes(K), scratch(static_cast<size_t>(table_scratch_bytes(s)));
    std::vector<float> values(K), scales(groups), zeros(groups),
        original(c.data.perm != nullptr ? K : 0);
    const DequantizeJob job{codes.data(),
                            scales.data(),
                            zeros.data(),
                            s.K,
                            s.group_size,
                            c.desc.zero_kind == ZeroKind::kOffset,
                            format_info(c.desc.format).code,
                            values.data()};
    for (int64_t n = begin; n < end; ++n) {
      unpack_row(c.data.packed + n * s.row_bytes, s.K, s.bits, codes.data());
      row_scales(s, c.desc, c.data, n, scales.data(), zeros.data(), scratch.data());
      isa.dequantize_row(job);
      const float* row = values.data();
      if (c.data.perm != nullptr) {
        for (int64_t k = 0; k < s.K; ++k)
          original[static_cast<size_t>(c.data.perm[k])] = values[static_cast<size_t>(k)];
        row = original.data();
      }
      isa.store_row(row, s.K, dtype, out + n * s.K * element_size);
    }
  });
}

Tensor dequantize(const Tensor& packed, const Tensor& scales, const OptionalTensor& zeros,
                  const OptionalTensor& perm, int64_t N, int64_t K, int64_t desc,
                  ScalarType out_dtype, const OptionalTensor& super_scales,
                  const OptionalTensor& super_zeros) {
  const char* op = "lowbit::dequantize";
  const CanonicalTensors c(op, packed, scales, zeros, perm, super_scales, super_zeros, cpu_place(),
                           Values::kChecked, N, K, desc);
  const Element element = float_element(op, "out_dtype", out_dtype);
  Tensor out = empty_on(cpu_place(), {N, K}, out_dtype);
  dequantize_into(c, element, data_of<uint8_t>(out));
  return out;
}

void dequantize_out(const Tensor& packed, const Tensor& scales, const OptionalTensor& zeros,
                    const OptionalTensor& perm, int64_t N, int64_t K, int64_t desc,
                    const Tensor& out, const OptionalTensor& super_scales,
                    const OptionalTensor& super_zeros) {
  const char* op = "lowbit::dequantize_out";
  const CanonicalTensors c(op, packed, scales, zeros, perm, super_scales, super_zeros, cpu_place(),
                           Values::kChecked, N, K, desc);
  const Element element = float_element(op, "out", out);
  check_plain(op, "out", out, cpu_place(), out.scalar_type(), {N, K});
  dequantize_into(c, element, data_of<uint8_t>(out));
}

// ---- pack, unpack --------------------------------------------------------------------------------------------------

// A layout of strips: body(strip, scratch) for each. The CPU packs and unpacks every backend's layout, so that a weight whose
// device is out of reach (offloaded, or packed ahead of time) is never lost.
template <class Tile, class Body>
void for_each_strip(const Tile& tile, int rows, int64_t scratch_bytes, const Body& body) {
  parallel_items(tile.strips, tile.shape.K * rows, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> scratch(static_cast<size_t>(scratch_bytes));
    for (int64_t strip = begin; strip < end; ++strip) body(strip, scratch.data());
  });
}

// pack(strip, to, scratch)
template <class Tile, class Pack>
Tensor pack_strips(const CanonicalTensors& c, const Tile& tile, int rows, int64_t scratch_bytes,
                   const Pack& pack) {
  Tensor out = empty_weight(tile.total_bytes);
  uint8_t* to = data_of<uint8_t>(out);
  for_each_strip(tile, rows, scratch_bytes, [&](int64_t strip, uint8_t* scratch) {
    pack(strip, to + strip * tile.strip_bytes, scratch);
  });
  if (c.data.perm != nullptr)
    std::copy_n(reinterpret_cast<const uint8_t*>(c.data.perm), 4 * c.shape.K,
                to + tile.perm_offset);
  return out;
}

// unpack(from, strip, scratch)
template <class Tile, class Unpack>
void unpack_strips(const char* op, const Tensor& w, const Tile& tile, int rows,
                   int64_t scratch_bytes, const CanonicalMutable& to, const Unpack& unpack) {
  check_plain(op, "w", w, cpu_place(), ScalarType::Byte, {tile.total_bytes});
  const uint8_t* from = const_data_of<uint8_t>(w);
  for_each_strip(tile, rows, scratch_bytes, [&](int64_t strip, uint8_t* scratch) {
    unpack(from + strip * tile.strip_bytes, strip, scratch);
  });
  if (tile.shape.has_perm)
    std::copy_n(from + tile.perm_offset, 4 * tile.shape.K, reinterpret_cast<uint8_t*>(to.perm));
}

Tensor pack(const Tensor& packed, const Tensor& scales, const OptionalTensor& zeros,
            const OptionalTensor& perm, int64_t N, int64_t K, int64_t desc,
            const OptionalTensor& super_scales, const OptionalTensor& super_zeros) {
  const char* op = "lowbit::pack";
  const CanonicalTensors c(op, packed, scales, zeros, perm, super_scales, super_zeros, cpu_place(),
                           Values::kChecked, N, K, desc);
  if (c.desc.layout == Layout::kCpuTile16) {
    const CpuTile16 tile = cpu_tile16(N, K, c.desc);
    return pack_strips(c, tile, kTileRows, pack_scratch_bytes(tile),
                       [&](int64_t strip, uint8_t* to, uint8_t* scratch) {
                         pack_strip(tile, c.data, strip, to, scratch);
                       });
  }
  if (c.desc.layout == Layout::kCudaTile64) {
    const CudaTile64 tile = cuda_tile64(N, K, c.desc);
    return pack_strips(c, tile, kStripRows, 0, [&](int64_t strip, uint8_t* to, uint8_t*) {
      pack_strip64(tile, c.data, strip, to);
    });
  }
  LOWBIT_CHECK(c.desc.layout == Layout::kMetalTile4, op, ": desc asks for layout ",
               name_of(c.desc.layout), ", which is not a kernel layout");
  const MetalTile4 tile = metal_tile4(N, K, c.desc);
  return pack_strips(c, tile, kMetalRows, 0, [&](int64_t strip, uint8_t* to, uint8_t*) {
    pack_strip4(tile, c.data, strip, to);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> unpack(const Tensor& w, int64_t N,
                                                                  int64_t K, int64_t desc_bits) {
  const char* op = "lowbit::unpack";
  const Desc desc = decode_desc(desc_bits);
  const CanonicalShape s = canonical_shape(N, K, desc);
  const Place cpu = cpu_place();
  const Tensor packed = empty_on(cpu, {N, s.row_bytes}, ScalarType::Byte);
  const Tensor perm = empty_on(cpu, {s.has_perm ? K : 0}, ScalarType::Int);
  const Tensor tables[] = {
      empty_table(cpu, s, desc, kScaleTable), empty_table(cpu, s, desc, kZeroTable),
      empty_table(cpu, s, desc, kSuperTable), empty_table(cpu, s, desc, kSuperZeroTable)};
  CanonicalMutable to{data_of<uint8_t>(packed), {}, data_of<int32_t>(perm)};
  for (int i = 0; i < kTableCount; ++i) to.tables[i] = data_of<uint8_t>(tables[i]);
  if (desc.layout == Layout::kCudaTile64) {
    const CudaTile64 tile = cuda_tile64(N, K, desc);
    unpack_strips(op, w, tile, kStripRows, 0, to,
                  [&](const uint8_t* from, int64_t strip, uint8_t*) {
                    unpack_strip64(tile, from, strip, to);
                  });
  } else if (desc.layout == Layout::kMetalTile4) {
    const MetalTile4 tile = metal_tile4(N, K, desc);
    unpack_strips(op, w, tile, kMetalRows, 0, to,
                  [&](const uint8_t* from, int64_t strip, uint8_t*) {
                    unpack_strip4(tile, from, strip, to);
                  });
  } else {
    const PackedWeight weight(op, w, N, K, desc_bits);  // refuses what is no kernel layout
    const CpuTile16& tile = weight.tile;
    unpack_strips(op, w, tile, kTileRows, pack_scratch_bytes(tile), to,
                  [&](const uint8_t* from, int64_t strip, uint8_t* scratch) {
                    unpack_strip(tile, from, strip, to, scratch);
                  });
  }
  return {packed, tables[0], tables[1], perm, tables[2], tables[3]};
}

}  // namespace

LOWBIT_IMPL(CPU, m) {
  m.impl("quantize", TORCH_BOX(&quantize));
  m.impl("dequantize", TORCH_BOX(&dequantize));
  m.impl("dequantize_out", TORCH_BOX(&dequantize_out));
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("unpack", TORCH_BOX(&unpack));
}

}  // namespace lowbit
