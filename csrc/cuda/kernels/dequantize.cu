// Canonical tensors -> W[N, K], to the bits of the CPU: fp32 operations in the order of the formula, one rounding at the end.
//
// Bound by memory: eight int4 weights are 4 bytes read and 16 written. A unit is eight codes, `bits` whole bytes and (in
// 16 bits) one 16-byte store; neighbouring lanes take neighbouring units, so a warp writes 512 bytes in one go and reads
// 32 * bits. Each thread starts the loads of four units before it needs the first: 2048 threads per SM keep 32 KB of
// int4 codes in flight, what it takes to hide 600 ns at 40 GB/s per SM.
//
// Arithmetic comes close to the memory's speed, so it is kept to seven instructions per weight: codes become floats
// by writing them into the mantissa of 2^23 (exact), and every zero kind is the same four operations,
//
//   w = ((2^23 + q) - start - zero) * scale + offset
//
// with start = 2^23, or 2^23 + z where z is an integer (exact either way), zero = 0 where there is none, and offset = -0
// where there is none: adding -0 changes no number, adding +0 would turn -0 around.
#include <algorithm>

#include "common/check.h"
#include "cuda/code_values.cuh"
#include "cuda/elements.cuh"
#include "cuda/launch.cuh"
#include "cuda/launchers.h"
#include "formats/format_table.h"

namespace lowbit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kUnits = 4;  // in flight per thread
constexpr float kTwo23 = 8388608.0f;

struct DequantizeParams {
  CanonicalParams from;
  void* to;
  Element type;
  Divisor units_per_row;
  Divisor units_per_group;  // only its quotient; one group: larger than any unit
  int64_t packed_bytes;
  bool aligned;  // units of the codes are whole, and start where kLoadBytes wants them
  bool vectors;  // rows of the output start on 16-byte boundaries
  int64_t
      staged;  // with perm: bytes of the row in shared memory, 0 = written where it belongs directly
  float levels[16];
};

// ---- codes -> exact floats ---------------------------------------------------------------------------------------------

// 2^23 + q for integers; the code's value for code books.
template <Format kFormat>
__device__ float base_value(uint32_t q, const float* levels) {
  if constexpr (is_integer(kFormat)) {
    return ptx::bits_as_float(0x4b000000u | q);
  } else if constexpr (kFormat == Format::kFp8E4m3) {
    return fp8_e4m3_value(q);
  } else if constexpr (kFormat == Format::kFp8E5m2) {
    return fp8_e5m2_value(q);
  } else if constexpr (kFormat == Format::kFp4E2m1) {
    return fp4_e2m1_value(q);
  } else {
    return levels[q];  // 16 entries in 16 banks: lanes that differ do not collide
  }
}

// What turns a base value into the weight.
struct Formula {
  float start, zero, scale, offset;
};

// A unit as it is loaded. Nothing is done with the bits until all of a thread's loads have started.
struct Unit {
  uint64_t codes;
  uint32_t scale, zero;
};

__device__ inline uint32_t load_bits(const void* from, int64_t i, int bytes) {
  if (bytes == 4) return static_cast<const uint32_t*>(from)[i];
  if (bytes == 2) return static_cast<const uint16_t*>(from)[i];
  return static_cast<const uint8_t*>(from)[i];
}

__device__ inline float float_of(uint32_t bits, ScaleDtype dtype) {
  if (dtype == ScaleDtype::kFloat16) return ptx::f16_to_float(bits);
  if (scale_bytes(dtype) == 1) return scale_code_value(dtype, bits);
  return ptx::bits_as_float(dtype == ScaleDtype::kFloat32 ? bits : bits << 16);
}

template <Format kFormat>
__device__ Formula formula_of(const CanonicalParams& c, const Unit& u) {
  Formula f{0.0f, 0.0f, float_of(u.scale, c.scale_dtype), -0.0f};
  if (c.super_scale != nullptr) f.scale = ptx::mul_rn(f.scale, *c.super_scale);
  if constexpr (is_integer(kFormat)) {
    f.start = kTwo23;
    if (c.zero_kind == ZeroKind::kNone) {
      f.start += static_cast<float>(1 << (bits_of(kFormat) - 1));
    } else if (c.zero_kind == ZeroKind::kInt) {
      f.start += static_cast<float>(u.zero);
    } else if (c.zero_kind == ZeroKind::kFloat) {
      f.zero = float_of(u.zero, c.scale_dtype);
    } else {
      f.offset = float_of(u.zero, c.scale_dtype);
    }
  }
  return f;
}

template <Format kFormat>
__device__ float weight(uint32_t q, const Formula& f, const float* levels) {
  const float base = base_value<kFormat>(q, levels);
  if constexpr (!is_integer(kFormat)) return ptx::mul_rn(base, f.scale);
  const float level = ptx::sub_rn(ptx::sub_rn(base, f.start), f.zero);
  return ptx::add_rn(ptx::mul_rn(level, f.scale), f.offset);
}

// ---- units -------------------------------------------------------------------------------------------------------------

