// Calls CPU kernels one by one, for the tests in tests/test_cpu_kernels.py: no torch and no Python, so that it runs
// where they do not (under qemu).
//
// Reads requests from standard input and answers on standard output, both as frames of little-endian numbers:
//
//   request   text (u32 length, bytes) | u32 count, int64 numbers | u32 count, blobs (u64 length, bytes)
//   answer    u32 count, blobs; the first is an error message, empty when there was none
//
// Request texts: "levels", "<level> gemm <kernel>", "<level> grad <kernel>", "<level> load", "<level> store",
// "<level> quantize", "<level> activation", "<level> dequantize". Numbers and blobs stand at the functions below.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <string>
#include <vector>

#include "common/desc.h"
#include "cpu/isa.h"
#include "cpu/kernel_table.h"
#include "cpu/plane_shape.h"
#include "cpu/weight_view.h"
#include "formats/format_table.h"

namespace lowbit {
namespace {

constexpr size_t kGuard = 64;

// Bytes on a 64-byte boundary. What follows them, and outputs before they are written, hold 0xff: NaN.
class Blob {
 public:
  explicit Blob(int64_t size) : size_(static_cast<size_t>(size)) {
    const size_t whole = (size_ + 63) / 64 * 64 + kGuard;
    data_ = static_cast<uint8_t*>(std::aligned_alloc(64, whole));
    std::memset(data_, 0xff, whole);
  }
  Blob(Blob&& other) noexcept : size_(other.size_), data_(other.data_) { other.data_ = nullptr; }
  Blob(const Blob&) = delete;
  Blob& operator=(const Blob&) = delete;
  Blob& operator=(Blob&&) = delete;
  ~Blob() { std::free(data_); }

  size_t size() const { return size_; }
  uint8_t* data() const { return data_; }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }
  template <class T>
  T* or_null() const {
    return size_ == 0 ? nullptr : as<T>();
  }
  bool was_overrun() const {
    return std::any_of(data_ + size_, data_ + size_ + kGuard, [](uint8_t b) { return b != 0xff; });
  }

 private:
  size_t size_;
  uint8_t* data_;
};

Blob blob_of(const std::string& text) {
  Blob b(static_cast<int64_t>(text.size()));
  std::memcpy(b.data(), text.data(), text.size());
  return b;
}

struct Request {
  std::vector<std::string> words;
  std::vector<int64_t> numbers;
  std::vector<Blob> blobs;
};
using Answer = std::vector<Blob>;

const IsaKernels& level_of(const std::string& name) {
  const std::vector<std::string> here = isa_levels();
  if (std::find(here.begin(), here.end(), name) == here.end())
    fail("this CPU cannot run '", name, "'");
  return *kernels_of(name);
}

const KernelRow& row_of(Op op, const std::string& name) {
  for (const KernelRow& row : kernel_table()) {
    if (row.op == op && name == row.name) return row;
  }
  fail("no kernel '", name, "'");
}

struct Weight {
  Desc desc;
  CpuTile16 tile;
  WeightView view;
  const int32_t* perm;

  Weight(int64_t N, int64_t K, int64_t desc_bits, const Blob& w)
      : desc(decode_desc(desc_bits)), tile(cpu_tile16(N, K, desc)) {
    if (static_cast<int64_t>(w.size()) != tile.total_bytes)
      fail("the weight has ", w.size(), " bytes, expected ", tile.total_bytes);
    view = weight_view(tile, desc, w.data());
    perm = desc.has_perm ? reinterpret_cast<const int32_t*>(w.data() + tile.perm_offset) : nullptr;
  }
};

int64_t bytes_of(Element element) {
  return element == Element::kFloat32                                ? 4
         : element == Element::kInt8 || element == Element::kFp8E4m3 ? 1
                                                                     : 2;
}

// bf16 rows of x, gathered and padded; the middle two of every four are exchanged, the order of decode_bf16-inl.h.
void load_bfloats(const Weight& w, const uint16_t* x, int64_t M, uint16_t* to) {
  const int64_t K = w.view.K, stride = w.tile.K_padded;
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t k = 0; k < stride; ++k) {
      const int64_t place = k % 4 == 1 ? k + 1 : k % 4 == 2 ? k - 1 : k;
      to[m * stride + place] = k >= K ? 0 : x[m * K + (w.perm != nullptr ? w.perm[k] : k)];
    }
  }
}

