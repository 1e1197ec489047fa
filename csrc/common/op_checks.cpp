#include "common/op_checks.h"

namespace lowbit {

void check_flags(const char* op, int64_t flags) {
  LOWBIT_CHECK((flags & ~int64_t{kBatchInvariant}) == 0, op, ": flags=", flags,
               " has unknown bits; known: batch_invariant=1");
}

void check_bias(const char* op, const OptionalTensor& bias, const Place& place, int64_t N) {
  if (!bias.has_value()) return;
  float_element(op, "bias", *bias);
  check_plain(op, "bias", *bias, place, bias->scalar_type(), {N});
}

void check_columns(const char* op, const char* name, const Tensor& tensor, int64_t found,
                   const char* letter, int64_t expected) {
  LOWBIT_CHECK(found == expected, op, ": ", name, " of shape ", shape_string(tensor), " has ",
               letter, "=", found, " in its last dimension, the weight has ", letter, "=",
               expected);
}

void check_out(const char* op, const Tensor& out, const Place& place, const Tensor& x,
               int64_t columns) {
  float_element(op, "out", out);
  check_plain(op, "out", out, place, out.scalar_type(), with_last(x, columns));
}

QuantizedRows check_quantized(const char* op, const Tensor& xq, const Tensor& x_scales,
                              const OptionalTensor& x_zeros, const Place& place, int64_t K) {
  QuantizedRows q{rows_of(op, "xq", xq, place), Element::kInt8, nullptr, 1, nullptr};
  const ScalarType dtype = xq.scalar_type();
  LOWBIT_CHECK(dtype == ScalarType::Char || dtype == ScalarType::Float8_e4m3fn, op, ": xq is ",
               dtype_name(dtype), ", expected int8 or float8_e4m3fn");
  if (dtype == ScalarType::Float8_e4m3fn) q.element = Element::kFp8E4m3;
  check_columns(op, "xq", xq, q.rows.K, "K", K);
  LOWBIT_CHECK(x_scales.dim() >= 1, op,
               ": x_scales is a scalar, expected shape [..., 1] or [..., ceil(K / 128)]");
  q.groups = x_scales.size(x_scales.dim() - 1);
  LOWBIT_CHECK(q.groups == 1 || q.groups == div_up(K, 128), op, ": x_scales of shape ",
               shape_string(x_scales), " has neither one scale per row nor one per 128 of K=", K,
               " in its last dimension");
  check_plain(op, "x_scales", x_scales, place, ScalarType::Float, with_last(xq, q.groups));
  q.scales = const_data_of<float>(x_scales);
  if (x_zeros.has_value()) {
    LOWBIT_CHECK(q.element == Element::kInt8, op, ": x_zeros are given with ", dtype_name(dtype),
                 " activations, which have none");
    check_plain(op, "x_zeros", *x_zeros, place, ScalarType::Int, with_last(xq, 1));
    q.zeros = const_data_of<int32_t>(*x_zeros);
  }
  return q;
}

namespace {

// One of the tensors beside the codes: there exactly where desc says so.
const uint8_t* check_table(const char* op, const OptionalTensor& tensor, const Desc& desc,
                           const CanonicalShape& shape, int table, const Place& place) {
  static const char* const names[] = {"scales", "zeros", "super_scales", "super_zeros"};
  const bool wanted = shape.tables[table].present();
  if (tensor.has_value() != wanted) {
    const char* given = tensor.has_value() ? "given" : "absent";
    LOWBIT_CHECK(table != kZeroTable, op, ": zeros are ", given,
                 ", but desc says zeros=", name_of(desc.zero_kind));
    fail(op, ": ", names[table], " are ", given, ", but desc says scaling=", name_of(desc.scaling),
         " super_groups=", desc.super_groups, " scales=", name_of(desc.scale_dtype));
  }
  if (!wanted) return nullptr;
  check_plain(op, names[table], *tensor, place, table_scalar_type(desc, table),
              table_shape(shape.tables[table]));
  return const_data_of<uint8_t>(*tensor);
}

}  // namespace

CanonicalTensors::CanonicalTensors(const char* op, const Tensor& packed, const Tensor& scales,
                                   const OptionalTensor& zeros, const OptionalTensor& perm,
                                   const OptionalTensor& super_scales,
                                   const OptionalTensor& super_zeros, const Place& place,
                                   Values values, int64_t N, int64_t K, int64_t desc_bits)
    : desc(decode_desc(desc_bits)), shape(canonical_shape(N, K, desc)), data{} {
  check_plain(op, "packed", packed, place, ScalarType::Byte, {N, shape.row_bytes});
  const OptionalTensor tables[] = {scales, zeros, super_scales, super_zeros};
  for (int i = 0; i < kTableCount; ++i)
    data.tables[i] = check_table(op, tables[i], desc, shape, i, place);
  LOWBIT_CHECK(perm.has_value() == desc.has_perm, op, ": perm is ",
               perm.has_value() ? "given" : "absent", ", but desc says it is ",
               desc.has_perm ? "there" : "not");
  data.packed = const_data_of<uint8_t>(packed);
  if (!perm.has_value()) return;
  check_plain(op, "perm", *perm, place, ScalarType::Int, {K});
  data.perm = const_data_of<int32_t>(*perm);
  if (values == Values::kTrusted) return;
  // An index outside K would read or write out of bounds later, so this value is checked on every pack: it is cheap.
  for (int64_t k = 0; k < K; ++k)
    LOWBIT_CHECK(data.perm[k] >= 0 && data.perm[k] < K, op, ": perm[", k, "]=", data.perm[k],
                 " is outside 0..", K - 1);
}

QuantizeCall check_quantize(const char* op, const Tensor& weight, const Place& place,
                            int64_t desc_bits, const OptionalTensor& importance,
                            const OptionalTensor& super_scales) {
  LOWBIT_CHECK(weight.dim() == 2, op, ": weight has shape ", shape_string(weight),
               ", expected [N, K]");
  QuantizeCall call{rows_of(op, "weight", weight, place), float_element(op, "weight", weight),
                    decode_desc(desc_bits), CanonicalShape{}, false};
  const Desc& desc = call.desc;
  LOWBIT_CHECK(!desc.has_perm, op,
               ": desc has a perm; quantize the permuted weight and give the perm to pack");
  call.shape = canonical_shape(call.rows.M, call.rows.K, desc);
  if (importance.has_value())
    check_plain(op, "importance", *importance, place, ScalarType::Float, {call.rows.K});
  LOWBIT_CHECK(desc.scaling != Scaling::kFlat && !scale_info(desc.scale_dtype).needs_super &&
                   (!desc.two_levels() || desc.super_groups == -1),
               op, ": ", to_string(desc),
               " is read from checkpoints and not made: there is no quantizer for its scales");
  LOWBIT_CHECK(super_scales.has_value() == desc.two_levels(), op, ": super_scales are ",
               super_scales.has_value() ? "given" : "absent",
               ", but desc says super_groups=", desc.super_groups);
  call.has_super = desc.two_levels();
  if (!call.has_super) return call;
  LOWBIT_CHECK(desc.super_dtype == ScaleDtype::kFloat32, op, ": super scales of dtype ",
               name_of(desc.super_dtype), " are read and not made; float32 ones are");
  check_plain(op, "super_scales", *super_scales, place, ScalarType::Float,
              table_shape(call.shape.tables[kSuperTable]));
  return call;
}

namespace {

void check_static(const char* op, ActivationCall& call, const OptionalTensor& scale,
                  const OptionalTensor& zero, const Place& place, Values values) {
  if (scale.has_value()) {
    check_plain(op, "scale", *scale, place, ScalarType::Float, {1});
    call.static_scale = const_data_of<float>(*scale);
    LOWBIT_CHECK(values == Values::kTrusted || *call.static_scale > 0.0f, op,
                 ": static scale=", *call.static_scale, " is not positive");
  }
  if (zero.has_value()) {
    check_plain(op, "zero", *zero, place, ScalarType::Int, {1});
    call.static_zero = const_data_of<int32_t>(*zero);
    LOWBIT_CHECK(
        values == Values::kTrusted || (*call.static_zero >= -128 && *call.static_zero <= 127), op,
        ": static zero=", *call.static_zero, " is outside -128..127");
  }
}

}  // namespace

ActivationCall check_activation(const char* op, const Tensor& x, const Place& place, Values values,
                                int64_t format_id, int64_t group_size, const OptionalTensor& scale,
                                const OptionalTensor& zero, const OptionalTensor& pre_scale,
                                bool symmetric) {
  const auto format = static_cast<Format>(format_id);
  LOWBIT_CHECK(format == Format::kInt8 || format == Format::kFp8E4m3, op, ": format=", format_id,
               " is not an activation format; expected int8 (6) or fp8_e4m3 (7)");
  const bool is_int8 = format == Format::kInt8;
  ActivationCall call{rows_of(op, "x", x, place)};
  call.has_zeros = is_int8 && !symmetric;
  call.K = call.rows.K;
  LOWBIT_CHECK(call.K >= 1, op, ": x of shape ", shape_string(x), " has K=0");
  LOWBIT_CHECK(group_size == -1 || (group_size >= 8 && group_size % 8 == 0), op,
               ": group_size=", group_size, " is neither -1 nor a positive multiple of 8");
  LOWBIT_CHECK(!is_int8 || group_size == -1, op, ": group_size=", group_size,
               " with int8, which has one scale per token (-1)");
  LOWBIT_CHECK(is_int8 || symmetric, op, ": fp8 has no zeros, got symmetric=False");
  LOWBIT_CHECK(!zero.has_value() || (call.has_zeros && scale.has_value()), op,
               ": zero is given, but it needs a static scale, int8 and symmetric=False");
  LOWBIT_CHECK(!scale.has_value() || !call.has_zeros || zero.has_value(), op,
               ": a static scale with symmetric=False needs a static zero");
  check_static(op, call, scale, zero, place, values);
  call.x = float_element(op, "x", x);
  if (pre_scale.has_value()) {
    check_plain(op, "pre_scale", *pre_scale, place, ScalarType::Float, {call.K});
    call.pre_scale = const_data_of<float>(*pre_scale);
  }
  call.group_size = group_size == -1 ? call.K : group_size;
  call.groups = div_up(call.K, call.group_size);
  call.format = is_int8 ? Element::kInt8 : Element::kFp8E4m3;
  call.symmetric = symmetric;
  return call;
}

void check_activation_out(const char* op, const ActivationCall& call, const Tensor& x,
                          const Place& place, const Tensor& xq, const Tensor& x_scales,
                          const OptionalTensor& x_zeros) {
  check_plain(op, "xq", xq, place, call.code_type(), with_last(x, call.K));
  check_plain(op, "x_scales", x_scales, place, ScalarType::Float, with_last(x, call.groups));
  LOWBIT_CHECK(x_zeros.has_value() == call.has_zeros, op, ": x_zeros is ",
               x_zeros.has_value() ? "given" : "absent", ", but the format ",
               call.has_zeros ? "has" : "has no", " zeros");
  if (x_zeros.has_value())
    check_plain(op, "x_zeros", *x_zeros, place, ScalarType::Int, with_last(x, 1));
}

}  // namespace lowbit
