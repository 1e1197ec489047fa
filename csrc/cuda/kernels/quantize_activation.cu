// quantize_activation: rows of x -> int8 or fp8 codes with a scale per token or per group of K, to the bits of the CPU
// (cpu/kernels/activation-inl.h).
//
// A segment is what shares a scale. A team of 8 to 256 threads takes one: it loads the segment once, finds its range,
// and writes the codes from registers. A thread's piece is eight elements, one 16-byte load of 16-bit x and one 8-byte
// store; it keeps four pieces (two of fp32), so that 8192 elements fit a team of 256. What a longer row has beyond is read
// again, from L1 or L2.
//
//   segment   | piece 0 | piece 1 | ... | piece T-1 | piece T | ...      piece i belongs to thread i % T
//
// Bound by memory: 3 bytes per element. A correctly rounded division costs more time than those 3 bytes, so codes come
// from a multiplication by the reciprocal wherever that provably rounds to the same code, which is all but about one
// element in 4000 (see `Int8` and `Fp8`).
#include "common/check.h"
#include "cuda/elements.cuh"
#include "cuda/launch.cuh"
#include "cuda/launchers.h"
#include "cuda/rules.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPiece = 8;
constexpr int kWarps = kThreads / 32;

struct ActivationParams {
  QuantizeActivationParams q;
  int64_t groups, segments;
  int32_t team;        // threads per segment: a power of two, 8..256
  bool vector_loads;   // pieces of x lie on 16-byte boundaries
  bool vector_stores;  // pieces of xq lie on 8-byte boundaries
};

// One scale: what a thread needs to make codes. `inverse` is NaN where the shortcut must not be taken; then every
// comparison below fails and the element is divided.
struct Coder {
  float scale, inverse, zero, low;
};

__device__ float usable_inverse(float scale) {
  // Between these, 1 / scale is a normal number, off by 2^-24 of itself at most.
  return scale > 0x1p-100f && scale < 0x1p100f ? ptx::div_rn(1.0f, scale)
                                               : rules::bits_float(0x7fc00000u);
}

// x * inverse is off from the rounded quotient x / scale by less than 3 * 2^-24 of it (two roundings here, one there).
// `quick` says whether that settles the code; `exact` divides.
struct Int8 {
  // Below 256 the two differ by less than 2^-14, so they round to the same integer unless one is that close to a half.
  __device__ static uint32_t quick(float x, const Coder& c, bool& settled) {
    const float guess = ptx::mul_rn(x, c.inverse), level = rules::round_even(guess);
    settled = magnitude(guess) < 256.0f && magnitude(magnitude(guess - level) - 0.5f) > 0x1p-13f;
    return code(level, c);
  }
  __device__ static uint32_t exact(float x, const Coder& c) {
    return code(rules::round_even(bounded(ptx::div_rn(x, c.scale))), c);
  }
  __device__ static float bounded(float value) { return rules::clamp(value, -65536.0f, 65536.0f); }

 private:
  __device__ static uint32_t code(float level, const Coder& c) {
    return static_cast<uint32_t>(
               static_cast<int32_t>(rules::clamp(level + c.zero, c.low, 127.0f))) &
           0xffu;
  }
  __device__ static float magnitude(float value) {
    return rules::bits_float(rules::float_bits(value) & 0x7fffffffu);
  }
};

struct Fp8 {
  using E4m3 = rules::SmallFloat<4, 3>;

  // In e4m3's normal range, the 20 bits that are dropped decide unless they are within 8 units of the halfway point.
  // Below 2^-11 everything is 0. Between, codes are subnormal, and rare.
  __device__ static uint32_t quick(float x, const Coder& c, bool& settled) {
    const float product = ptx::mul_rn(x, c.inverse);
    const float guess = rules::clamp(product, -448.0f, 448.0f);
    const uint32_t bits = rules::float_bits(guess) & 0x7fffffffu;
    const bool normal = bits >= E4m3::kSmallestNormal && ((bits - 0x7fff8u) & 0xfffffu) > 16u;
    settled = product == product && (normal || bits < (116u << 23));
    return E4m3::encode(guess);
  }
  __device__ static uint32_t exact(float x, const Coder& c) {
    return E4m3::encode(rules::clamp(ptx::div_rn(x, c.scale), -448.0f, 448.0f));
  }
};