// x [M, K] split into the planes of `row`, and a chunk of at most kMaxPlaneRows of them multiplied.
void multiply_planes(const IsaKernels& isa, const KernelRow& row, const Weight& w,
                     const RowSource& x, int64_t m0, GemmJob job) {
  const int64_t M = job.x.M, elements = M * w.tile.K_padded;
  const PlaneSegments segments(w.view.group_size);
  const int planes = plane_count(x.dtype);
  const Blob values(elements * 4), digits(elements * planes);
  const Blob split(M * w.view.groups * segments.per_group * int64_t{sizeof(SplitSegment)});
  const Blob spilled(elements * int64_t{sizeof(Spilled)}), counts(M * 4);
  isa.load_rows(x, m0, m0 + M, values.as<float>(), w.tile.K_padded);
  const SplitJob to{values.as<float>(),    M,
                    w.tile.K_padded,       w.view.group_size,
                    w.view.groups,         segments.length,
                    segments.per_group,    planes,
                    digits.as<int8_t>(),   split.as<SplitSegment>(),
                    spilled.as<Spilled>(), counts.as<int32_t>()};
  isa.planes.split_rows(to, 0, M / 2);
  isa.planes.split_rows(to, M / 2, M);
  for (const Blob* blob : {&values, &digits, &split, &spilled, &counts}) {
    if (blob->was_overrun()) fail("wrote past the end of a split row");
  }
  job.x.segment = segments.length;
  job.x.segments_per_group = segments.per_group;
  job.x.plane_count = planes;
  job.x.planes = digits.as<int8_t>();
  job.x.split = split.as<SplitSegment>();
  job.x.spilled = spilled.as<Spilled>();
  job.x.spilled_counts = counts.as<int32_t>();
  row.gemm(isa, job, 0, w.tile.strips / 2);
  row.gemm(isa, job, w.tile.strips / 2, w.tile.strips);
}

// numbers: N K desc M, dtypes of x and y, segment and segments_per_group of sums.
// blobs: w, x [M, K] (if int8, columns in packed order), sums, x scales, x zeros, bias.
// Answers [M, N].
Answer gemm(const IsaKernels& isa, const std::string& kernel, const Request& r) {
  const int64_t N = r.numbers[0], K = r.numbers[1], M = r.numbers[3];
  const Element x_type = static_cast<Element>(r.numbers[4]);
  const Element y_type = static_cast<Element>(r.numbers[5]);
  const Weight w(N, K, r.numbers[2], r.blobs[0]);
  const Op op = x_type == Element::kInt8 ? Op::kGemmA8 : Op::kGemm;
  const KernelRow& row = row_of(op, kernel);
  std::string reason;
  if (row.refuse({op, M, N, K, w.desc, x_type, false, 0}, w.tile, isa, Why(&reason)))
    fail("refused: ", reason);
  if (row.x == XForm::kTiles || row.x == XForm::kCodeTiles)
    fail("refused: tiles of AMX are tested in test_amx.py, which models them");

  const int64_t stride = w.tile.K_padded;
  Blob y(M * N * bytes_of(y_type));
  const int64_t size = row.x == XForm::kCodes ? 1 : row.x == XForm::kBFloats ? 2 : 4;
  Blob prepared(M * stride * size);
  GemmJob job{w.view, {}, {y.data(), N, y_type, r.blobs[5].or_null<float>()}};
  job.x.M = M;
  job.x.stride = stride;
  Answer answer;
  if (row.x == XForm::kPlanes) {
    const RowSource source{r.blobs[1].data(), x_type, K, K, w.perm, nullptr};
    for (int64_t m0 = 0; m0 < M; m0 += kMaxPlaneRows) {
      job.x.M = std::min<int64_t>(kMaxPlaneRows, M - m0);
      job.y.data = y.data() + m0 * N * bytes_of(y_type);
      multiply_planes(isa, row, w, source, m0, job);
    }
    answer.push_back(std::move(y));
    return answer;
  }
  if (row.x == XForm::kCodes) {
    std::memset(prepared.data(), 0, prepared.size());
    for (int64_t m = 0; m < M; ++m)
      std::memcpy(prepared.data() + m * stride, r.blobs[1].data() + m * K, static_cast<size_t>(K));
    job.x.codes = prepared.as<int8_t>();
    job.x.sums = r.blobs[2].as<int32_t>();
    job.x.scales = r.blobs[3].as<float>();
    job.x.zeros = r.blobs[4].or_null<int32_t>();
    job.x.segment = r.numbers[6];
    job.x.segments_per_group = r.numbers[7];
  } else if (row.x == XForm::kBFloats) {
    load_bfloats(w, r.blobs[1].as<uint16_t>(), M, prepared.as<uint16_t>());
    job.x.bfloats = prepared.as<uint16_t>();
  } else {
    isa.load_rows({r.blobs[1].data(), x_type, K, K, w.perm, nullptr}, 0, M, prepared.as<float>(),
                  stride);
    job.x.values = prepared.as<float>();
  }
  // In two calls, as two threads would.
  row.gemm(isa, job, 0, w.tile.strips / 2);
  row.gemm(isa, job, w.tile.strips / 2, w.tile.strips);
  answer.push_back(std::move(y));
  return answer;
}

