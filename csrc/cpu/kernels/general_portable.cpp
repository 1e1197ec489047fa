// General kernels: whatever the layout can hold. They decode element by element, so they are slow per weight; every
// piece is decoded once for up to 128 rows of x.

#include "cpu/kernels/general.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "common/half.h"
#include "formats/scale_table.h"
#include "packing/cpu_tile16.h"

namespace lowbit {
namespace {

constexpr int64_t kPieceK = kGradColumns;

struct GroupOfRow {
  float scale, zero;  // zero: or offset
};

// Row n's entry for group g in one of the strip's tables.
const uint8_t* entry(const WeightView& w, int i, const uint8_t* strip, int64_t g, int n) {
  const GroupTable& table = w.tile->shape.tables[i];
  const int lanes = i == kScaleTable ? w.scales_per_group : kTileRows;
  const int64_t at = (g >> table.fine_shift) * lanes + (lanes == 1 ? 0 : n);
  return strip + w.tile->table_offset[i] + at * (table.bytes == 0 ? 1 : table.bytes);
}

float super_value(const WeightView& w, int i, const uint8_t* strip, int64_t g, int n) {
  return scale_value(w.super_dtype, entry(w, i, strip, g, n));
}

GroupOfRow group_of_row(const WeightView& w, const uint8_t* strip, int64_t g, int n) {
  const CanonicalShape& shape = w.tile->shape;
  const uint8_t mask = shape.scales().bits == 4 ? 15 : 255;
  const bool two_levels = shape.tables[kSuperTable].present();
  const uint8_t* stored = entry(w, kScaleTable, strip, g, n);
  const uint8_t low = stored[0] & mask;
  GroupOfRow r{scale_value(w.scale_dtype, shape.scale_bytes == 1 ? &low : stored), 0.0f};
  if (two_levels) r.scale *= super_value(w, kSuperTable, strip, g, n);
  if (w.scale_dtype == ScaleDtype::kDynamic8)
    r.scale += super_value(w, kSuperZeroTable, strip, g, n);
  if (w.zero_kind == ZeroKind::kNone) {
    r.zero = w.code == nullptr ? static_cast<float>(1 << (w.bits - 1)) : 0.0f;
    return r;
  }
  const uint8_t* zero = entry(w, kZeroTable, strip, g, n);
  const uint8_t high = static_cast<uint8_t>(*zero >> 4);
  if (w.zero_kind == ZeroKind::kInt) {
    r.zero = static_cast<float>(*zero);
  } else {
    r.zero = scale_value(w.scale_dtype, shape.zeros_in_scales() ? &high : zero);
    if (two_levels) r.zero *= super_value(w, kSuperZeroTable, strip, g, n);
  }
  return r;
}

// panel[k1 - k0][16], scaled; zero from K on.
void decode(const WeightView& w, int64_t strip, int64_t k0, int64_t k1, float* panel) {
  const uint8_t* base = w.data + strip * w.strip_bytes;
  for (int n = 0; n < kTileRows; ++n) {
    int64_t g = -1;
    GroupOfRow group{};
    for (int64_t k = k0; k < k1; ++k) {
      float value = 0.0f;
      if (k < w.K) {
        if (k / w.group_size != g) {
          g = k / w.group_size;
          group = group_of_row(w, base, g, n);
        }
        const unsigned q = tile16_code(*w.tile, base, n, k);
        if (w.code != nullptr) {
          value = w.code[q] * group.scale;
        } else if (w.zero_kind == ZeroKind::kOffset) {
          value = static_cast<float>(q) * group.scale + group.zero;
        } else {
          value = (static_cast<float>(q) - group.zero) * group.scale;
        }
      }
      panel[(k - k0) * kTileRows + n] = value;
    }
  }
}

void store(const Output& y, int64_t m, int64_t n, float value) {
  if (y.bias != nullptr) value += y.bias[n];
  const int64_t at = m * y.stride + n;
  if (y.dtype == Element::kFloat32) {
    static_cast<float*>(y.data)[at] = value;
  } else if (y.dtype == Element::kFloat16) {
    static_cast<Half*>(y.data)[at] = to_half(value);
  } else {
    static_cast<BFloat16*>(y.data)[at] = to_bfloat16(value);
  }
}

void store_strip(const GemmJob& job, int64_t strip, int64_t m, const float* sums, float factor) {
  for (int64_t n = 0; n < kTileRows && strip * kTileRows + n < job.w.N; ++n)
    store(job.y, m, strip * kTileRows + n, sums[n] * factor);
}

// The sums of one group and row of the strip in units of scale(x): dot = sum of x * q, x_sum = sum of x. Zeros are
// split into an integer, taken off exactly, and a rest (see gemm_dot-inl.h, which does the same).
float finish_group(const WeightView& w, const GroupOfRow& group, int64_t dot, int64_t x_sum) {
  float wanted = group.zero;
  if (w.zero_kind == ZeroKind::kOffset) wanted = -group.zero / group.scale;
  // The constant stands first, so that a NaN becomes 0 here and stays a NaN in `rest`.
  const float nearest = std::nearbyint(std::min(255.0f, std::max(0.0f, wanted)));
  const float exact = static_cast<float>(dot - static_cast<int64_t>(nearest) * x_sum);
  const float total = static_cast<float>(x_sum);
  if (w.zero_kind == ZeroKind::kOffset)
    return exact * group.scale + (nearest * group.scale + group.zero) * total;
  if (w.zero_kind == ZeroKind::kFloat)
    return (exact - (group.zero - nearest) * total) * group.scale;
  return exact * group.scale;
}

}  // namespace

void row_codes(const WeightView& w, int64_t n, uint8_t* codes) {
  const CpuTile16& tile = *w.tile;
  const uint8_t* strip = w.data + n / kTileRows * w.strip_bytes + 4 * (n % kTileRows);
  CodePieces pieces[8];
  const int quads = tile.kb / 4;
  for (int quad = 0; quad < quads; ++quad) pieces[quad] = code_pieces(tile.shape.bits, quad);
  for (int64_t b = 0; b < tile.blocks; ++b, codes += tile.kb) {
    const uint8_t* block = strip + b * tile.block_bytes;
    for (int quad = 0; quad < quads; ++quad) {  // four codes, a byte each
      uint32_t word, sum = 0;
      for (const CodePiece& piece : pieces[quad].piece) {
        const uint32_t mask = ((1u << piece.bits) - 1u) * 0x01010101u;
        std::memcpy(&word, block + piece.vector * kVectorBytes, 4);
        sum |= (word >> piece.shift & mask) << piece.position;
      }
      std::memcpy(codes + 4 * quad, &sum, 4);
    }
  }
}

void row_groups(const WeightView& w, int64_t n, float* scales, float* zeros) {
  const uint8_t* strip = w.data + n / kTileRows * w.strip_bytes;
  for (int64_t g = 0; g < w.groups; ++g) {
    const GroupOfRow group = group_of_row(w, strip, g, static_cast<int>(n % kTileRows));
    scales[g] = group.scale;
    zeros[g] = group.zero;
  }
}

void gemm_general_f32(const GemmJob& job, int64_t strip_begin, int64_t strip_end) {
  float panel[kPieceK * kTileRows];
  float sums[kMaxRows * kTileRows];
  for (int64_t strip = strip_begin; strip < strip_end; ++strip) {
    std::fill_n(sums, job.x.M * kTileRows, 0.0f);
    for (int64_t k0 = 0; k0 < job.w.K; k0 += kPieceK) {
      const int64_t k1 = std::min(k0 + kPieceK, job.w.K);
      decode(job.w, strip, k0, k1, panel);
      for (int64_t m = 0; m < job.x.M; ++m) {
        const float* x = job.x.values + m * job.x.stride;
        float* sum = sums + m * kTileRows;
        for (int64_t k = k0; k < k1; ++k) {
          for (int n = 0; n < kTileRows; ++n) sum[n] += x[k] * panel[(k - k0) * kTileRows + n];
        }
      }
    }
    for (int64_t m = 0; m < job.x.M; ++m) store_strip(job, strip, m, sums + m * kTileRows, 1.0f);
  }
}

void gemm_general_i8(const GemmJob& job, int64_t strip_begin, int64_t strip_end) {
  const WeightView& w = job.w;
  const Activations& x = job.x;
  for (int64_t strip = strip_begin; strip < strip_end; ++strip) {
    const uint8_t* base = w.data + strip * w.strip_bytes;
    float sums[kMaxRows * kTileRows];
    std::fill_n(sums, x.M * kTileRows, 0.0f);
    for (int64_t g = 0; g < w.groups; ++g) {
      const int64_t k0 = g * w.group_size, k1 = std::min(k0 + w.group_size, w.K);
      for (int n = 0; n < kTileRows; ++n) {
        const GroupOfRow group = group_of_row(w, base, g, n);
        int64_t dots[kMaxRows] = {}, totals[kMaxRows] = {};
        for (int64_t k = k0; k < k1; ++k) {
          const int64_t q = tile16_code(*w.tile, base, n, k);
          for (int64_t m = 0; m < x.M; ++m) {
            const int64_t value = x.codes[m * x.stride + k] - (x.zeros != nullptr ? x.zeros[m] : 0);
            dots[m] += value * q;
            totals[m] += value;
          }
        }
        for (int64_t m = 0; m < x.M; ++m)
          sums[m * kTileRows + n] += finish_group(w, group, dots[m], totals[m]);
      }
    }
    for (int64_t m = 0; m < x.M; ++m) store_strip(job, strip, m, sums + m * kTileRows, x.scales[m]);
  }
}

void grad_input_general(const GradJob& job, int64_t piece_begin, int64_t piece_end) {
  const WeightView& w = job.w;
  const int64_t strips = div_up(w.N, kTileRows);
  float panel[kPieceK * kTileRows];
  for (int64_t piece = piece_begin; piece < piece_end; ++piece) {
    const int64_t k0 = piece * kPieceK, k1 = std::min(k0 + kPieceK, w.K_padded);
    for (int64_t m = 0; m < job.M; ++m)
      std::fill(job.dx + m * w.K_padded + k0, job.dx + m * w.K_padded + k1, 0.0f);
    for (int64_t strip = 0; strip < strips; ++strip) {
      decode(w, strip, k0, k1, panel);
      for (int64_t m = 0; m < job.M; ++m) {
        const float* dy = job.dy + (m * strips + strip) * kTileRows;
        float* dx = job.dx + m * w.K_padded;
        for (int64_t k = k0; k < k1; ++k) {
          for (int n = 0; n < kTileRows; ++n) dx[k] += dy[n] * panel[(k - k0) * kTileRows + n];
        }
      }
    }
  }
}

}  // namespace lowbit
