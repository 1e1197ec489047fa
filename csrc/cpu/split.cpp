#include "cpu/split.h"

#include <algorithm>

#include "common/tensor.h"
#include "cpu/plane_shape.h"
#include "cpu/workspace.h"

namespace lowbit {

int64_t split_scratch_bytes(int64_t M, const CpuTile16& tile) {
  const int64_t rows = std::min<int64_t>(M, kMaxPlaneRows);
  const int64_t elements = rows * tile.K_padded;
  return scratch_bytes(elements, sizeof(float)) + scratch_bytes(elements * kMostPlanes, 1) +
         scratch_bytes(elements, sizeof(Spilled)) + scratch_bytes(rows, sizeof(int32_t)) +
         scratch_bytes(rows * tile.shape.groups * PlaneSegments(tile.shape.group_size).per_group,
                       sizeof(SplitSegment));
}

SplitRows::SplitRows(const WeightView& w, Element dtype, int64_t M, Scratch& scratch) {
  const int64_t rows = std::min<int64_t>(M, kMaxPlaneRows), elements = rows * w.K_padded;
  job_.stride = w.K_padded;
  job_.group_size = w.group_size;
  job_.groups = w.groups;
  job_.segment = PlaneSegments(w.group_size).length;
  job_.segments_per_group = PlaneSegments(w.group_size).per_group;
  job_.plane_count = plane_count(dtype);
  job_.values = values_ = scratch.take<float>(elements);
  job_.planes = scratch.take<int8_t>(elements * job_.plane_count);
  job_.spilled = scratch.take<Spilled>(elements);
  job_.spilled_counts = scratch.take<int32_t>(rows);
  job_.split = scratch.take<SplitSegment>(rows * w.groups * job_.segments_per_group);
}

void SplitRows::prepare(const IsaKernels& isa, const RowSource& from, int64_t m0, Activations& x) {
  x.stride = job_.stride;
  x.segment = job_.segment;
  x.segments_per_group = job_.segments_per_group;
  x.plane_count = job_.plane_count;
  x.planes = job_.planes;
  x.split = job_.split;
  x.spilled = job_.spilled;
  x.spilled_counts = job_.spilled_counts;
  job_.M = x.M;
  // An element takes about half a nanosecond, sixteen times as long as an int8 product.
  parallel_items(x.M, from.K * 16, [&](int64_t begin, int64_t end) {
    isa.load_rows(from, m0 + begin, m0 + end, values_ + begin * job_.stride, job_.stride);
    isa.planes.split_rows(job_, begin, end);
  });
}

}  // namespace lowbit