// numbers: N K desc M. blobs: w, dy fp32 [M, strips * 16]. Answers fp32 [M, K_padded], columns in packed order.
Answer grad(const IsaKernels& isa, const std::string& kernel, const Request& r) {
  const int64_t M = r.numbers[3];
  const Weight w(r.numbers[0], r.numbers[1], r.numbers[2], r.blobs[0]);
  const KernelRow& row = row_of(Op::kGradInput, kernel);
  std::string reason;
  if (row.refuse({Op::kGradInput, M, w.view.N, w.view.K, w.desc, Element::kFloat32, false, 0},
                 w.tile, isa, Why(&reason)))
    fail("refused: ", reason);
  Blob dx(M * w.tile.K_padded * 4);
  const GradJob job{w.view, M, r.blobs[1].as<float>(), dx.as<float>()};
  const int64_t pieces = div_up(w.tile.K_padded, kGradColumns);
  row.grad(isa, job, 0, pieces / 2);
  row.grad(isa, job, pieces / 2, pieces);
  Answer answer;
  answer.push_back(std::move(dx));
  return answer;
}

// numbers: M, K, dtype, stride of the answer. blobs: x [M, K], perm, pre_scale. Answers fp32 [M, stride].
Answer load(const IsaKernels& isa, const Request& r) {
  const int64_t M = r.numbers[0], K = r.numbers[1], stride = r.numbers[3];
  Blob rows(M * stride * 4);
  isa.load_rows({r.blobs[0].data(), static_cast<Element>(r.numbers[2]), K, K,
                 r.blobs[1].or_null<int32_t>(), r.blobs[2].or_null<float>()},
                0, M, rows.as<float>(), stride);
  Answer answer;
  answer.push_back(std::move(rows));
  return answer;
}

// numbers: dtype. blobs: fp32 [count]. Answers [count] in the dtype.
Answer store(const IsaKernels& isa, const Request& r) {
  const Element dtype = static_cast<Element>(r.numbers[0]);
  const int64_t count = static_cast<int64_t>(r.blobs[0].size() / 4);
  Blob row(count * bytes_of(dtype));
  isa.store_row(r.blobs[0].as<float>(), count, dtype, row.data());
  Answer answer;
  answer.push_back(std::move(row));
  return answer;
}

// numbers: desc, search, groups, count. blobs: values fp32 [groups, count], importance [groups, count].
// Answers codes u8 [groups, count], scales, zeros.
Answer quantize(const IsaKernels& isa, const Request& r) {
  const Desc desc = decode_desc(r.numbers[0]);
  const int64_t groups = r.numbers[2], count = r.numbers[3];
  const FormatInfo& info = format_info(desc.format);
  const CanonicalShape shape = canonical_shape(1, std::max<int64_t>(8, desc.group_size), desc);
  Blob codes(groups * count), scales(groups * shape.scale_bytes), zeros(groups * shape.zero_bytes);
  for (int64_t g = 0; g < groups; ++g) {
    QuantizeJob job{};
    job.values = r.blobs[0].as<float>() + g * count;
    if (r.blobs[1].size() > 0) job.importance = r.blobs[1].as<float>() + g * count;
    job.count = count;
    job.format = desc.format;
    job.zero_kind = desc.zero_kind;
    job.scale_dtype = desc.scale_dtype;
    job.bits = info.bits;
    job.search = r.numbers[1] != 0;
    job.max = info.max;
    job.code = info.code;
    job.codes = codes.data() + g * count;
    job.scale = scales.data() + g * shape.scale_bytes;
    job.zero = zeros.size() > 0 ? zeros.data() + g * shape.zero_bytes : nullptr;
    isa.quantize_group(job);
  }
  Answer answer;
  answer.push_back(std::move(codes));
  answer.push_back(std::move(scales));
  answer.push_back(std::move(zeros));
  return answer;
}

// numbers: M, K, group_size, format (an Element), symmetric. blobs: x fp32 [M, K], static scale, static zero.
// Answers codes [M, K], scales fp32 [M, groups], zeros int32 [M].
Answer activation(const IsaKernels& isa, const Request& r) {
  const int64_t M = r.numbers[0], K = r.numbers[1], group_size = r.numbers[2];
  const int64_t groups = div_up(K, group_size);
  QuantizeActivationJob job{};
  job.K = K;
  job.group_size = group_size;
  job.format = static_cast<Element>(r.numbers[3]);
  job.symmetric = r.numbers[4] != 0;
  job.static_scale = r.blobs[1].or_null<float>();
  job.static_zero = r.blobs[2].or_null<int32_t>();
  Blob codes(M * K), scales(M * groups * 4), zeros(M * 4);
  for (int64_t m = 0; m < M; ++m) {
    job.x = r.blobs[0].as<float>() + m * K;
    job.codes = codes.data() + m * K;
    job.scales = scales.as<float>() + m * groups;
    job.zeros = zeros.as<int32_t>() + m;
    isa.quantize_activation_row(job);
  }
  Answer answer;
  answer.push_back(std::move(codes));
  answer.push_back(std::move(scales));
  answer.push_back(std::move(zeros));
  return answer;
}

