// The weight quantizer: one group of values -> codes, scale, zero. Included after quantize/search-inl.h, which has the
// arithmetic; here are the loops and sums over a group.
//
// Sums run over 16 fixed lanes, so that they are the same on every ISA (and on a GPU).

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
    for_lanes(job.count, [&](int64_t i, int j) { lanes[j] += error_term(x[i], e.value(x[i])); });
  } else {
    const float* importance = job.importance;
    for_lanes(job.count, [&](int64_t i, int j) {
      lanes[j] += static_cast<double>(importance[i]) * error_term(x[i], e.value(x[i]));
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
  return refit_of<kKind>(
      {lane_total(w), lane_total(l), lane_total(ll), lane_total(x), lane_total(lx)}, e.p);
}

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

inline CodeGrid grid_of(const QuantizeJob& job) {
  return {{job.scale_dtype, job.super_scale},
          job.bits,
          job.max,
          mirror_of(job.format),
          has_zero(job.format)};
}

// `e` holds round-to-nearest's parameters; afterwards the best found.
template <ZeroKind kKind, class Encoder>
void search_scale(const QuantizeJob& job, const Range& range, Encoder& e) {
  const CodeGrid grid = grid_of(job);
  double best = squared_error(job, e);
  Encoder candidate = e;
  const auto try_candidate = [&](const Affine& p) {
    candidate.p = p;
    if (!usable_scale(p.scale)) return false;
    const double error = squared_error(job, candidate);
    if (!(error < best)) return false;
    best = error;
    e.p = p;
    return true;
  };
  for (int i = 0; i < search_steps(grid) && best > 0; ++i)
    try_candidate(affine_of<kKind>(grid, range, search_factor<kKind>(grid, range, i)));
  for (int i = 0; i < kSearchRefits && best > 0; ++i) {
    if (!try_candidate(round_to_storage<kKind>(refit<kKind>(job, e), grid.scales))) break;
  }
}

template <ZeroKind kKind, class Encoder>
void quantize_with(const QuantizeJob& job, Encoder e) {
  const Range range = range_of(job.values, job.count);
  e.p = affine_of<kKind>(grid_of(job), range, 1.0f);
  const bool search = job.search && searchable(range, e.p);
  if (range.has_nan) e.p = with_nan<kKind>(e.p);
  if (search) search_scale<kKind>(job, range, e);
  for (int64_t i = 0; i < job.count; ++i) job.codes[i] = e.code(job.values[i]);
  store_scale(e.p.scale, grid_of(job).scales, job.scale);
  store_zero<kKind>(e.p, job.scale_dtype, job.zero);
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
    case Format::kIq4Nl:
    case Format::kBnbFp4:
      return quantize_with<ZeroKind::kNone>(job, BookEncoder(job.code));
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