// ---- range -------------------------------------------------------------------------------------------------------------

// Least and greatest of what is not NaN, and whether there was a NaN (bit 0), as the first element (bit 1).
struct Extent {
  float low, high;
  uint32_t nan;

  __device__ void add(float v, bool first) {
    low = v < low ? v : low;
    high = v > high ? v : high;
    if (v != v) nan |= first ? 3u : 1u;
  }
  __device__ void add(const Extent& other) {
    low = other.low < low ? other.low : low;
    high = other.high > high ? other.high : high;
    nan |= other.nan;
  }
};

// The whole team's. Every thread of the block takes part, whether its segment exists or not.
__device__ Extent team_extent(Extent e, int team) {
  for (int mask = 1; mask < 32 && mask < team; mask *= 2)
    e.add({ptx::shuffle_xor(e.low, mask), ptx::shuffle_xor(e.high, mask),
           ptx::shuffle_xor(e.nan, mask)});
  if (team <= 32) return e;
  Extent* warps = reinterpret_cast<Extent*>(dynamic_shared());  // [kWarps]
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (threadIdx.x % 32 == 0) warps[warp] = e;
  ptx::sync_block();
  const int first = warp / (team / 32) * (team / 32);
  for (int i = 0; i < team / 32; ++i) e.add(warps[first + i]);
  return e;
}

// As range_of of the CPU, whose search starts from the first element: a NaN there stays.
__device__ rules::Range range_of(const Extent& e) {
  const bool first_is_nan = (e.nan & 2u) != 0;
  const float low = first_is_nan ? rules::bits_float(0x7fc00000u) : e.low;
  const float high = first_is_nan ? rules::bits_float(0x7fc00000u) : e.high;
  return {low, high, -low > high ? -low : high, e.nan != 0};
}

__device__ Coder coder_of(const QuantizeActivationParams& q, const rules::Range& range) {
  const bool is_int8 = q.format == Element::kInt8;
  Coder c{1.0f, 0.0f, 0.0f, -128.0f};
  if (q.static_scale != nullptr) {
    c.scale = *q.static_scale;
    if (q.static_zero != nullptr) c.zero = static_cast<float>(*q.static_zero);
  } else if (q.symmetric || !is_int8) {
    c.scale = ptx::div_rn(range.magnitude, is_int8 ? 127.0f : 448.0f);
    c.low = -127.0f;
  } else {
    const float least = range.low < 0.0f ? range.low : 0.0f;
    const float most = range.high > 0.0f ? range.high : 0.0f;
    c.scale = ptx::div_rn(most - least, 255.0f);
    if (c.scale > 0.0f)
      c.zero = rules::clamp(rules::round_even(Int8::bounded(-128.0f - ptx::div_rn(least, c.scale))),
                            -128.0f, 127.0f);
  }
  if (c.scale == 0.0f) c.scale = 1.0f;
  if (range.has_nan) c.scale = rules::bits_float(0x7fc00000u);
  c.inverse = usable_inverse(c.scale);
  return c;
}

// ---- pieces ------------------------------------------------------------------------------------------------------------

struct Segment {
  const void* row;         // of x
  const float* pre_scale;  // or null
  int32_t begin, end;      // columns
};

// Eight elements as they are stored.
template <Element kType>
struct Piece {
  static constexpr int kWords = kType == Element::kFloat32 ? 8 : 4;
  static constexpr int kKept = 16 / kWords;  // per thread, in registers
  uint32_t words[kWords];

  __device__ float value(int i) const {
    if constexpr (kType == Element::kFloat32) return ptx::bits_as_float(words[i]);
    const uint32_t bits = words[i / 2] >> (i % 2 * 16) & 0xffffu;
    return kType == Element::kFloat16 ? ptx::f16_to_float(bits) : ptx::bits_as_float(bits << 16);
  }
};

