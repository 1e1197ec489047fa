// The weight quantizer: one group of values -> codes, scale, zero. Included after round-inl.h.
//
// Round-to-nearest, in fp32 with IEEE division, ties to even (rne), R = rounding to the scales' dtype, top = 2^bits - 1;
// scales and zeros are what is stored, and codes are computed against them:
//
//   no zeros      s = R(amax / (2^(bits-1) - 0.5))                       q = clamp(rne(x / s) + 2^(bits-1), 0, top)
//   int zeros     s = R((hi - lo) / top)    z = clamp(rne(-lo / s))      q = clamp(rne(x / s) + z, 0, top)
//   float zeros   the same s                z = R(-lo / s)               q = clamp(rne(x / s + z), 0, top)
//                 (with zeros, lo = min(x, 0) and hi = max(x, 0))
//   offset        s = R((max - min) / top)  o = R(min)                   q = clamp(rne((x - o) / s), 0, top)
//   code book     s = R(amax / largest)     t = x / s, clamped           fp8, fp4: rne in the format; nf4: midpoints below t
//
// A group without extent has s = 1; an s that would round to 0 becomes the dtype's smallest number; a group with a NaN
// has a NaN scale.
//
// The search starts from that, tries a grid of smaller and larger ranges (with a negative scale where a symmetric integer
// group has its extreme on the positive side), then refits scale (and offset) by least squares to the codes found, and
// keeps a candidate only if its squared error is smaller: never worse than
// round-to-nearest on any group. The error is summed in fp64 over 16 fixed lanes, so that the choice is the same on
// every ISA.

struct Affine {
  float scale;
  float zero;    // none, int, float
  float offset;  // offset
};

// Integers. kKind decides where zero or offset enter and what is rounded.
template <ZeroKind kKind>
struct IntEncoder {
  Affine p;
  float top;  // 2^bits - 1

  float rounded_code(float x) const {
    const float limit = 65536.0f;  // keeps round_even exact
    if constexpr (kKind == ZeroKind::kOffset) {
      return clamp(round_even(clamp((x - p.offset) / p.scale, -limit, limit)), 0.0f, top);
    } else if constexpr (kKind == ZeroKind::kFloat) {
      return clamp(round_even(clamp(x / p.scale + p.zero, -limit, limit)), 0.0f, top);
    } else {
      return clamp(round_even(clamp(x / p.scale, -limit, limit)) + p.zero, 0.0f, top);
    }
  }
  uint8_t code(float x) const { return static_cast<uint8_t>(static_cast<int>(rounded_code(x))); }
  // What the scale multiplies, and the weight itself.
  float level(float x) const {
    const float q = rounded_code(x);
    return kKind == ZeroKind::kOffset ? q : q - p.zero;
  }
  float value(float x) const {
    const float scaled = level(x) * p.scale;
    return kKind == ZeroKind::kOffset ? scaled + p.offset : scaled;
  }
};

// Code books that are floats: round to nearest even.
template <class Float>
struct FloatEncoder {
  Affine p;
  float max;

  float scaled(float x) const { return clamp(x / p.scale, -max, max); }
  uint8_t code(float x) const { return Float::encode(scaled(x)); }
  float level(float x) const { return Float::nearest(scaled(x)); }
  float value(float x) const { return level(x) * p.scale; }
};

// NF4: the nearest of 16 levels; a tie goes to the lower one.
struct Nf4Encoder {
  Affine p;
  float levels[16], middle[15];

  explicit Nf4Encoder(const float* table) : p{} {
    for (int i = 0; i < 16; ++i) levels[i] = table[i];
    for (int i = 0; i < 15; ++i) middle[i] = (table[i] + table[i + 1]) * 0.5f;
  }
  uint8_t code(float x) const {
    const float t = x / p.scale;
    int index = 0;
    for (int i = 0; i < 15; ++i) index += t > middle[i];
    return static_cast<uint8_t>(index);
  }
  float level(float x) const {
    const float t = x / p.scale;
    float nearest = levels[0];
#pragma GCC unroll 15
    for (int i = 0; i < 15; ++i) {
      const float above = levels[i + 1];  // loaded in any case, so that the choice is a blend
      nearest = t > middle[i] ? above : nearest;
    }
    return nearest;
  }
  float value(float x) const { return level(x) * p.scale; }
};

// body(i, j) for element i in lane j = i % 16: a loop of exactly 16 where it can be, so that it becomes vectors.
template <class Body>
inline void for_lanes(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    for (int j = 0; j < 16; ++j) body(i + j, j);
  }
  for (int j = 0; i + j < count; ++j) body(i + j, j);
}

