// gemm and gemm_a8 for whatever the layout can hold: every format, group size, dtype, alignment and order of columns.
// One warp computes eight rows of W times four rows of x; its lanes divide K.
//
//   lane = 4 * slot + t:  slot = one of eight octets of k side by side, t = which two k of the octet
//
// A lane thus reads whole 16-byte vectors of codes, and decodes a weight once for four tokens.
//
// int8 x integers with integer zeros (or none): sums are exact in int32 within a group (within 32768 of its k: 255 * 255 *
// 32768 < 2^31), then meet the scale in fp32. Everything else: weights and x in fp32, summed in fp32.
#include "cuda/kernels/general.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kSpan = 64;          // k that a warp reads at once
constexpr int kMostExact = 32768;  // k of an int32 sum

// Four rows of x, from m0 on; rows past the last one are the last one again, and not stored.
class Tokens {
 public:
  __device__ Tokens(const RowsParams& x, const int32_t* perm, int32_t K, int64_t m0)
      : x_(x), perm_(perm), K_(K), m0_(m0) {}

  __device__ int64_t row(int i) const {
    const int64_t m = m0_ + i;
    return inside(m, int64_t{x_.M}) ? m : x_.M - 1;
  }
  // Where the packed column k stands in x.
  __device__ int64_t column(int32_t k) const { return perm_ == nullptr ? k : perm_[k]; }

  __device__ float scale(int i, int64_t column) const {
    return x_.scales[row(i) * x_.scale_groups + (x_.scale_groups == 1 ? 0 : column / 128)];
  }
  __device__ int32_t zero(int i) const { return x_.zeros == nullptr ? 0 : x_.zeros[row(i)]; }

  __device__ int32_t code(int i, int64_t column) const {
    return static_cast<const int8_t*>(x_.data)[row(i) * x_.stride + column];
  }
  // In fp32, for a scale per token still in units of it.
  __device__ float value(int i, int64_t column) const {
    const int64_t at = row(i) * x_.stride + column;
    float v;
    if (x_.type == Element::kInt8) {
      v = static_cast<float>(static_cast<const int8_t*>(x_.data)[at] - zero(i));
    } else if (x_.type == Element::kFp8E4m3) {
      v = fp8_e4m3_value(static_cast<const uint8_t*>(x_.data)[at]);
    } else {
      return load_element(x_.data, at, x_.type);
    }
    return x_.scale_groups == 1 ? v : ptx::mul_rn(v, scale(i, column));
  }

 private:
  const RowsParams& x_;
  const int32_t* const perm_;
  const int32_t K_;
  const int64_t m0_;
};

// Eight rows of W.
struct Rows {
  const uint8_t* strip;
  int g;
};

// sums[4 * row + token] += a lane's share of the k in [begin, end), in fp32.
__device__ void add_floats(const WeightParams& w, const TileReader& reader, const Rows& rows,
                           const Tokens& x, const float* levels, int lane, float (&sums)[32]) {
  const int slot = lane / 4, t = lane % 4;
  const bool is_integer = reader.is_integer();
  for (int32_t k0 = 8 * slot; k0 < w.K; k0 += kSpan) {
    int64_t group[2] = {};  // the same, but where blocks run across rows of odd length
    const CodePairs codes = reader.pairs(rows.strip, k0 / 16, k0 / 8 % 2, rows.g, t);
    float xs[kGeneralTokens][2] = {};
    bool real[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      real[e] = inside(k0 + 2 * t + e, w.K);
      group[e] = (real[e] ? k0 + 2 * t + e : k0) / w.group_size;
      if (!real[e]) continue;
      const int64_t column = x.column(k0 + 2 * t + e);
#pragma unroll
      for (int i = 0; i < kGeneralTokens; ++i) xs[i][e] = x.value(i, column);
    }
#pragma unroll
    for (int j = 0; j < kReaderRows; ++j) {
      float scale = reader.scale(rows.strip, group[0], rows.g, j);
      float third = reader.third(rows.strip, group[0], rows.g, j);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (e == 1 && group[1] != group[0]) {
          scale = reader.scale(rows.strip, group[1], rows.g, j);
          third = reader.third(rows.strip, group[1], rows.g, j);
        }
        const float value = code_value(w.format, reader.code(codes, j, e), levels);
        // Past K the scale of the last group would still apply, and an infinite one make a NaN of 0 * x.
        const float weight =
            real[e] ? weight_value(value, scale, third, w.zero_kind, is_integer) : 0.0f;
#pragma unroll
        for (int i = 0; i < kGeneralTokens; ++i)
          sums[4 * j + i] = ptx::fma_rn(weight, xs[i][e], sums[4 * j + i]);
      }
    }
  }
}

