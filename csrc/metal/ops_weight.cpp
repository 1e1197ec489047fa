// quantize, dequantize, pack and unpack on Metal.

#include <algorithm>
#include <cstring>

#include "formats/format_table.h"
#include "metal/tensor.h"

namespace lowbit::metal {
namespace {

namespace mp = metal_params;

constexpr int kThreads = 256;

uint32_t groups_of(int64_t items) { return static_cast<uint32_t>(div_up(items, kThreads)); }

// ---- quantize ----------------------------------------------------------------------------------------------------------

// The kernel's index among its shader's: by zeros for integers, by format for the rest. Books, which come last, share one.
int encoder_of(const Desc& desc) {
  if (format_info(desc.format).is_integer) return static_cast<int>(desc.zero_kind);
  return static_cast<int>(std::min(desc.format, Format::kNf4)) -
         static_cast<int>(Format::kFp8E4m3) + 4;
}

// A SIMD-group per group of weights up to here, eight beyond.
constexpr int64_t kShortGroup = 1024;

mp::Quantize quantize_params(const char* op, const QuantizeCall& call, bool weighted) {
  const Desc& desc = call.desc;
  const CanonicalShape& s = call.shape;
  mp::Quantize p{};
  p.N = static_cast<int32_t>(s.N);
  p.K = static_cast<int32_t>(s.K);
  p.group_size = static_cast<int32_t>(s.group_size);
  p.groups = static_cast<int32_t>(s.groups);
  p.row_bytes = static_cast<int32_t>(s.row_bytes);
  p.stride = checked_int(op, "the stride of weight", call.rows.stride);
  p.kinds = mp::make_kinds(desc.scale_dtype, desc.zero_kind, call.element, Element::kFloat32,
                           Element::kFloat32, desc.format);
  if (weighted) p.kinds |= mp::kHasImportance;
  if (call.has_super) p.kinds |= mp::kHasSuper;
  std::memcpy(&p.code_max, &format_info(desc.format).max, 4);
  const int64_t tall = desc.scaling == Scaling::kBlock128 ? std::min<int64_t>(s.N, 128) : 1;
  if (desc.scaling == Scaling::kBlock128) p.kinds |= mp::kOneScale;
  p.threads = std::min(s.group_size, s.K) * tall < kShortGroup ? 32 : 256;
  return p;
}

// Weights per command. macOS stops a GPU that does not answer for long, so a command is meant to take a tenth of a second.
#if defined(LOWBIT_EMULATOR)
constexpr int64_t kMostNearest = 1 << 12, kMostSearched = 1 << 12;  // so that tests need several
#else
constexpr int64_t kMostNearest = 1 << 26, kMostSearched = 1 << 22;
#endif

// Until what has been started is done: torch hands commands to the GPU when somebody wants to see a result.
void wait_for(const Place& place) {
  Tensor there = empty_on(place, {1}, ScalarType::Byte);
  Tensor here = empty_on(cpu_place(), {1}, ScalarType::Byte);
  torch::stable::copy_(here, there);
}

std::tuple<Tensor, Tensor, Tensor> quantize(const Tensor& weight, int64_t desc_bits, bool search,
                                            const OptionalTensor& importance,
                                            const OptionalTensor& super_scales) {
  const char* op = "lowbit::quantize";
  const Place place = place_of(weight, "weight");
  check_mps(op, place);
  const QuantizeCall call = check_quantize(op, weight, place, desc_bits, importance, super_scales);
  const Desc& desc = call.desc;
  const CanonicalShape& s = call.shape;
  Tensor packed = empty_on(place, {s.N, s.row_bytes}, ScalarType::Byte);
  Tensor scales = empty_table(place, s, desc, kScaleTable);
  Tensor zeros = empty_table(place, s, desc, kZeroTable);
  mp::Quantize p = quantize_params(op, call, importance.has_value());
  const int64_t tall = desc.scaling == Scaling::kBlock128 ? 128 : 1, rows = div_up(s.N, tall);
  const int64_t most = search ? kMostSearched : kMostNearest;
  const int64_t step = std::max<int64_t>(1, most / (s.K * tall));
  const Shader shader = search ? Shader::kQuantizeSearch : Shader::kQuantize;
  for (int64_t first = 0; first < rows; first += step) {
    if (first > 0) wait_for(place);
    p.first = static_cast<uint32_t>(first);
    Command(op, {{shader, Format(0), false, Element::kFloat32}, encoder_of(desc)})
        .params(p)
        .tensor(call.rows.keep)
        .tensor(importance, scales)
        .tensor(super_scales, scales)
        .tensor(packed)
        .tensor(scales)
        .tensor(s.zero_bytes == 0 ? scales : zeros)
        .run(static_cast<uint32_t>(s.groups), static_cast<uint32_t>(std::min(step, rows - first)),
             p.threads);
  }
  return {packed, scales, zeros};
}

// ---- dequantize --------------------------------------------------------------------------------------------------------

// Canonical tensors as the shaders take them; absent ones are `packed`.
struct Canonical {
  CanonicalTensors checked;
  mp::Canonical params;
  const Tensor& packed;
  const Tensor* tables[kTableCount];
  const Tensor& perm;