// From column k on; 0 past the segment's end.
template <Element kType>
__device__ Piece<kType> load_piece(const Segment& s, int32_t k, bool vectors) {
  constexpr int kSize = element_bytes(kType);
  Piece<kType> piece{};
  const uint8_t* from = static_cast<const uint8_t*>(s.row) + int64_t{k} * kSize;
  if (vectors && inside(kPiece - 1, s.end - k)) {
#pragma unroll
    for (int i = 0; i < kSize / 2; ++i) {
      const uint4 v = reinterpret_cast<const uint4*>(from)[i];
      piece.words[4 * i] = v.x, piece.words[4 * i + 1] = v.y;
      piece.words[4 * i + 2] = v.z, piece.words[4 * i + 3] = v.w;
    }
    return piece;
  }
#pragma unroll
  for (int i = 0; i < kPiece; ++i) {
    if (!inside(i, s.end - k)) continue;
    if constexpr (kSize == 4) {
      piece.words[i] = reinterpret_cast<const uint32_t*>(from)[i];
    } else {
      piece.words[i / 2] |= static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(from)[i])
                            << (i % 2 * 16);
    }
  }
  return piece;
}

// In fp32, multiplied by pre_scale.
template <Element kType>
__device__ void values_of(const Segment& s, int32_t k, const Piece<kType>& piece,
                          float (&v)[kPiece]) {
#pragma unroll
  for (int i = 0; i < kPiece; ++i) {
    v[i] = piece.value(i);
    if (s.pre_scale != nullptr && inside(i, s.end - k))
      v[i] = ptx::mul_rn(v[i], s.pre_scale[k + i]);
  }
}

// The zeros past a segment's end change no scale: ranges reach to 0 or are symmetric.
template <Element kType>
__device__ void add_piece(const Segment& s, int32_t k, const Piece<kType>& piece, Extent& e) {
  float v[kPiece];
  values_of(s, k, piece, v);
#pragma unroll
  for (int i = 0; i < kPiece; ++i) e.add(v[i], k + i == s.begin);
}

// The codes that `quick` could not settle, one after the other: one division in the code instead of eight.
template <class Code>
__device__ void settle(uint32_t unsettled, const float (&v)[kPiece], const Coder& c,
                       uint32_t (&words)[2]) {
#pragma unroll 1
  for (int i = 0; i < kPiece; ++i) {
    if ((unsettled >> i & 1u) == 0) continue;
    float x = v[0];
#pragma unroll
    for (int j = 1; j < kPiece; ++j) x = i == j ? v[j] : x;
    const int shift = i % 4 * 8;
    const uint32_t code = Code::exact(x, c) << shift, keep = ~(0xffu << shift);
    if (i < 4) {
      words[0] = (words[0] & keep) | code;
    } else {
      words[1] = (words[1] & keep) | code;
    }
  }
}