// The widest load that eight codes are made of: 3 and 5 bytes are not.
template <int kBits>
constexpr int kLoadBytes = kBits == 8       ? 8
                           : kBits == 4     ? 4
                           : kBits % 2 == 0 ? 2
                                            : 1;

// kBits bytes at `offset`. The last unit of a row that K cuts short reads codes of the next row, which nobody stores.
template <int kBits>
__device__ uint64_t load_codes(const uint8_t* packed, int64_t bytes, int64_t offset, bool aligned) {
  const uint8_t* from = packed + offset;
  if (aligned) {
    if constexpr (kBits == 8) {
      const uint2 v = *reinterpret_cast<const uint2*>(from);
      return v.x | static_cast<uint64_t>(v.y) << 32;
    } else if constexpr (kBits == 4) {
      return *reinterpret_cast<const uint32_t*>(from);
    } else if constexpr (kBits % 2 == 0) {
      const uint16_t* half = reinterpret_cast<const uint16_t*>(from);
      uint64_t codes = half[0];
      if constexpr (kBits == 6)
        codes |= static_cast<uint64_t>(half[1] | static_cast<uint32_t>(half[2]) << 16) << 16;
      return codes;
    }
  }
  uint64_t codes = 0;
#pragma unroll
  for (int b = 0; b < kBits; ++b) {
    if (inside(offset + b, bytes)) codes |= static_cast<uint64_t>(from[b]) << (8 * b);
  }
  return codes;
}

template <Format kFormat>
__device__ Unit load_unit(const DequantizeParams& p, int64_t n, uint32_t unit) {
  constexpr int kBits = bits_of(kFormat);
  const CanonicalParams& c = p.from;
  const int64_t i = (c.blocks128 ? n / 128 : n) * c.groups + p.units_per_group.quotient(unit);
  Unit u{};
  u.codes = load_codes<kBits>(c.packed, p.packed_bytes, n * c.row_bytes + unit * int64_t{kBits},
                              p.aligned);
  u.scale = load_bits(c.scales, i, scale_bytes(c.scale_dtype));
  if (c.zeros != nullptr)
    u.zero = load_bits(c.zeros, i, c.zero_kind == ZeroKind::kInt ? 1 : scale_bytes(c.scale_dtype));
  return u;
}

// Eight weights to their place; K cuts the last unit of a row short.
__device__ void store_unit(const DequantizeParams& p, int64_t n, int64_t k, const float (&w)[8]) {
  const int64_t at = n * p.from.K + k;
  if (p.vectors && inside(k + 7, p.from.K)) {
    if (p.type == Element::kFloat32) {
      float4* to = reinterpret_cast<float4*>(static_cast<float*>(p.to) + at);
      to[0] = make_float4(w[0], w[1], w[2], w[3]);
      to[1] = make_float4(w[4], w[5], w[6], w[7]);
    } else {
      *reinterpret_cast<uint4*>(static_cast<uint16_t*>(p.to) + at) =
          make_uint4(pack_pair(w[0], w[1], p.type), pack_pair(w[2], w[3], p.type),
                     pack_pair(w[4], w[5], p.type), pack_pair(w[6], w[7], p.type));
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (inside(k + i, p.from.K)) store_element(w[i], p.to, at + i, p.type);
  }
}

template <Format kFormat>
__device__ void decode_unit(const CanonicalParams& c, const Unit& u, const float* levels,
                            float (&w)[8]) {
  constexpr int kBits = bits_of(kFormat);
  const Formula f = formula_of<kFormat>(c, u);
#pragma unroll
  for (int i = 0; i < 8; ++i)
    w[i] = weight<kFormat>(static_cast<uint32_t>(u.codes >> (i * kBits)) & ((1u << kBits) - 1u), f,
                           levels);
}

__device__ void load_levels(const DequantizeParams& p, float* levels) {
  if (threadIdx.x < 16) levels[threadIdx.x] = p.levels[threadIdx.x];
  ptx::sync_block();
}

template <Format kFormat>
__global__ void __launch_bounds__(kThreads, 4) dequantize_kernel(const DequantizeParams p) {
  float* levels = reinterpret_cast<float*>(dynamic_shared());
  if constexpr (kFormat == kBookCodec) load_levels(p, levels);
  // One long division per block; within it, offsets are small.
  const int64_t first = blockIdx.x * int64_t{kThreads * kUnits};
  const int64_t row0 = first / p.units_per_row.divisor;
  const uint32_t unit0 = static_cast<uint32_t>(first - row0 * p.units_per_row.divisor);

  int64_t n[kUnits];
  uint32_t at[kUnits];  // unit of its row
  Unit units[kUnits] = {};
#pragma unroll
  for (int j = 0; j < kUnits; ++j) {
    const uint32_t unit = unit0 + j * kThreads + threadIdx.x;
    const uint32_t down = p.units_per_row.quotient(unit);
    n[j] = row0 + down;
    at[j] = unit - down * p.units_per_row.divisor;
    if (inside(n[j], p.from.N)) units[j] = load_unit<kFormat>(p, n[j], at[j]);
  }
#pragma unroll
  for (int j = 0; j < kUnits; ++j) {
    float w[8];
    decode_unit<kFormat>(p.from, units[j], levels, w);
    if (inside(n[j], p.from.N)) store_unit(p, n[j], at[j] * int64_t{8}, w);
  }
}

// With perm: a block per row, and column j goes to perm[j]. The row is put together in shared memory where it fits, and
// leaves in order; scattered stores of 2 bytes would each move a sector of 32.
template <Format kFormat>
__global__ void __launch_bounds__(kThreads, 4)
    dequantize_permuted_kernel(const DequantizeParams p) {
  float* levels = reinterpret_cast<float*>(dynamic_shared());
  if constexpr (kFormat == kBookCodec) load_levels(p, levels);
  uint8_t* stage = dynamic_shared() + 64;
  const int64_t n = blockIdx.x;
  const int size = element_bytes(p.type);
  uint8_t* row = static_cast<uint8_t*>(p.to) + n * p.from.K * size;
  for (int64_t unit = threadIdx.x; unit < p.units_per_row.divisor; unit += kThreads) {
    float w[8];
    decode_unit<kFormat>(p.from, load_unit<kFormat>(p, n, static_cast<uint32_t>(unit)), levels, w);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (inside(unit * 8 + i, p.from.K))
        store_element(w[i], p.staged > 0 ? stage : row, p.from.perm[unit * 8 + i], p.type);
    }
  }
  if (p.staged == 0) return;
  ptx::sync_block();
  const int64_t vectors = p.vectors ? p.staged / 16 : 0;
  for (int64_t i = threadIdx.x; i < vectors; i += kThreads)
    reinterpret_cast<uint4*>(row)[i] = reinterpret_cast<const uint4*>(stage)[i];
  for (int64_t b = vectors * 16 + threadIdx.x * 2; b < p.staged; b += kThreads * 2)
    *reinterpret_cast<uint16_t*>(row + b) = *reinterpret_cast<const uint16_t*>(stage + b);
}

