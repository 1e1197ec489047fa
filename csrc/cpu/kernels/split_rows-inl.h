// Float activations as integers of a few int8 digits, exactly: what gemm_planes multiplies.
//
// Over a segment of K (a group of the weight, at most 256 long) x[k] = v[k] * 2^e with one e, and v = sum_p 256^p d[p]
// with digits in [-128, 127]. Two planes hold every bf16 of a window of eight octaves, four every fp32 of seven
// and every fp16 of twenty. An element outside of the window is not rounded but *spilled*: its integer is 0, and the
// kernel adds it in fp32. So an outlier costs time and never accuracy. The window starts at the largest magnitude, which
// spills one or two in a hundred of Gaussian values; where it spills more than an eighth, the window that spills
// fewest is looked for. NaN and infinity are always spilled.

// The exponent of the largest integer, and the octaves in which no significand loses a bit.
struct PlaneWindow {
  int top, octaves;
  float limit;  // of the integers
};

inline PlaneWindow plane_window(int planes) {
  if (planes == 2) return {14, 8, 32639.0f};  // 127 * 256 + 127
  return {29, 7, 1073741823.0f};
}

inline uint32_t bits_of_float(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}

inline float power_of_two(int exponent) {
  const uint32_t bits = static_cast<uint32_t>(exponent + 127) << 23;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

enum : int { kMinExponent = -126 };

// Integers of x * 2^-e; those that are not exact become 0. Returns how many did. Buffers hold whole vectors.
inline int to_integers(const float* x, int64_t count, float scale, float limit, int32_t* v) {
  const V::F unit = V::set1(scale), high = V::set1(limit), low = V::set1(-limit);
  const V::I one = V::iset1(1);
  V::I exact = V::izero();
  for (int64_t i = 0; i < count; i += 16) {
    const V::F y = V::mul(V::load(x + i), unit);
    const V::I integers =
        V::to_i(V::clamp(y, low, high));  // NaN becomes a limit, and equal to nothing
    const V::F back = V::to_f(integers);
    V::istore(reinterpret_cast<uint8_t*>(v + i), V::keep_equal(back, y, integers));
    exact = V::iadd(exact, V::keep_equal(back, y, one));
  }
  int32_t lanes[16];
  V::istore(reinterpret_cast<uint8_t*>(lanes), exact);
  int hits = 0;
  for (int i = 0; i < 16; ++i) hits += lanes[i];
  return static_cast<int>(count) - hits;
}

// The exponent at the top of the window that holds the most of x.
inline int best_top(const float* x, int64_t count, const PlaneWindow& window) {
  int32_t histogram[256 + 16] = {};  // by biased exponent; zeros fit anywhere
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t exponent = bits_of_float(x[i]) >> 23 & 0xff;
    if (exponent != 0 && exponent != 255) ++histogram[exponent];
  }
  int32_t inside = 0, most = -1;
  int best = 1;
  for (int top = 1; top < 255; ++top) {
    inside += histogram[top] - (top > window.octaves ? histogram[top - window.octaves] : 0);
    if (inside >=
        most) {  // of two that are as good the upper one: it also holds odd values below its octaves
      most = inside;
      best = top;
    }
  }
  return best - 127;
}

// Fills v and returns the exponent of its unit.
inline int split_segment(const float* x, int64_t count, const PlaneWindow& window, int32_t* v,
                         int* missed) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t magnitude = bits_of_float(x[i]) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  const int first = static_cast<int>(largest >> 23) - 127;  // 128 with a NaN or an infinity
  int exponent = (first < 128 ? first : 127) - window.top;
  // 2^-e must be a normal number too; what is smaller than its window is spilled.
  if (exponent < kMinExponent) exponent = kMinExponent;
  *missed = to_integers(x, count, power_of_two(-exponent), window.limit, v);
  if (*missed * 8 <= count) return exponent;
  exponent = best_top(x, count, window) - window.top;
  if (exponent < kMinExponent) exponent = kMinExponent;
  *missed = to_integers(x, count, power_of_two(-exponent), window.limit, v);
  return exponent;
}