// sums[4 * row + token] += a lane's share of (xq - xz) * (q - z) for the k in [begin, end); begin is a multiple of 8.
__device__ void add_products(const WeightParams& w, const TileReader& reader, const Rows& rows,
                             const Tokens& x, int64_t group, int32_t begin, int32_t end, int lane,
                             int32_t (&sums)[32]) {
  const int slot = lane / 4, t = lane % 4;
  for (int32_t k0 = begin + 8 * slot; k0 < end; k0 += kSpan) {
    const CodePairs codes = reader.pairs(rows.strip, k0 / 16, k0 / 8 % 2, rows.g, t);
    int32_t xs[kGeneralTokens][2] = {};
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (!inside(k0 + 2 * t + e, end)) continue;
      const int64_t column = x.column(k0 + 2 * t + e);
#pragma unroll
      for (int i = 0; i < kGeneralTokens; ++i) xs[i][e] = x.code(i, column) - x.zero(i);
    }
#pragma unroll
    for (int j = 0; j < kReaderRows; ++j) {
      const int32_t zero = static_cast<int32_t>(reader.third(rows.strip, group, rows.g, j));
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int32_t weight = static_cast<int32_t>(reader.code(codes, j, e)) - zero;
#pragma unroll
        for (int i = 0; i < kGeneralTokens; ++i) sums[4 * j + i] += weight * xs[i][e];
      }
    }
  }
}

// This lane's output (row lane / 4, token lane % 4), in units of a scale per token.
__device__ float dot_floats(const WeightParams& w, const TileReader& reader, const Rows& rows,
                            const Tokens& x, const float* levels, int lane) {
  float sums[32] = {};
  add_floats(w, reader, rows, x, levels, lane, sums);
  return sum_over_lanes(sums, lane);
}

__device__ float dot_integers(const WeightParams& w, const RowsParams& rows_of_x,
                              const TileReader& reader, const Rows& rows, const Tokens& x,
                              int lane) {
  float total = 0.0f;
  int32_t end = 0;
  for (int32_t begin = 0; begin < w.K; begin = end) {
    const int32_t group = begin / w.group_size;
    // To the end of the group, of a group of x, and of what int32 holds.
    const int64_t group_end = (int64_t{group} + 1) * w.group_size;
    end = group_end < w.K ? static_cast<int32_t>(group_end) : w.K;
    if (rows_of_x.scale_groups > 1 && (begin / 128 + 1) * 128 < end) end = (begin / 128 + 1) * 128;
    if (end - begin > kMostExact) end = begin + kMostExact;
    int32_t sums[32] = {};
    add_products(w, reader, rows, x, group, begin, end, lane, sums);
    float part = static_cast<float>(sum_over_lanes(sums, lane));
    part = ptx::mul_rn(part, reader.scale(rows.strip, group, rows.g, lane / 4));
    if (rows_of_x.scale_groups > 1) part = ptx::mul_rn(part, x.scale(lane % 4, begin));
    total = ptx::add_rn(total, part);
  }
  return total;
}

// kExact: int32 sums.
template <bool kExact>
__global__ void __launch_bounds__(32 * kGeneralWarps) general_kernel(const GemmParams p) {
  const float* levels = shared_levels(p.w);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const TileReader reader(p.w);
  const int64_t token_groups = div_up(p.x.M, kGeneralTokens);
  const int64_t work = p.w.strips * token_groups * kReaderRows;
  // The eight warps of a strip and four tokens, then the next tokens: codes are read again while they are still in L2.
  for (int64_t i = first_warp(); i < work; i += all_warps()) {
    const int64_t strip = i / kReaderRows / token_groups;
    const Rows rows{reader.strip(strip), static_cast<int>(i % kReaderRows)};
    const int64_t m0 = i / kReaderRows % token_groups * kGeneralTokens;
    const Tokens x(p.x, p.w.perm, p.w.K, m0);
    float y;
    if constexpr (kExact) {
      y = dot_integers(p.w, p.x, reader, rows, x, lane);
    } else {
      y = dot_floats(p.w, reader, rows, x, levels, lane);
    }
    const int64_t n = strip * kStripRows + rows.g + 8 * (lane / 4), m = m0 + lane % 4;
    if (!inside(n, int64_t{p.w.N}) || !inside(m, int64_t{p.x.M})) continue;
    if (p.x.scales != nullptr && p.x.scale_groups == 1) y = ptx::mul_rn(y, p.x.scales[m]);
    if (p.y.bias != nullptr) y = ptx::add_rn(y, load_element(p.y.bias, n, p.y.bias_type));
    store_element(y, p.y.data, m * p.y.stride + n, p.y.type);
  }
}

// Whether products of codes are integers, in groups of whole eights, whose groups of x do not cross those that perm sorts
// columns by.
bool is_exact(const GemmParams& p) {
  return p.x.type == Element::kInt8 &&
         static_cast<int>(p.w.format) <= static_cast<int>(Format::kInt8) &&
         (p.w.zero_kind == ZeroKind::kNone || p.w.zero_kind == ZeroKind::kInt) &&
         (p.w.groups == 1 || p.w.group_size % 8 == 0) &&
         (p.w.perm == nullptr || p.x.scale_groups <= 1);
}

}  // namespace

void launch_general(const GemmParams& p, Stream stream) {
  const int64_t warps = int64_t{p.w.strips} * div_up(p.x.M, kGeneralTokens) * kReaderRows;
  launch("general", is_exact(p) ? general_kernel<true> : general_kernel<false>, general_grid(warps),
         32 * kGeneralWarps, kLevelBytes, stream, p);
}

}  // namespace lowbit::cuda
