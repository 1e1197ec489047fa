#include "cpu/weight_memory.h"

#include "common/round_up.h"
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace lowbit {
namespace {

#if defined(__linux__)
// From a huge page's boundary on, or null. Nothing is mapped beyond the last small page, and what fills no huge page is left
// to small ones, so that this takes no more memory than any other allocation.
uint8_t* map_huge(int64_t bytes) {
  const size_t size = static_cast<size_t>(round_up(bytes, int64_t{sysconf(_SC_PAGESIZE)}));
  const size_t reserved = size + kHugePage;
  void* memory =
      mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
  uint8_t* begin = static_cast<uint8_t*>(memory);
  const int64_t address = reinterpret_cast<int64_t>(begin);
  const size_t before = static_cast<size_t>(round_up(address, kHugePage) - address);
  uint8_t* to = begin + before;
  if (before > 0) munmap(begin, before);
  if (before < kHugePage) munmap(to + size, kHugePage - before);
  // A kernel without huge pages, or told never to use them, says no: then pages are small.
  madvise(to, size / kHugePage * kHugePage, MADV_HUGEPAGE);
  return to;
}
#endif

}  // namespace

Tensor empty_weight(int64_t bytes) {
#if defined(__linux__)
  if (bytes >= kHugePage) {
    if (uint8_t* memory = map_huge(bytes)) {
      const int64_t stride = 1;
      return torch::stable::from_blob(
          memory, {&bytes, 1}, {&stride, 1},
          torch::stable::Device(torch::headeronly::DeviceType::CPU), ScalarType::Byte,
          [bytes](void* data) { munmap(data, static_cast<size_t>(bytes)); });
    }
  }
#endif
  return empty_on(cpu_place(), {bytes}, ScalarType::Byte);
}

}  // namespace lowbit