template <class Code, Element kType>
__device__ void store_piece(const Segment& s, int32_t k, const Piece<kType>& piece, const Coder& c,
                            bool vectors, uint8_t* to) {
  float v[kPiece];
  values_of(s, k, piece, v);
  uint32_t words[2] = {}, unsettled = 0;
#pragma unroll
  for (int i = 0; i < kPiece; ++i) {
    bool settled = false;
    words[i / 4] |= Code::quick(v[i], c, settled) << (i % 4 * 8);
    unsettled |= settled ? 0u : 1u << i;
  }
  if (unsettled != 0) settle<Code>(unsettled, v, c, words);
  if (vectors && inside(kPiece - 1, s.end - k)) {
    *reinterpret_cast<uint2*>(to + k) = make_uint2(words[0], words[1]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kPiece; ++i) {
    if (inside(i, s.end - k)) to[k + i] = static_cast<uint8_t>(words[i / 4] >> (i % 4 * 8));
  }
}

// ---- kernel ------------------------------------------------------------------------------------------------------------

template <Element kType, class Code>
__global__ void __launch_bounds__(kThreads, 2)
    quantize_activation_kernel(const ActivationParams p) {
  constexpr int kKept = Piece<kType>::kKept;
  const QuantizeActivationParams& q = p.q;
  const int rank = static_cast<int>(threadIdx.x) % p.team;
  const int64_t segment =
      blockIdx.x * static_cast<int64_t>(kThreads / p.team) + threadIdx.x / p.team;
  const bool exists = inside(segment, p.segments);
  const int64_t m = exists ? segment / p.groups : 0, g = exists ? segment % p.groups : 0;
  Segment s{static_cast<const uint8_t*>(q.x) + m * q.stride * element_bytes(kType), q.pre_scale,
            static_cast<int32_t>(g * q.group_size), 0};
  if (exists)
    s.end = static_cast<int32_t>(s.begin + q.group_size < q.K ? s.begin + q.group_size : q.K);

  const int32_t k0 = s.begin + rank * kPiece;
  const int step = p.team * kPiece;
  Piece<kType> kept[kKept];
  Extent extent{rules::bits_float(0x7f800000u), rules::bits_float(0xff800000u), 0};
#pragma unroll
  for (int j = 0; j < kKept; ++j) kept[j] = load_piece<kType>(s, k0 + j * step, p.vector_loads);
#pragma unroll
  for (int j = 0; j < kKept; ++j) add_piece(s, k0 + j * step, kept[j], extent);
  for (int32_t k = k0 + kKept * step; inside(k, s.end); k += step)
    add_piece(s, k, load_piece<kType>(s, k, p.vector_loads), extent);

  const Coder coder = coder_of(q, range_of(team_extent(extent, p.team)));
  uint8_t* to = static_cast<uint8_t*>(q.xq) + m * q.K;
#pragma unroll
  for (int j = 0; j < kKept; ++j)
    store_piece<Code>(s, k0 + j * step, kept[j], coder, p.vector_stores, to);
  for (int32_t k = k0 + kKept * step; inside(k, s.end); k += step)
    store_piece<Code>(s, k, load_piece<kType>(s, k, p.vector_loads), coder, p.vector_stores, to);
  if (exists && rank == 0) {
    q.x_scales[segment] = coder.scale;
    if (q.x_zeros != nullptr) q.x_zeros[m] = static_cast<int32_t>(coder.zero);
  }
}

template <Element kType>
void start(const ActivationParams& p, Stream stream) {
  const int64_t blocks = div_up(p.segments, kThreads / p.team);
  LOWBIT_CHECK(blocks < (int64_t{1} << 31), "quantize_activation: ", p.segments,
               " groups are too many for one launch");
  const Grid grid{static_cast<uint32_t>(blocks), 1, 1};
  constexpr int64_t kShared = kWarps * static_cast<int64_t>(sizeof(Extent));
  if (p.q.format == Element::kInt8) {
    launch("quantize_activation_int8", quantize_activation_kernel<kType, Int8>, grid, kThreads,
           kShared, stream, p);
  } else {
    launch("quantize_activation_fp8", quantize_activation_kernel<kType, Fp8>, grid, kThreads,
           kShared, stream, p);
  }
}

// Two pieces per thread where a segment is short enough: with fewer, a row would keep too few loads in flight.
int32_t team_size(int64_t length) {
  int32_t team = 8;
  while (team < kThreads && team * 2 * kPiece < length) team *= 2;
  return team;
}

}  // namespace

void launch_quantize_activation(const QuantizeActivationParams& q, Stream stream) {
  LOWBIT_CHECK(q.K < (int64_t{1} << 30), "quantize_activation: K=", q.K,
               " exceeds the supported 2^30");
  const int64_t groups = div_up(q.K, q.group_size), size = element_bytes(q.type);
  ActivationParams p{q, groups, q.M * groups, team_size(q.group_size), false, false};
  // A lone group spans its row; others start at multiples of eight elements.
  p.vector_loads = is_aligned(q.x, q.stride * size, 16);
  p.vector_stores = is_aligned(q.xq, q.K, 8);
#if !defined(LOWBIT_EMULATOR_ONE_FORMAT)
  if (q.type == Element::kFloat32) return start<Element::kFloat32>(p, stream);
  if (q.type == Element::kFloat16) return start<Element::kFloat16>(p, stream);
#endif
  LOWBIT_CHECK(q.type == Element::kBFloat16,
               "quantize_activation: no kernel for this dtype in this build");
  start<Element::kBFloat16>(p, stream);
}

}  // namespace lowbit::cuda
