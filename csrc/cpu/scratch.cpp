#include "cpu/scratch.h"

#include <cstdlib>
#include <new>

namespace lowbit {
namespace {

// Kept per thread so that a decode step allocates nothing; larger needs go to the heap and back.
constexpr int64_t kThreadBufferBytes = 4 << 20;

struct ThreadBuffer {
  uint8_t* data = nullptr;
  bool taken = false;  // an op called from inside another op's callback must not share it
  ~ThreadBuffer() { std::free(data); }
};
thread_local ThreadBuffer thread_buffer;

void* aligned(int64_t bytes) {
  void* memory = std::aligned_alloc(64, static_cast<size_t>((bytes + 63) / 64 * 64));
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace

Scratch::Scratch(int64_t bytes, const OptionalTensor& workspace, const char* op) {
  if (workspace.has_value()) {
    check_place(op, "workspace", *workspace, cpu_place());
    check_dtype(op, "workspace", *workspace, ScalarType::Byte);
    LOWBIT_CHECK(workspace->is_contiguous(), op, ": workspace is not contiguous");
    // 63 bytes more than the pieces, because a tensor need not start on a 64-byte boundary.
    LOWBIT_CHECK(workspace->numel() >= bytes + 63 || bytes == 0, op, ": workspace has ",
                 workspace->numel(), " bytes, expected at least ", bytes + 63);
    const auto address = reinterpret_cast<uintptr_t>(workspace->mutable_data_ptr());
    next_ = reinterpret_cast<uint8_t*>((address + 63) / 64 * 64);
  } else if (bytes <= kThreadBufferBytes && !thread_buffer.taken) {
    if (thread_buffer.data == nullptr)
      thread_buffer.data = static_cast<uint8_t*>(aligned(kThreadBufferBytes));
    thread_buffer.taken = uses_thread_buffer_ = true;
    next_ = thread_buffer.data;
  } else {
    heap_ = aligned(bytes > 0 ? bytes : 64);
    next_ = static_cast<uint8_t*>(heap_);
  }
}

Scratch::~Scratch() {
  if (uses_thread_buffer_) thread_buffer.taken = false;
  std::free(heap_);
}

}  // namespace lowbit