inline double lane_total(const double (&lanes)[16]) {
  double total = 0;
  for (double lane : lanes) total += lane;
  return total;
}

template <class Encoder>
double squared_error(const QuantizeJob& job, const Encoder& encoder) {
  double lanes[16] = {};
  const Encoder e = encoder;  // a copy that nothing can alias
  const float* x = job.values;
  if (job.importance == nullptr) {
    for_lanes(job.count, [&](int64_t i, int j) {
      const double difference = static_cast<double>(x[i]) - static_cast<double>(e.value(x[i]));
      lanes[j] += difference * difference;
    });
  } else {
    const float* importance = job.importance;
    for_lanes(job.count, [&](int64_t i, int j) {
      const double difference = static_cast<double>(x[i]) - static_cast<double>(e.value(x[i]));
      lanes[j] += static_cast<double>(importance[i]) * (difference * difference);
    });
  }
  return lane_total(lanes);
}

// Least squares for x ~ level * scale (+ offset), given the codes that `e` chooses.
template <ZeroKind kKind, class Encoder>
Affine refit(const QuantizeJob& job, const Encoder& e) {
  double w[16] = {}, l[16] = {}, ll[16] = {}, x[16] = {}, lx[16] = {};
  for_lanes(job.count, [&](int64_t i, int j) {
    const double value = job.values[i];
    const double level = e.level(job.values[i]);
    const double weight = job.importance == nullptr ? 1.0 : static_cast<double>(job.importance[i]);
    w[j] += weight;
    l[j] += weight * level;
    ll[j] += weight * level * level;
    x[j] += weight * value;
    lx[j] += weight * level * value;
  });
  const double sw = lane_total(w), sl = lane_total(l), sll = lane_total(ll), sx = lane_total(x),
               slx = lane_total(lx);
  Affine p = e.p;
  if constexpr (kKind == ZeroKind::kOffset || kKind == ZeroKind::kFloat) {
    const double determinant = sw * sll - sl * sl;
    if (determinant > 0) {
      const double scale = (sw * slx - sl * sx) / determinant;
      const double offset = (sx - scale * sl) / sw;  // of level, i.e. added to (q - zero) * scale
      p.scale = static_cast<float>(scale);
      p.offset = static_cast<float>(offset);
      if (kKind == ZeroKind::kFloat && scale > 0)
        p.zero = static_cast<float>(static_cast<double>(e.p.zero) - offset / scale);
    }
  } else if (sll > 0) {
    p.scale = static_cast<float>(slx / sll);
  }
  return p;
}

struct Range {
  float low, high, magnitude;
  bool has_nan;
};

inline Range range_of(const float* values, int64_t count) {
  float low[16], high[16];
  int nan = 0;
  for (int j = 0; j < 16; ++j) low[j] = high[j] = values[0];
  for_lanes(count, [&](int64_t i, int j) {
    const float v = values[i];
    low[j] = v < low[j] ? v : low[j];
    high[j] = v > high[j] ? v : high[j];
    nan |= is_nan(v);
  });
  Range r{low[0], high[0], 0.0f, nan != 0};
  for (int j = 1; j < 16; ++j) {
    r.low = low[j] < r.low ? low[j] : r.low;
    r.high = high[j] > r.high ? high[j] : r.high;
  }
  r.magnitude = -r.low > r.high ? -r.low : r.high;
  return r;
}

// Scale and zero for a group whose range is taken to be `factor` times its own.
template <ZeroKind kKind>
Affine affine_of(const QuantizeJob& job, const Range& r, float factor) {
  const float top = static_cast<float>((1 << job.bits) - 1);
  Affine p{1.0f, 0.0f, 0.0f};
  if constexpr (kKind == ZeroKind::kNone) {
    p.scale = rounded_scale(r.magnitude * factor / job.max, job.scale_dtype);
    p.zero = static_cast<float>(1 << (job.bits - 1));
  } else if constexpr (kKind == ZeroKind::kOffset) {
    const float middle = (r.low + r.high) * 0.5f;
    p.scale = rounded_scale((r.high - r.low) * factor / top, job.scale_dtype);
    p.offset =
        rounded(factor == 1.0f ? r.low : middle - (middle - r.low) * factor, job.scale_dtype);
  } else {
    // Zero stays inside the range, so that an exact 0 is never lost and integer zeros fit their codes.
    const float low = (r.low < 0.0f ? r.low : 0.0f) * factor;
    const float high = (r.high > 0.0f ? r.high : 0.0f) * factor;
    p.scale = rounded_scale((high - low) / top, job.scale_dtype);
    p.zero = kKind == ZeroKind::kInt
                 ? clamp(round_even(clamp(-low / p.scale, 0.0f, 65536.0f)), 0.0f, top)
                 : rounded(-low / p.scale, job.scale_dtype);
  }
  return p;
}

