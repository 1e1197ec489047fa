// How tile kernels cut K: segments, which end where sums take a scale; runs, the pieces of segments that one panel
// holds; panels, the weights that are decoded at a time.
//
//   segments  |----------- 0 -----------|----------- 1 -----------|-- 2 --|        groups, or all of K
//   panels    |------- 0 -------|------- 1 -------|------- 2 -------|-- 3 --|      8 steps of K each
//   runs      |------- 0 -------|-- 0 --|--- 1 ---|------- 1 -------|-- 2 --|
//
// Included after V.

// Steps of K in a panel, each one tile of A and one of B. Two strips of a panel are 16 KiB, and so are 32 rows of x.
enum : int { kPanelSteps = 8 };

struct Run {
  int64_t k0, segment;
  int blocks;        // of 32 k
  int steps;         // tiles; the last may be half a tile of int8
  int step0;         // within the panel
  bool first, last;  // begins, ends its segment
};

struct Panel {
  int64_t step0;  // tiles of x before it
  int runs;
  Run run[kPanelSteps];
};

// Segments of `segment` k within groups, as gemm_a8's prepared sums have them; per_group = 0: one segment of all of K.
class Panels {
 public:
  Panels(const WeightView& w, int64_t segment, int64_t per_group, int step_k)
      : group_size_(per_group > 0 ? w.group_size : w.K_padded),
        groups_(per_group > 0 ? w.groups : 1),
        per_group_(per_group > 0 ? per_group : 1),
        length_(per_group > 0 ? (segment + 31) / 32 * 32 : w.K_padded),  // all of K may be ragged
        K_padded_(w.K_padded),
        step_k_(step_k) {}

  // The next panel, if there is one.
  bool next(Panel& panel) {
    panel.step0 = step_;
    panel.runs = 0;
    int steps = 0;
    while (steps < kPanelSteps && segment_ < groups_ * per_group_) {
      const int64_t g = segment_ / per_group_;
      const int64_t group_end = g + 1 == groups_ ? K_padded_ : (g + 1) * group_size_;
      const int64_t begin = g * group_size_ + segment_ % per_group_ * length_;
      const int64_t end = begin + length_ < group_end ? begin + length_ : group_end;
      if (begin >= end) {  // the ragged last group has fewer segments
        ++segment_;
        continue;
      }
      const int64_t k0 = begin + done_, room = (kPanelSteps - steps) * step_k_;
      const int64_t count = end - k0 < room ? end - k0 : room;
      const bool last = k0 + count == end;
      Run& run = panel.run[panel.runs++];
      run = {k0,
             segment_,
             static_cast<int>(count / 32),
             static_cast<int>((count + step_k_ - 1) / step_k_),
             steps,
             done_ == 0,
             last};
      steps += run.steps;
      done_ = last ? 0 : done_ + count;
      if (last) ++segment_;
    }
    step_ += steps;
    return steps > 0;
  }

 private:
  int64_t group_size_, groups_, per_group_, length_, K_padded_;
  int64_t step_k_;
  int64_t segment_ = 0, done_ = 0, step_ = 0;
};

// Tiles of 16 rows of x in one plane.
inline int64_t tile_steps(const WeightView& w, int64_t segment, int64_t per_group, int step_k) {
  Panels panels(w, segment, per_group, step_k);
  Panel panel;
  int64_t steps = 0;
  while (panels.next(panel)) {
    const Run& run = panel.run[panel.runs - 1];
    steps = panel.step0 + run.step0 + run.steps;
  }
  return steps;
}