// numbers: N, K, desc. blobs: codes u8 [N, K], scales, zeros, super scales, super zeros. Answers fp32 [N, K].
Answer dequantize(const IsaKernels& isa, const Request& r) {
  const int64_t N = r.numbers[0], K = r.numbers[1];
  const Desc desc = decode_desc(r.numbers[2]);
  const CanonicalShape s = canonical_shape(N, K, desc);
  CanonicalConst from{};
  for (int i = 0; i < kTableCount; ++i)
    from.tables[i] = r.blobs.at(static_cast<size_t>(i) + 1).data();
  std::vector<float> scales(static_cast<size_t>(s.groups)), zeros(scales.size());
  std::vector<uint8_t> scratch(static_cast<size_t>(table_scratch_bytes(s)));
  Blob values(N * K * 4);
  for (int64_t n = 0; n < N; ++n) {
    row_scales(s, desc, from, n, scales.data(), zeros.data(), scratch.data());
    isa.dequantize_row({r.blobs[0].data() + n * K, scales.data(), zeros.data(), K, s.group_size,
                        desc.zero_kind == ZeroKind::kOffset, format_info(desc.format).code,
                        values.as<float>() + n * K});
  }
  Answer answer;
  answer.push_back(std::move(values));
  return answer;
}

// Answers the levels this CPU can run, best first, and its features with a 1 or 0 behind each.
Answer levels() {
  std::string names, features;
  for (const std::string& name : isa_levels()) names += name + " ";
  for (const auto& [name, present] : cpu_features()) features += name + (present ? " 1 " : " 0 ");
  Answer answer;
  answer.push_back(blob_of(names));
  answer.push_back(blob_of(features));
  return answer;
}

Answer serve(const Request& r) {
  if (r.words[0] == "levels") return levels();
  const IsaKernels& isa = level_of(r.words.at(0));
  const std::string& what = r.words.at(1);
  if (what == "gemm") return gemm(isa, r.words.at(2), r);
  if (what == "grad") return grad(isa, r.words.at(2), r);
  if (what == "load") return load(isa, r);
  if (what == "store") return store(isa, r);
  if (what == "quantize") return quantize(isa, r);
  if (what == "activation") return activation(isa, r);
  if (what == "dequantize") return dequantize(isa, r);
  fail("no request '", what, "'");
}

// ---- frames ----------------------------------------------------------------------------------------------------------

void read_exactly(void* to, size_t size) {
  if (size > 0 && std::fread(to, 1, size, stdin) != size) std::exit(2);
}
template <class T>
T read_number() {
  T value;
  read_exactly(&value, sizeof value);
  return value;
}
template <class T>
void write_number(T value) {
  std::fwrite(&value, 1, sizeof value, stdout);
}

Request read_request() {
  Request r;
  std::string text(read_number<uint32_t>(), ' ');
  read_exactly(text.data(), text.size());
  std::istringstream words(text);
  for (std::string word; words >> word;) r.words.push_back(word);
  r.numbers.resize(read_number<uint32_t>());
  read_exactly(r.numbers.data(), r.numbers.size() * sizeof(int64_t));
  for (uint32_t left = read_number<uint32_t>(); left > 0; --left) {
    r.blobs.emplace_back(static_cast<int64_t>(read_number<uint64_t>()));
    read_exactly(r.blobs.back().data(), r.blobs.back().size());
  }
  return r;
}

void write_blob(const Blob& blob) {
  write_number(static_cast<uint64_t>(blob.size()));
  std::fwrite(blob.data(), 1, blob.size(), stdout);
}

void answer_request(const Request& request) {
  std::string error;
  Answer answer;
  try {
    answer = serve(request);
    for (const Blob& blob : answer) {
      if (blob.was_overrun()) fail("wrote past the end of a result");
    }
  } catch (const std::exception& e) {
    error = e.what();
  }
  write_number(static_cast<uint32_t>(answer.size() + 1));
  write_blob(blob_of(error));
  for (const Blob& blob : answer) write_blob(blob);
  std::fflush(stdout);
}

}  // namespace
}  // namespace lowbit

int main() {
  for (int next; (next = std::getchar()) != EOF;) {
    std::ungetc(next, stdin);
    lowbit::answer_request(lowbit::read_request());
  }
  return 0;
}
