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

// Integers of x * 2^-exponent; those that are not exact become 0, and are marked: element i in bit i % 16 of
// inexact[i / 16]. Returns how many. What is compared is x and not the product: that may have underflowed to 0, which is
// an integer. Whole vectors.
inline int to_integers(const float* x, int64_t count, int exponent, float limit, int32_t* v,
                       uint16_t* inexact) {
  const V::F unit = V::set1(power_of_two(-exponent)), scale = V::set1(power_of_two(exponent));
  const V::F high = V::set1(limit), low = V::set1(-limit);
  int missed = 0;
  for (int64_t i = 0; i < count; i += 16) {
    const V::F from = V::load(x + i);
    // NaN becomes a limit, and equal to nothing
    const V::I integers = V::to_i(V::clamp(V::mul(from, unit), low, high));
    const V::F back = V::mul(V::to_f(integers), scale);
    V::istore(reinterpret_cast<uint8_t*>(v + i), V::keep_equal(back, from, integers));
    const uint32_t bits = V::unequal(back, from);
    inexact[i / 16] = static_cast<uint16_t>(bits);
    missed += __builtin_popcount(bits);
  }
  return missed;
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

// The bits of the largest magnitude that is a number. Whole vectors.
inline uint32_t largest_magnitude(const float* x, int64_t count) {
  const V::F infinity = V::as_f(V::iset1(0x7f800000));
  const V::I magnitude = V::iset1(0x7fffffff);
  V::F most = V::zero();
  for (int64_t i = 0; i < count; i += 16)  // most where x is not a number
    most = V::clamp(V::as_f(V::band(V::as_i(V::load(x + i)), magnitude)), most, infinity);
  uint32_t lanes[16], largest = 0;
  V::istore(reinterpret_cast<uint8_t*>(lanes), V::as_i(most));
  for (uint32_t lane : lanes) largest = lane > largest ? lane : largest;
  return largest;
}

// Fills v and inexact, and returns the exponent of the integers' unit.
inline int split_segment(const float* x, int64_t count, const PlaneWindow& window, int32_t* v,
                         uint16_t* inexact) {
  const uint32_t largest = largest_magnitude(x, count);
  const int first = static_cast<int>(largest >> 23) - 127;  // 128 with an infinity
  int exponent = (first < 128 ? first : 127) - window.top;
  // 2^-e must be a normal number too; what is smaller than its window is spilled.
  if (exponent < kMinExponent) exponent = kMinExponent;
  if (to_integers(x, count, exponent, window.limit, v, inexact) * 8 <= count) return exponent;
  exponent = best_top(x, count, window) - window.top;
  if (exponent < kMinExponent) exponent = kMinExponent;
  to_integers(x, count, exponent, window.limit, v, inexact);
  return exponent;
}

// Digits of one segment, at to[k / 4 * step + plane * 4 + k % 4].
template <int P>
inline void store_digits(const int32_t* v, int64_t count, int64_t step, int8_t* to,
                         SplitSegment* segment) {
  V::I sums[P];
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) sums[p] = V::izero();
  for (int64_t i = 0; i < count; i += 16, to += 4 * step) {
    V::I left = V::iload(reinterpret_cast<const uint8_t*>(v + i));
    uint8_t digits[P][16];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      V::store_bytes(digits[p], left);
      sums[p] = dot_codes<1>(sums[p], V::iset1(1), left);  // the low byte of every lane
      // (v - digit) / 256: what the digits above have to hold. What is shifted in ends above all of them.
      left = V::shr<8>(V::iadd(left, V::iset1(128)));
    }
#pragma GCC unroll 4
    for (int quad = 0; quad < 4; ++quad) {
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p)
        __builtin_memcpy(to + quad * step + p * 4, digits[p] + quad * 4, 4);
    }
  }
  segment->low = V::isum(V::iadd(sums[0], V::shl<8>(sums[1])));
  segment->high = P == 2 ? 0 : V::isum(V::iadd(sums[P - 2], V::shl<8>(sums[P - 1])));
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

// Lists what is marked of x[0..count), which begins at k0, and clears the marks of the last, ragged word.
inline int32_t list_spilled(const SplitJob& job, const float* x, int64_t k0, int64_t count,
                            uint16_t* inexact, Spilled* spilled) {
  int32_t found = 0;
  for (int64_t i = count / 16; i % 4 != 0; ++i) inexact[i] = 0;
  for (int64_t i = 0; i < count; i += 64) {
    uint64_t marks;
    __builtin_memcpy(&marks, inexact + i / 16, 8);
    for (; marks != 0; marks &= marks - 1) {
      const uint32_t k = static_cast<uint32_t>(k0 + i + __builtin_ctzll(marks));
      const uint32_t g = k / static_cast<uint32_t>(job.group_size);
      const uint32_t last = static_cast<uint32_t>(job.groups - 1);  // which padding belongs to
      spilled[found++] = {k, g < last ? g : last, x[k - k0]};
    }
  }
  return found;
}

// Marks of this many elements are gathered before they are looked at: how many a segment has is not to be predicted, and
// a branch on it would wait for all that leads to it.
enum : int64_t { kMarked = 4096 };

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
  uint16_t inexact[kMarked / 16];
  int64_t marked = 0;  // from here on
  int32_t count = 0;
  for (int64_t s = 0; s < job.groups * job.segments_per_group; ++s, ++segment) {
    const int64_t g = s / job.segments_per_group;
    const int64_t group_end = g + 1 == job.groups ? job.stride : (g + 1) * job.group_size;
    const int64_t begin = g * job.group_size + s % job.segments_per_group * job.segment;
    const int64_t end = begin + job.segment < group_end ? begin + job.segment : group_end;
    *segment = {1.0f, 0, 0, 0.0f};
    if (begin >= end) continue;  // the ragged last group has fewer segments
    if (end - marked > kMarked) {
      count += list_spilled(job, x + marked, marked, begin - marked, inexact, spilled + count);
      marked = begin;
    }
    int32_t v[kSplitSegment];
    const int exponent =
        split_segment(x + begin, end - begin, window, v, inexact + (begin - marked) / 16);
    segment->scale = power_of_two(exponent);
    int8_t* digits = to + begin / 4 * step;
    if (job.plane_count == 2) {
      store_digits<2>(v, end - begin, step, digits, segment);
    } else {
      store_digits<4>(v, end - begin, step, digits, segment);
    }
    segment->total =
        (static_cast<float>(segment->high) * 65536.0f + static_cast<float>(segment->low)) *
        segment->scale;
  }
  count += list_spilled(job, x + marked, marked, job.stride - marked, inexact, spilled + count);
  job.spilled_counts[m] = count;
}

void split_rows(const SplitJob& job, int64_t row_begin, int64_t row_end) {
  for (int64_t m = row_begin; m < row_end; ++m) split_row(job, m);
}