template <ZeroKind kKind>
Affine round_to_storage(Affine p, ScaleDtype dtype) {
  p.scale = rounded_scale(p.scale, dtype);
  if (kKind == ZeroKind::kFloat) p.zero = rounded(p.zero, dtype);
  if (kKind == ZeroKind::kOffset) p.offset = rounded(p.offset, dtype);
  return p;
}

// `e` holds round-to-nearest's parameters; afterwards the best found.
template <ZeroKind kKind, class Encoder>
void search_scale(const QuantizeJob& job, const Range& range, Encoder& e) {
  constexpr int kSteps = 64;
  double best = squared_error(job, e);
  Encoder candidate = e;
  const auto try_candidate = [&](const Affine& p) {
    candidate.p = p;
    if (!(p.scale != 0.0f && p.scale - p.scale == 0.0f)) return false;  // neither 0 nor Inf nor NaN
    const double error = squared_error(job, candidate);
    if (!(error < best)) return false;
    best = error;
    e.p = p;
    return true;
  };
  // Symmetric integers reach further down (-8) than up (7): a negative scale gives the long side to a positive extreme.
  const bool reaches_down = kKind == ZeroKind::kNone && job.code == nullptr;
  const float sign = reaches_down && range.high > -range.low ? -1.0f : 1.0f;
  for (int i = 0; i < kSteps && best > 0; ++i) {
    // 0.40 .. 1.15 of the range: two bits want to clip half of it, symmetric codes gain by reaching a little further.
    const float factor = 0.40f + 0.012f * static_cast<float>(i);
    try_candidate(affine_of<kKind>(job, range, sign * factor));
  }
  for (int i = 0; i < 4 && best > 0; ++i) {
    if (!try_candidate(round_to_storage<kKind>(refit<kKind>(job, e), job.scale_dtype))) break;
  }
}

template <ZeroKind kKind, class Encoder>
void quantize_with(const QuantizeJob& job, Encoder e) {
  const Range range = range_of(job.values, job.count);
  e.p = affine_of<kKind>(job, range, 1.0f);
  const float quiet_nan = bits_float(0x7fc00000u);
  const bool finite = !range.has_nan && range.high - range.low < bits_float(0x7f800000u) &&
                      e.p.scale < bits_float(0x7f800000u);
  if (range.has_nan) e.p = {quiet_nan, kKind == ZeroKind::kInt ? 0.0f : e.p.zero, quiet_nan};
  if (finite && job.search) search_scale<kKind>(job, range, e);
  for (int64_t i = 0; i < job.count; ++i) job.codes[i] = e.code(job.values[i]);
  store_rounded(e.p.scale, job.scale_dtype, job.scale);
  if constexpr (kKind == ZeroKind::kInt)
    *job.zero = static_cast<uint8_t>(static_cast<int>(clamp(e.p.zero, 0.0f, 255.0f)));
  if constexpr (kKind == ZeroKind::kFloat) store_rounded(e.p.zero, job.scale_dtype, job.zero);
  if constexpr (kKind == ZeroKind::kOffset) store_rounded(e.p.offset, job.scale_dtype, job.zero);
}

template <int kExponentBits, int kMantissaBits>
void quantize_float(const QuantizeJob& job) {
  quantize_with<ZeroKind::kNone>(
      job, FloatEncoder<SmallFloat<kExponentBits, kMantissaBits>>{{}, job.max});
}

void quantize_group(const QuantizeJob& job) {
  const float top = static_cast<float>((1 << job.bits) - 1);
  switch (job.format) {
    case Format::kFp8E4m3:
      return quantize_float<4, 3>(job);
    case Format::kFp8E5m2:
      return quantize_float<5, 2>(job);
    case Format::kFp4E2m1:
      return quantize_float<2, 1>(job);
    case Format::kNf4:
      return quantize_with<ZeroKind::kNone>(job, Nf4Encoder(job.code));
    default:
      break;
  }
  switch (job.zero_kind) {
    case ZeroKind::kNone:
      return quantize_with<ZeroKind::kNone>(job, IntEncoder<ZeroKind::kNone>{{}, top});
    case ZeroKind::kInt:
      return quantize_with<ZeroKind::kInt>(job, IntEncoder<ZeroKind::kInt>{{}, top});
    case ZeroKind::kFloat:
      return quantize_with<ZeroKind::kFloat>(job, IntEncoder<ZeroKind::kFloat>{{}, top});
    case ZeroKind::kOffset:
      return quantize_with<ZeroKind::kOffset>(job, IntEncoder<ZeroKind::kOffset>{{}, top});
  }
}
