// gemm_grad_input: dx[m, k] = sum_n dy[m, n] * w[n, k]. Included after panel-inl.h.
//
// The strip's 16 rows are the lanes, and here they are what is summed over: each (m, k) keeps a vector of 16 partial
// sums in L1/L2 while strips go by, and its lanes are added once at the end. n ascends within each lane, so the result
// does not depend on threads or on M.

enum : int64_t {
  kGradK = kGradColumns,
  kGradRows = 8
};  // 8 x 64 x 16 fp32 = 32 KiB of partial sums

inline float lane_sum(const float* lanes) {
  float sum = 0.0f;
  for (int i = 0; i < 16; ++i) sum += lanes[i];
  return sum;
}

inline void add_strip(const float* panel, int64_t k_count, const float* dy, int64_t dy_stride,
                      int64_t rows, float* sums) {
  for (int64_t m = 0; m < rows; ++m) {
    const V::F d = V::load(dy + m * dy_stride);
    float* sum = sums + m * kGradK * 16;
    for (int64_t k = 0; k < k_count; ++k)
      V::store(sum + k * 16, V::fma(d, V::load(panel + k * 16), V::load(sum + k * 16)));
  }
}

// One piece of K: [k0, k0 + kGradK) of every row of dx.
template <class Decode>
void grad_piece(const Decode& decode, const GradJob& job, int64_t k0) {
  alignas(64) float panel[kGradK * 16];
  alignas(64) float sums[kGradRows * kGradK * 16];
  const WeightView& w = job.w;
  const int64_t k1 = w.K_padded - k0 < kGradK ? w.K_padded : k0 + kGradK;
  const int64_t strips = (w.N + 15) / 16;
  for (int64_t m = 0; m < job.M; m += kGradRows) {
    const int64_t rows = job.M - m < kGradRows ? job.M - m : static_cast<int64_t>(kGradRows);
    for (int64_t i = 0; i < rows * kGradK * 16; ++i) sums[i] = 0.0f;
    for (int64_t strip = 0; strip < strips; ++strip) {
      decode(w, strip, k0, k1, panel);
      add_strip(panel, k1 - k0, job.dy + m * strips * 16 + strip * 16, strips * 16, rows, sums);
    }
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t k = k0; k < k1; ++k)
        job.dx[(m + r) * w.K_padded + k] = lane_sum(sums + (r * kGradK + k - k0) * 16);
    }
  }
}

// The groups of one piece of a strip, in a view that finds their scales beside the strip.
class ExpandedPiece {
 public:
  explicit ExpandedPiece(const WeightView& w) : view_(with_float_scales(w)) {}

  const WeightView& operator()(const WeightView& w, int64_t strip, int64_t k0, int64_t k1) {
    const int64_t last =
        (k1 - 1) / w.group_size < w.groups ? (k1 - 1) / w.group_size : w.groups - 1;
    const int64_t first = k0 / w.group_size < last ? k0 / w.group_size : last;
    const bool offsets = w.zero_kind == ZeroKind::kOffset;
    expand_scales(w, strip, first, last - first + 1, scales_, offsets ? zeros_ : nullptr);
    view_.scales_offset = float_scales_offset(w, strip, scales_ - first * 16);
    if (offsets) view_.zeros_offset = float_scales_offset(w, strip, zeros_ - first * 16);
    return view_;
  }

 private:
  enum { kGroups = kGradK / 16 + 1 };
  WeightView view_;
  alignas(64) float scales_[kGroups * 16];
  alignas(64) float zeros_[kGroups * 16];
};

struct GradPieces {
  const GradJob& job;
  int64_t begin, end;

  template <class Codec>
  void operator()(const Codec& codec) const {
    ExpandedPiece expanded(job.w);
    const auto decode = [&](const WeightView& w, int64_t strip, int64_t k0, int64_t k1,
                            float* panel) {
      decode_panel(codec, w.plain ? w : expanded(w, strip, k0, k1), strip, k0, k1, panel);
    };
    for (int64_t piece = begin; piece < end; ++piece) grad_piece(decode, job, piece * kGradK);
  }
};

// Pieces [piece_begin, piece_end) of kGradK columns each.
void grad_input(const GradJob& job, int64_t piece_begin, int64_t piece_end) {
  with_codec(job.w, GradPieces{job, piece_begin, piece_end});
}
