#include "packing/canonical.h"

#include "common/check.h"

namespace lowbit {

CanonicalShape canonical_shape(int64_t N, int64_t K, const Desc& desc) {
  LOWBIT_CHECK(N >= 1 && K >= 1, "a weight needs N >= 1 and K >= 1, got N=", N, " K=", K);
  // Bounds that keep every byte count below 2^62, so that no later product can overflow.
  LOWBIT_CHECK(N <= (int64_t{1} << 28) && K <= (int64_t{1} << 28), "N=", N, " K=", K,
               " exceed the supported 2^28");
  const FormatInfo& info = format_info(desc.format);
  LOWBIT_CHECK(desc.scaling == Scaling::kBlock128 || desc.group_size <= round_up(K, 8),
               "group_size=", desc.group_size, " exceeds K=", K,
               "; use -1 for one group over all of K");
  CanonicalShape s{};
  s.N = N;
  s.K = K;
  s.bits = info.bits;
  s.group_size = desc.group_size == -1 ? K : desc.group_size;
  s.groups = div_up(K, s.group_size);
  s.row_bytes = packed_row_bytes(K, info.bits);
  s.scale_rows = desc.scaling == Scaling::kBlock128 ? div_up(N, 128) : N;
  s.scale_bytes = desc.scale_dtype == ScaleDtype::kFloat32 ? 4 : 2;
  s.zero_bytes = desc.zero_kind == ZeroKind::kNone  ? 0
                 : desc.zero_kind == ZeroKind::kInt ? 1
                                                    : s.scale_bytes;
  s.has_perm = desc.has_perm;
  return s;
}

}  // namespace lowbit
