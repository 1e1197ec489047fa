// quantize: which encoder and which division of labour a weight gets. The kernel is in quantize.cuh.
#include <algorithm>

#include "cuda/code_values.cuh"
#include "cuda/kernels/quantize.cuh"
#include "formats/format_table.h"

namespace lowbit::cuda {
namespace {

template <ZeroKind kKind>
struct Integers {
  using Encoder = rules::IntEncoder<kKind>;
  __device__ static Encoder make(const QuantizeLaunch& p) {
    return {{}, static_cast<float>((1 << p.grid.bits) - 1)};
  }
};
template <int kExponentBits, int kMantissaBits>
struct Floats {
  using Encoder = rules::FloatEncoder<rules::SmallFloat<kExponentBits, kMantissaBits>>;
  __device__ static Encoder make(const QuantizeLaunch& p) { return {{}, p.grid.max}; }
};
struct Book {
  using Encoder = rules::BookEncoder;
  __device__ static Encoder make(const QuantizeLaunch& p) { return Encoder(p.levels); }
};

template <class Source>
__global__ void __launch_bounds__(kQuantizeThreads, 3) quantize_kernel(const QuantizeLaunch p) {
  quantize_group(p, Source::make(p));
}

// From this length on a group is a block's: its teams then share the search, and the codes.
constexpr int64_t kLongGroup = 1024;

template <class Source>
void start(QuantizeLaunch p, Stream stream) {
  const CanonicalParams& c = p.q.shape;
  const int64_t rows = c.blocks128 ? div_up(c.N, 128) : c.N;
  const int64_t length = c.blocks128 ? c.group_size * (c.N < 128 ? c.N : 128) : c.group_size;
  p.groups = rows * c.groups;
  p.shared_groups = length >= kLongGroup;
  const int64_t blocks = p.shared_groups ? p.groups : div_up(p.groups, kTeams);
  LOWBIT_CHECK(blocks < (int64_t{1} << 31), "quantize: N=", c.N, " K=", c.K, " has ", p.groups,
               " groups, too many for one launch");
  launch("quantize", quantize_kernel<Source>, Grid{static_cast<uint32_t>(blocks), 1, 1},
         kQuantizeThreads, kQuantizeShared, stream, p);
}

void start_integers(const QuantizeLaunch& p, Stream stream) {
  switch (p.q.shape.zero_kind) {
    case ZeroKind::kNone:
      return start<Integers<ZeroKind::kNone>>(p, stream);
    case ZeroKind::kInt:
      return start<Integers<ZeroKind::kInt>>(p, stream);
    case ZeroKind::kOffset:
      return start<Integers<ZeroKind::kOffset>>(p, stream);
#if !defined(LOWBIT_EMULATOR_ONE_FORMAT)
    case ZeroKind::kFloat:
      return start<Integers<ZeroKind::kFloat>>(p, stream);
#endif
    default:
      fail("quantize: no kernel for zero_kind=", static_cast<int>(p.q.shape.zero_kind),
           " in this build");
  }
}

}  // namespace

void launch_quantize(const QuantizeParams& q, Stream stream) {
  const FormatInfo& info = format_info(q.shape.format);
  const rules::CodeGrid grid{{q.shape.scale_dtype, 1.0f},
                             info.bits,
                             info.max,
                             rules::mirror_of(q.shape.format),
                             rules::has_zero(q.shape.format)};
  QuantizeLaunch p{q, grid, 0, false, {}};
  if (has_book(q.shape.format)) std::copy_n(info.code, 16, p.levels);
  switch (codec_of(q.shape.format)) {
    case Format::kFp8E4m3:
      return start<Floats<4, 3>>(p, stream);
#if !defined(LOWBIT_EMULATOR_ONE_FORMAT)
    case Format::kFp8E5m2:
      return start<Floats<5, 2>>(p, stream);
    case Format::kFp4E2m1:
      return start<Floats<2, 1>>(p, stream);
    case kBookCodec:
      return start<Book>(p, stream);
#endif
    default:
      start_integers(p, stream);
  }
}

}  // namespace lowbit::cuda
