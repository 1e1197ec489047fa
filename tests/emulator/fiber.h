// Switching stacks: what makes a thread of a block cheap enough to have a thousand of them.
#pragma once

#include <cstddef>

namespace lowbit::emulator {

// A suspended stack.
struct Context {
  void* stack_pointer = nullptr;  // or a ucontext_t, where there is no assembly for the machine
  // What AddressSanitizer wants to know of a stack it is about to run on.
  const void* stack_bottom = nullptr;
  size_t stack_size = 0;
  void* fake_stack = nullptr;
};

// Prepares `context` to call entry() on the given stack when it is first switched to. entry never returns.
void make_context(Context& context, void* stack, size_t bytes, void (*entry)());
void free_context(Context& context);

// Suspends the running stack in `from` and continues `to`.
void switch_context(Context& from, Context& to);
// The first thing a new stack does.
void finish_first_switch();

// Address space for stacks, each with an inaccessible page below it: an overflow is a fault, not a mystery.
class Stacks {
 public:
  Stacks() = default;
  ~Stacks() { release(); }
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;

  void reserve(int count);
  int count() const { return count_; }
  void* stack(int index) const;
  size_t bytes(int index) const;
  // After stacks were left in the middle of a call: forgets what a sanitizer knows of their frames.
  void forget_frames();

 private:
  void release();

  unsigned char* memory_ = nullptr;
  int count_ = 0;
};

}  // namespace lowbit::emulator