// Digits of one segment (v is used up), at to[k / 4 * step + plane * 4 + k % 4].
inline void store_digits(int32_t* v, int64_t count, int planes, int64_t step, int8_t* to,
                         SplitSegment* segment) {
  int8_t digits[4][kSplitSegment];
  int32_t sums[4] = {};
  for (int p = 0; p < planes; ++p) {
    int32_t sum = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int8_t digit = static_cast<int8_t>(v[i]);
      digits[p][i] = digit;
      sum += digit;
      v[i] = (v[i] + 128) >> 8;  // (v - digit) / 256: what the digits above have to hold
    }
    sums[p] = sum;
  }
  for (int64_t quad = 0; quad < count / 4; ++quad) {
    for (int p = 0; p < planes; ++p)
      __builtin_memcpy(to + quad * step + p * 4, digits[p] + quad * 4, 4);
  }
  segment->low = sums[0] + 256 * sums[1];
  segment->high = sums[2] + 256 * sums[3];
}

// Rows are taken in tiles: as many as registers hold sums for, at most four, then half as many, and so on down to one.
template <int P>
constexpr int kPlaneRows = V::kPlaneSums / P >= 8   ? 4
                           : V::kPlaneSums / P >= 2 ? 2
                                                    : 1;

// How many rows are in the tile that begins at m.
inline int64_t rows_of_tile(int64_t M, int64_t m, int planes) {
  int64_t rows = planes == 2 ? kPlaneRows<2> : kPlaneRows<4>;
  while (rows > M - m) rows /= 2;
  return rows;
}

inline void split_row(const SplitJob& job, int64_t m) {
  const PlaneWindow window = plane_window(job.plane_count);
  const float* x = job.values + m * job.stride;
  int64_t first = 0, rows = rows_of_tile(job.M, 0, job.plane_count);
  while (first + rows <= m) {
    first += rows;
    rows = rows_of_tile(job.M, first, job.plane_count);
  }
  const int64_t step = rows * job.plane_count * 4;
  int8_t* to =
      job.planes + first * job.stride * job.plane_count + (m - first) * job.plane_count * 4;
  SplitSegment* segment = job.split + m * job.groups * job.segments_per_group;
  Spilled* spilled = job.spilled + m * job.stride;
  int32_t count = 0;
  for (int64_t s = 0; s < job.groups * job.segments_per_group; ++s, ++segment) {
    const int64_t g = s / job.segments_per_group;
    const int64_t group_end = g + 1 == job.groups ? job.stride : (g + 1) * job.group_size;
    const int64_t begin = g * job.group_size + s % job.segments_per_group * job.segment;
    const int64_t end = begin + job.segment < group_end ? begin + job.segment : group_end;
    *segment = {1.0f, 0, 0, 0.0f};
    if (begin >= end) continue;  // the ragged last group has fewer segments
    int32_t v[kSplitSegment];
    int missed;
    const int exponent = split_segment(x + begin, end - begin, window, v, &missed);
    segment->scale = power_of_two(exponent);
    for (int64_t k = begin; missed > 0 && k < end; ++k) {
      if (v[k - begin] == 0 && x[k] != 0.0f)
        spilled[count++] = {static_cast<uint32_t>(k), static_cast<uint32_t>(g), x[k]};
    }
    store_digits(v, end - begin, job.plane_count, step, to + begin / 4 * step, segment);
    segment->total =
        (static_cast<float>(segment->high) * 65536.0f + static_cast<float>(segment->low)) *
        segment->scale;
  }
  job.spilled_counts[m] = count;
}

void split_rows(const SplitJob& job, int64_t row_begin, int64_t row_end) {
  for (int64_t m = row_begin; m < row_end; ++m) split_row(job, m);
}
