#include "cpu/expanded.h"

#include <algorithm>
#include <cstdlib>
#include <new>

namespace lowbit {
namespace {

// Q4_K at M = 1: 123 us with 16, 131 with 8 or 4, 157 with 2 (2048 x 2048, one thread of Zen 4; scales as floats: 109).
constexpr int64_t kMostStrips = 16;
constexpr int64_t kKeptBytes = 4 << 20;

// Kept by the thread, so that a decode step allocates nothing; what is larger goes to the heap and back.
class Buffer {
 public:
  ~Buffer() { std::free(kept_); }
  float* take(int64_t bytes) {
    if (bytes > kKeptBytes) return allocate(bytes);
    if (kept_ == nullptr) kept_ = allocate(kKeptBytes);
    return kept_;
  }
  void give_back(float* memory) {
    if (memory != kept_) std::free(memory);
  }

 private:
  static float* allocate(int64_t bytes) {
    void* memory = std::aligned_alloc(64, static_cast<size_t>(bytes + 63) / 64 * 64);
    if (memory == nullptr) throw std::bad_alloc();
    return static_cast<float*>(memory);
  }
  float* kept_ = nullptr;
};
thread_local Buffer buffer;

}  // namespace

WeightView with_float_scales(const WeightView& w) {
  WeightView view = w;
  view.plain = true;
  view.scale_dtype = ScaleDtype::kFloat32;
  view.scale_bytes = 4;
  view.scales_per_group = 16;
  if (w.zero_kind == ZeroKind::kOffset) view.zero_bytes = 4;
  return view;
}

int64_t float_scales_offset(const WeightView& w, int64_t strip, const float* scales) {
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(scales) -
                              reinterpret_cast<uintptr_t>(w.data + strip * w.strip_bytes));
}

void run_on_floats(const IsaKernels& isa, const GemmJob& job, int64_t begin, int64_t end,
                   GemmKernel kernel) {
  const WeightView& w = job.w;
  if (w.plain) return kernel(job, begin, end);
  const bool offsets = w.zero_kind == ZeroKind::kOffset;
  const int64_t floats = w.groups * 16, bytes = (offsets ? 2 : 1) * floats * 4;
  // From one strip's scales to the next one's it is as far as from strip to strip: one offset then serves all.
  int64_t strips = bytes <= w.strip_bytes ? std::min(kMostStrips, end - begin) : 1;
  while (strips > 1 && (strips - 1) * w.strip_bytes + bytes > kKeptBytes) --strips;
  const int64_t stride = w.strip_bytes / 4;
  float* const memory = buffer.take((strips - 1) * w.strip_bytes + bytes);
  GemmJob plain = job;
  plain.w = with_float_scales(w);
  for (int64_t first = begin; first < end; first += strips) {
    const int64_t last = std::min(first + strips, end);
    for (int64_t strip = first; strip < last; ++strip) {
      float* const scales = memory + (strip - first) * stride;
      isa.expand_scales(w, strip, 0, w.groups, scales, offsets ? scales + floats : nullptr);
    }
    plain.w.scales_offset = float_scales_offset(w, first, memory);
    if (offsets) plain.w.zeros_offset = float_scales_offset(w, first, memory + floats);
    kernel(plain, first, last);
  }
  buffer.give_back(memory);
}

}  // namespace lowbit