// ---- launches ----------------------------------------------------------------------------------------------------------

template <Format kFormat>
void start(DequantizeParams p, Stream stream) {
  constexpr int64_t kTable = 64;              // bytes of the levels
  constexpr int64_t kMostShared = 48 * 1024;  // what every device gives without being asked
  // Wide loads also need rows of whole units: nothing is read behind the last one.
  p.aligned = is_aligned(p.from.packed, p.from.row_bytes, kLoadBytes<bits_of(kFormat)>) &&
              p.from.row_bytes % bits_of(kFormat) == 0;
  if (p.from.perm == nullptr) {
    const int64_t units = p.from.N * p.units_per_row.divisor;
    const int64_t blocks = div_up(units, kThreads * kUnits);
    LOWBIT_CHECK(blocks < (int64_t{1} << 31), "dequantize: N=", p.from.N, " K=", p.from.K,
                 " is too large for one launch");
    launch("dequantize", dequantize_kernel<kFormat>, Grid{static_cast<uint32_t>(blocks), 1, 1},
           kThreads, kTable, stream, p);
  } else {
    const int64_t row = p.from.K * element_bytes(p.type);
    p.staged = kTable + row <= kMostShared ? row : 0;
    launch("dequantize_permuted", dequantize_permuted_kernel<kFormat>,
           Grid{static_cast<uint32_t>(p.from.N), 1, 1}, kThreads, kTable + p.staged, stream, p);
  }
}

}  // namespace

void launch_dequantize(const CanonicalParams& from, void* to, Element type, Stream stream) {
  const int64_t units_per_row = div_up(from.K, 8);
  // A group of all of K need not be a multiple of eight; no unit reaches the second one.
  const int64_t units_per_group = div_up(from.group_size, 8);
  DequantizeParams p{from,
                     to,
                     type,
                     Divisor(units_per_row),
                     Divisor(units_per_group),
                     from.N * from.row_bytes,
                     false,
                     is_aligned(to, from.K * element_bytes(type), 16),
                     0,
                     {}};
  if (has_book(from.format)) std::copy_n(format_info(from.format).code, 16, p.levels);
  switch (codec_of(from.format)) {
    case Format::kInt4:
      return start<Format::kInt4>(p, stream);
    case Format::kInt3:
      return start<Format::kInt3>(p, stream);
    case Format::kInt8:
      return start<Format::kInt8>(p, stream);
    case Format::kFp8E4m3:
      return start<Format::kFp8E4m3>(p, stream);
    case kBookCodec:  // also where formats are few: the only one with levels
      return start<kBookCodec>(p, stream);
#if !defined(LOWBIT_EMULATOR_ONE_FORMAT)
    case Format::kInt2:
      return start<Format::kInt2>(p, stream);
    case Format::kInt5:
      return start<Format::kInt5>(p, stream);
    case Format::kInt6:
      return start<Format::kInt6>(p, stream);
    case Format::kFp8E5m2:
      return start<Format::kFp8E5m2>(p, stream);
    case Format::kFp4E2m1:
      return start<Format::kFp4E2m1>(p, stream);
#endif
    default:
      fail("dequantize: no kernel for format ", static_cast<int>(from.format), " in this build");
  }
}

}  // namespace lowbit::cuda