  Canonical(const char* op, const Tensor& packed_codes, const Tensor& scales,
            const OptionalTensor& zeros, const OptionalTensor& order,
            const OptionalTensor& super_scales, const OptionalTensor& super_zeros,
            const Place& place, int64_t N, int64_t K, int64_t desc)
      : checked(op, packed_codes, scales, zeros, order, super_scales, super_zeros, place,
                Values::kTrusted, N, K, desc),
        params(canonical_params(checked.desc, checked.shape)),
        packed(packed_codes),
        tables{&scales, &or_packed(zeros), &or_packed(super_scales), &or_packed(super_zeros)},
        perm(or_packed(order)) {
    if (order.has_value()) params.kinds |= mp::kHasPerm;
  }

 private:
  const Tensor& or_packed(const OptionalTensor& tensor) const {
    return tensor.has_value() ? *tensor : packed;
  }
};

void dequantize_into(const char* op, const Canonical& c, Element element, const Tensor& out) {
  mp::Canonical p = c.params;
  const bool vectors = (p.kinds & mp::kHasPerm) == 0 && p.K % 8 == 0 && starts_at(out, 16);
  if (vectors) p.kinds |= mp::kVectors;
  Command(op, {{Shader::kDequantize, Format(0), true, element}, 0})
      .params(p)
      .tensor(c.packed)
      .tensor(*c.tables[kScaleTable])
      .tensor(*c.tables[kZeroTable])
      .tensor(*c.tables[kSuperTable])
      .tensor(*c.tables[kSuperZeroTable])
      .tensor(c.perm)
      .tensor(out)
      .run(groups_of(div_up(p.K, 8)), static_cast<uint32_t>(p.N), kThreads);
}

Tensor dequantize(const Tensor& packed, const Tensor& scales, const OptionalTensor& zeros,
                  const OptionalTensor& perm, int64_t N, int64_t K, int64_t desc,
                  ScalarType out_dtype, const OptionalTensor& super_scales,
                  const OptionalTensor& super_zeros) {
  const char* op = "lowbit::dequantize";
  const Place place = place_of(packed, "packed");
  check_mps(op, place);
  const Canonical c(op, packed, scales, zeros, perm, super_scales, super_zeros, place, N, K, desc);
  const Element element = float_element(op, "out_dtype", out_dtype);
  Tensor out = empty_on(place, {N, K}, out_dtype);
  dequantize_into(op, c, element, out);
  return out;
}

void dequantize_out(const Tensor& packed, const Tensor& scales, const OptionalTensor& zeros,
                    const OptionalTensor& perm, int64_t N, int64_t K, int64_t desc,
                    const Tensor& out, const OptionalTensor& super_scales,
                    const OptionalTensor& super_zeros) {
  const char* op = "lowbit::dequantize_out";
  const Place place = place_of(packed, "packed");
  check_mps(op, place);
  const Canonical c(op, packed, scales, zeros, perm, super_scales, super_zeros, place, N, K, desc);
  const Element element = float_element(op, "out", out);
  check_plain(op, "out", out, place, out.scalar_type(), {N, K});
  dequantize_into(op, c, element, out);
}

// ---- pack, unpack ------------------------------------------------------------------------------------------------------

Command plain(const char* op, int index) {
  return Command(op, {{Shader::kPack, Format(0), false, Element::kFloat32}, index});
}
enum PackKernel { kPackCodes, kPackTable, kUnpackCodes, kUnpackTable, kClearEnds, kCopyInts };

void set_geometry(mp::Canonical& p, const MetalTile4& tile) {
  p.strip_bytes = static_cast<uint32_t>(tile.strip_bytes);
  p.high_plane = static_cast<uint32_t>(tile.planes.offset[1]);
}

mp::Table table_params(const MetalTile4& tile, int index) {
  const GroupTable& table = tile.shape.tables[index];
  mp::Table p{};
  p.N = static_cast<int32_t>(table.N);
  p.groups = static_cast<int32_t>(table.groups);
  p.rows = rows_of_table(table);
  p.bits = table.bits;
  p.bytes = table.bytes;
  p.count = static_cast<int32_t>(table.count);
  p.shift = table.shift;
  p.fine_shift = table.fine_shift;
  p.strip_bytes = static_cast<uint32_t>(tile.strip_bytes);
  p.offset = static_cast<uint32_t>(tile.table_offset[index]);
  return p;
}

void copy_perm(const char* op, const Tensor& from, int64_t from_offset, const Tensor& to,
               int64_t to_offset, int64_t K) {
  plain(op, kCopyInts)
      .word(K)
      .word(from_offset / 4)
      .word(to_offset / 4)
      .tensor(from)
      .tensor(to)
      .run(groups_of(K), 1, kThreads);
}

Tensor pack(const Tensor& packed, const Tensor& scales, const OptionalTensor& zeros,
            const OptionalTensor& perm, int64_t N, int64_t K, int64_t desc,
            const OptionalTensor& super_scales, const OptionalTensor& super_zeros) {
  const char* op = "lowbit::pack";
  const Place place = place_of(packed, "packed");
  check_mps(op, place);
  Canonical c(op, packed, scales, zeros, perm, super_scales, super_zeros, place, N, K, desc);
  LOWBIT_CHECK(c.checked.desc.layout == Layout::kMetalTile4, op, ": desc asks for layout ",
               name_of(c.checked.desc.layout), ", Metal packs ", name_of(Layout::kMetalTile4));
  const MetalTile4 tile = metal_tile4(N, K, c.checked.desc);
  set_geometry(c.params, tile);
  Tensor out = empty_on(place, {tile.total_bytes}, ScalarType::Byte);
  const auto strips = static_cast<uint32_t>(tile.strips);
  // Planes are padded to 16 bytes: up to three more chunks.
  plain(op, kPackCodes)
      .params(c.params)
      .tensor(packed)
      .tensor(out)
      .run(groups_of(tile.chunks + 3), strips, kThreads);
  plain(op, kClearEnds)
      .word(tile.planes.bytes)
      .word(tile.strip_bytes)
      .tensor(out)
      .run(groups_of((tile.strip_bytes - tile.planes.bytes) / 4), strips, kThreads);
  for (int i = 0; i < kTableCount; ++i) {
    if (!tile.shape.tables[i].present()) continue;
    plain(op, kPackTable)
        .params(table_params(tile, i))
        .tensor(*c.tables[i])
        .tensor(out)
        .run(groups_of(tile.shape.tables[i].fine_count), strips, kThreads);
  }
  if (perm.has_value()) copy_perm(op, *perm, 0, out, tile.perm_offset, K);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> unpack(const Tensor& w, int64_t N,
                                                                  int64_t K, int64_t desc_bits) {
  const char* op = "lowbit::unpack";
  const Place place = place_of(w, "w");
  check_mps(op, place);
  const Weight weight(op, w, place, N, K, desc_bits);
  const Desc& desc = weight.desc;
  const CanonicalShape s = canonical_shape(N, K, desc);
  mp::Canonical p = canonical_params(desc, s);
  set_geometry(p, weight.tile);
  Tensor packed = empty_on(place, {N, s.row_bytes}, ScalarType::Byte);
  const Tensor tables[] = {
      empty_table(place, s, desc, kScaleTable), empty_table(place, s, desc, kZeroTable),
      empty_table(place, s, desc, kSuperTable), empty_table(place, s, desc, kSuperZeroTable)};
  Tensor perm = empty_on(place, {s.has_perm ? K : 0}, ScalarType::Int);
  const auto rows = static_cast<uint32_t>(N);
  plain(op, kUnpackCodes)
      .params(p)
      .tensor(w)
      .tensor(packed)
      .run(groups_of(weight.tile.chunks), rows, kThreads);
  for (int i = 0; i < kTableCount; ++i) {
    const GroupTable& table = s.tables[i];
    if (!table.present()) continue;
    plain(op, kUnpackTable)
        .params(table_params(weight.tile, i))
        .tensor(w)
        .tensor(tables[i])
        .run(groups_of(table.bits < 8 ? div_up(table.count, 8) : table.fine_count), rows, kThreads);
  }
  if (s.has_perm) copy_perm(op, w, weight.tile.perm_offset, perm, 0, K);
  return {packed, tables[0], tables[1], perm, tables[2], tables[3]};
}

}  // namespace

LOWBIT_IMPL(LOWBIT_METAL_KEY, m) {
  m.impl("quantize", TORCH_BOX(&quantize));
  m.impl("dequantize", TORCH_BOX(&dequantize));
  m.impl("dequantize_out", TORCH_BOX(&dequantize_out));
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("unpack", TORCH_BOX(&unpack));
}

}  // namespace lowbit::metal
