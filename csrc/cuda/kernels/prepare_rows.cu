// Rows of activations in the form that the GEMM kernels copy: columns gathered by perm, zeros up to `columns`, rows on
// 16-byte boundaries. And, after gemm_grad_input, columns scattered back.
//
// A thread makes 16 bytes of the result: neighbouring lanes write 512 bytes of a row. It does so for four rows, because
// the indices of its columns are the same in each and cost as many bytes as the elements. Elements are read one by one
// (rows come here because they are gathered, or start anywhere), within a few KB that L1 holds.
#include "common/check.h"
#include "cuda/elements.cuh"
#include "cuda/launch.cuh"
#include "cuda/launchers.h"

namespace lowbit::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = 4;  // per thread

// kSize: bytes of an element.
template <int kSize>
struct Bits {
  using Type = uint16_t;
};
template <>
struct Bits<1> {
  using Type = uint8_t;
};

struct PrepareParams {
  const void* from;
  int64_t M, K, stride, columns;
  const int32_t* perm;
  void* to;
  uint32_t blocks_per_row;
  RowOrder order;
};

// Which of 16 bytes in memory stands at place i in the order of codec/bytes.cuh.
__device__ constexpr int ordered(int i) { return i / 4 * 2 + i % 4 / 2 + 8 * (i % 2); }

// Elements [k0, k0 + 16 / kSize) of a row of the result, as 16 bytes; `index` says which columns of x they are.
template <int kSize>
__device__ uint4 gather(const typename Bits<kSize>::Type* row, const int32_t (&index)[16 / kSize]) {
  constexpr int kCount = 16 / kSize, kPerWord = 4 / kSize;
  uint32_t words[4] = {};
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (inside(-1, index[i]))
      words[i / kPerWord] |= static_cast<uint32_t>(row[index[i]]) << (i % kPerWord * kSize * 8);
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

template <int kSize>
__global__ void __launch_bounds__(kThreads) prepare_rows_kernel(const PrepareParams p) {
  using T = typename Bits<kSize>::Type;
  constexpr int kCount = 16 / kSize;
  const int64_t m0 = blockIdx.x / p.blocks_per_row * int64_t{kRows};
  const int64_t k0 = (blockIdx.x % p.blocks_per_row * int64_t{kThreads} + threadIdx.x) * kCount;
  if (!inside(k0, p.columns)) return;
  int32_t index[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int64_t k = k0 + (p.order == RowOrder::kBytes ? ordered(i) : i);
    index[i] = !inside(k, p.K) ? -1 : p.perm == nullptr ? static_cast<int32_t>(k) : p.perm[k];
  }
  uint4 made[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (!inside(m0 + r, p.M)) continue;
    const T* row = static_cast<const T*>(p.from) + (m0 + r) * p.stride;
    made[r] = gather<kSize>(row, index);
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (inside(m0 + r, p.M))
      *reinterpret_cast<uint4*>(static_cast<T*>(p.to) + (m0 + r) * p.columns + k0) = made[r];
  }
}

template <int kSize>
void prepare(const PrepareParams& p, Stream stream) {
  const int64_t blocks = int64_t{p.blocks_per_row} * div_up(p.M, kRows);
  LOWBIT_CHECK(blocks < (int64_t{1} << 31), "prepare_rows: M=", p.M, " K=", p.K,
               " is too large for one launch");
  launch("prepare_rows", prepare_rows_kernel<kSize>, Grid{static_cast<uint32_t>(blocks), 1, 1},
         kThreads, 0, stream, p);
}

// ---- dx back into the original order -----------------------------------------------------------------------------------

struct ScatterParams {
  const void* from;  // [M, K]
  int64_t K;
  const int32_t* perm;
  void* to;
  int64_t staged;  // bytes of a row in shared memory; 0: written where it belongs directly
};

// A block per row: put together in shared memory where it fits, so that it leaves in the order of its addresses.
__global__ void __launch_bounds__(kThreads) scatter_columns_kernel(const ScatterParams p) {
  const uint16_t* from = static_cast<const uint16_t*>(p.from) + blockIdx.x * p.K;
  uint16_t* row = static_cast<uint16_t*>(p.to) + blockIdx.x * p.K;
  uint16_t* to = p.staged > 0 ? reinterpret_cast<uint16_t*>(dynamic_shared()) : row;
  for (int64_t k = threadIdx.x; inside(k, p.K); k += kThreads) to[p.perm[k]] = from[k];
  if (p.staged == 0) return;
  ptx::sync_block();
  for (int64_t k = threadIdx.x; inside(k, p.K); k += kThreads) row[k] = to[k];
}

void scatter(ScatterParams p, int64_t M, Stream stream) {
  const int64_t bytes = p.K * 2;
  p.staged = bytes <= 48 * 1024 ? bytes : 0;  // what every device gives without being asked
  LOWBIT_CHECK(M < (int64_t{1} << 31), "scatter_columns: M=", M, " is too large for one launch");
  launch("scatter_columns", scatter_columns_kernel, Grid{static_cast<uint32_t>(M), 1, 1}, kThreads,
         p.staged, stream, p);
}

}  // namespace

void launch_prepare_rows(const RowsParams& x, int64_t K, const int32_t* perm, RowOrder order,
                         void* to, int64_t columns, Stream stream) {
  const int size = element_bytes(x.type);
  LOWBIT_CHECK(size <= 2, "prepare_rows: the general kernel takes fp32 activations as they are");
  LOWBIT_CHECK(columns >= K && is_aligned(to, columns * size, 16), "prepare_rows: rows of ",
               columns, " elements of ", size,
               " bytes are not whole 16-byte pieces that hold K=", K);
  LOWBIT_CHECK(size == 1 || order == RowOrder::kPlain, "prepare_rows: elements of ", size,
               " bytes have no order of bytes");
  const PrepareParams p{
      x.data,  x.M,  K,  x.stride,
      columns, perm, to, static_cast<uint32_t>(div_up(columns * size, 16 * kThreads)),
      order};
  if (size == 2) return prepare<2>(p, stream);
  prepare<1>(p, stream);
}

void launch_scatter_columns(const void* from, int64_t M, int64_t K, const int32_t* perm,
                            Element type, void* to, Stream stream) {
  LOWBIT_CHECK(element_bytes(type) == 2,
               "scatter_columns: only the kernels of 16-bit activations need it");
  scatter(ScatterParams{from, K, perm, to, 0}, M, stream);
}

}  // namespace lowbit::cuda
