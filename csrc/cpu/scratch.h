// Threads and scratch memory of the CPU's op boundary.
#pragma once

#include "common/tensor.h"

namespace lowbit {

// Work in units of about one multiply-add; below this a thread costs more than it gains.
inline constexpr int64_t kGrainWork = int64_t{1} << 18;

// body(begin, end) over [0, count), where one item costs `work` units. Must not throw.
template <class Body>
void parallel_items(int64_t count, int64_t work, const Body& body) {
  const int64_t grain = work >= kGrainWork ? 1 : (kGrainWork + work - 1) / (work > 0 ? work : 1);
  if (count <= grain) {  // spares the call into libtorch
    if (count > 0) body(0, count);
    return;
  }
  torch::stable::parallel_for(0, count, grain, body);
}

// Memory for one call: the caller's workspace, a buffer the thread keeps (small), or the heap.
class Scratch {
 public:
  Scratch(int64_t bytes, const OptionalTensor& workspace, const char* op);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // The next piece, aligned to 64 bytes. The pieces together must fit `bytes` (each rounded up to 64).
  template <class T>
  T* take(int64_t count) {
    uint8_t* piece = next_;
    next_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return reinterpret_cast<T*>(piece);
  }

 private:
  uint8_t* next_;
  void* heap_ = nullptr;
  bool uses_thread_buffer_ = false;
};

}  // namespace lowbit
