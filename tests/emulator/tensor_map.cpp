// Tensor copies: a map of the emulator's own, and the pieces of 16 bytes that a box is copied in.

#include "cuda/tensor_map.h"

#include <vector>

#include "common/check.h"
#include "cuda/ptx_wgmma.cuh"
#include "emulator/async.h"
#include "emulator/scheduler.h"

namespace lowbit::emulator {
namespace {

constexpr uint64_t kMade = 0x70616d2072736e74u;  // what make_tensor_map() leaves in the last word
constexpr int kPiece = 16;

struct Encoded {
  uint64_t data, rows, columns, row_bytes, element_bytes, box_rows;
};

}  // namespace
}  // namespace lowbit::emulator

namespace lowbit::cuda {

// Refuses what the driver refuses ("Tensor Map Object Management" of the CUDA driver API).
TensorMap make_tensor_map(const char* name, const Matrix& m) {
  const auto address = reinterpret_cast<uintptr_t>(m.data);
  LOWBIT_CHECK(address != 0 && address % 16 == 0, name,
               ": a tensor map of an address that ends in ", address % 16);
  LOWBIT_CHECK(m.row_bytes % 16 == 0 && m.row_bytes >= 0 && m.row_bytes < int64_t{1} << 40, name,
               ": a tensor map of rows ", m.row_bytes, " bytes apart");
  LOWBIT_CHECK(
      m.rows >= 1 && m.columns >= 1 && m.rows <= int64_t{1} << 32 && m.columns <= int64_t{1} << 32,
      name, ": a tensor map of ", m.rows, " x ", m.columns, " elements");
  LOWBIT_CHECK(m.box_rows >= 1 && m.box_rows <= 256, name, ": boxes of ", m.box_rows, " rows");
  TensorMap map{};
  const uint64_t fields[] = {address,
                             static_cast<uint64_t>(m.rows),
                             static_cast<uint64_t>(m.columns),
                             static_cast<uint64_t>(m.row_bytes),
                             static_cast<uint64_t>(m.element_bytes),
                             static_cast<uint64_t>(m.box_rows)};
  for (size_t i = 0; i < 6; ++i) map.words[i] = fields[i];
  map.words[15] = emulator::kMade;
  return map;
}

namespace ptx {

using namespace emulator;

static void check_map(const char* what, const TensorMap& map, Site at) {
  check_hopper(what, at);
  if (map.words[15] != kMade) fail_here(concat(what, " from a tensor map that nobody made"), at);
}

// A box as it is to lie in shared memory from `to` on.
static std::vector<Piece> box_pieces(void* to, const TensorMap& map, int32_t row, int32_t column,
                                     Site at) {
  check_map("copy_box", map, at);
  const Encoded e{map.words[0], map.words[1], map.words[2],
                  map.words[3], map.words[4], map.words[5]};
  const auto height = static_cast<int>(e.box_rows);
  const int64_t offset = this_thread().block->offset(to);
  if (!is_shared(to, int64_t{height} * kBoxBytes))
    fail_here(concat("copy_box of ", height * kBoxBytes, " bytes to byte ", offset, " of the ",
                     this_thread().shared_bytes, " bytes of shared memory"),
              at);
  if (offset % 1024 != 0)
    fail_here(concat("copy_box to byte ", offset, ", which is no multiple of 1024"), at);
  const auto* data = reinterpret_cast<const uint8_t*>(e.data);
  const int64_t row_bytes = static_cast<int64_t>(e.columns * e.element_bytes);
  std::vector<Piece> pieces;
  for (int r = 0; r < height; ++r) {
    const int64_t in_row = row + r;
    const bool exists = in_row >= 0 && in_row < static_cast<int64_t>(e.rows);
    for (int p = 0; p < kBoxBytes / kPiece; ++p) {
      const int64_t first = column * static_cast<int64_t>(e.element_bytes) + kPiece * p;
      int64_t bytes = exists && first >= 0 ? std::min<int64_t>(kPiece, row_bytes - first) : 0;
      bytes = std::max<int64_t>(bytes, 0);
      uint8_t* piece = static_cast<uint8_t*>(to) + r * kBoxBytes + kPiece * (p ^ (r & 7));
      if (bytes > 0)
        pieces.push_back({piece, data + in_row * static_cast<int64_t>(e.row_bytes) + first, bytes});
      if (bytes < kPiece) pieces.push_back({piece + bytes, nullptr, kPiece - bytes});
    }
  }
  return pieces;
}

void copy_box(void* to, const TensorMap& map, int32_t row, int32_t column, uint64_t* barrier,
              Site at) {
  start_copy("copy_box", box_pieces(to, map, row, column, at), barrier, at);
}

void copy_box_shared(void* to, const TensorMap& map, int32_t row, int32_t column, uint64_t* barrier,
                     uint16_t blocks, Site at) {
  start_copies("copy_box", box_pieces(to, map, row, column, at), barrier, blocks, at);
}

void prefetch_map(const TensorMap& map, Site at) { check_map("prefetch_map", map, at); }

}  // namespace ptx
}  // namespace lowbit::cuda
