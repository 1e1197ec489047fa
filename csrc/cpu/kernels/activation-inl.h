// quantize_activation: one row of fp32 -> int8 or fp8 codes with a scale per token or per group of K.
// Included after quantize/rules-inl.h and quantize-inl.h (range_of).

inline float bounded(float value) { return clamp(value, -65536.0f, 65536.0f); }

inline void int8_row(const QuantizeActivationJob& job) {
  const Range range = range_of(job.x, job.K);
  int8_t* codes = static_cast<int8_t*>(job.codes);
  float scale = 1.0f, zero = 0.0f, low = -128.0f;
  if (job.static_scale != nullptr) {
    scale = *job.static_scale;
    if (job.static_zero != nullptr) zero = static_cast<float>(*job.static_zero);
  } else if (job.symmetric) {
    scale = range.magnitude / 127.0f;
    low = -127.0f;
  } else {
    const float least = range.low < 0.0f ? range.low : 0.0f;
    const float most = range.high > 0.0f ? range.high : 0.0f;
    scale = (most - least) / 255.0f;
    if (scale > 0.0f) zero = clamp(round_even(bounded(-128.0f - least / scale)), -128.0f, 127.0f);
  }
  if (scale == 0.0f) scale = 1.0f;
  if (range.has_nan) scale = bits_float(0x7fc00000u);
  for (int64_t k = 0; k < job.K; ++k) {
    codes[k] = static_cast<int8_t>(
        static_cast<int>(clamp(round_even(bounded(job.x[k] / scale)) + zero, low, 127.0f)));
  }
  *job.scales = scale;
  if (job.zeros != nullptr) *job.zeros = static_cast<int32_t>(zero);
}

inline void fp8_row(const QuantizeActivationJob& job) {
  uint8_t* codes = static_cast<uint8_t*>(job.codes);
  for (int64_t begin = 0, g = 0; begin < job.K; begin += job.group_size, ++g) {
    const int64_t end = begin + job.group_size < job.K ? begin + job.group_size : job.K;
    const Range range = range_of(job.x + begin, end - begin);
    float scale = job.static_scale != nullptr ? *job.static_scale : range.magnitude / 448.0f;
    if (scale == 0.0f) scale = 1.0f;
    if (range.has_nan) scale = bits_float(0x7fc00000u);
    for (int64_t k = begin; k < end; ++k)
      codes[k] = SmallFloat<4, 3>::encode(clamp(job.x[k] / scale, -448.0f, 448.0f));
    job.scales[g] = scale;
  }
}

void quantize_activation_row(const QuantizeActivationJob& job) {
  if (job.format == Element::kInt8) {
    int8_row(job);
  } else {
    fp8_row(job);
  }
}
