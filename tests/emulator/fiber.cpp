#include "emulator/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(LOWBIT_EMULATOR_UCONTEXT) || !(defined(__x86_64__) || defined(__aarch64__))
#define LOWBIT_USE_UCONTEXT 1
#include <ucontext.h>
#endif

namespace lowbit::emulator {

// ---- the switch itself -------------------------------------------------------------------------------------------------

#if defined(LOWBIT_USE_UCONTEXT)

// Works everywhere, and costs a system call each way for the signal mask.
static void machine_switch(Context& from, Context& to) {
  if (from.stack_pointer == nullptr) from.stack_pointer = new ucontext_t;
  swapcontext(static_cast<ucontext_t*>(from.stack_pointer),
              static_cast<ucontext_t*>(to.stack_pointer));
}

static void machine_make(Context& context, void* stack, size_t bytes, void (*entry)()) {
  auto* machine = new ucontext_t;
  getcontext(machine);
  machine->uc_stack.ss_sp = stack;
  machine->uc_stack.ss_size = bytes;
  machine->uc_link = nullptr;
  makecontext(machine, entry, 0);
  context.stack_pointer = machine;
}

void free_context(Context& context) {
  delete static_cast<ucontext_t*>(context.stack_pointer);
  context = Context{};
}

#else

extern "C" void lowbit_emulator_switch(void** save, void* load);

// Saves what a call must preserve, exchanges the stack pointers, restores. The last jump is indirect and not a return:
// every suspended fiber waits at the same place, so the processor predicts it, where a return would always be mispredicted.
#if defined(__x86_64__)
asm(R"(
  .text
  .p2align 4
  .globl lowbit_emulator_switch
  .hidden lowbit_emulator_switch
  .type lowbit_emulator_switch, @function
lowbit_emulator_switch:
  .cfi_startproc
  endbr64
  popq %rcx
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  pushq %rcx
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %rcx
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  jmpq *%rcx
  .cfi_endproc
  .size lowbit_emulator_switch, .-lowbit_emulator_switch
)");
constexpr int kSavedWords = 7;
constexpr int kEntryWord = 0;  // popped last-in: the address to jump to lies lowest
// A called function finds the stack 8 bytes off a multiple of 16 (the return address that it expects there).
constexpr int kTopWords = 1;
#else
asm(R"(
  .text
  .p2align 4
  .globl lowbit_emulator_switch
  .hidden lowbit_emulator_switch
  .type lowbit_emulator_switch, %function
lowbit_emulator_switch:
  .cfi_startproc
  stp x30, x29, [sp, #-160]!
  stp x19, x20, [sp, #16]
  stp x21, x22, [sp, #32]
  stp x23, x24, [sp, #48]
  stp x25, x26, [sp, #64]
  stp x27, x28, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #16]
  ldp x21, x22, [sp, #32]
  ldp x23, x24, [sp, #48]
  ldp x25, x26, [sp, #64]
  ldp x27, x28, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  ldp x16, x29, [sp], #160
  mov x30, x16
  br x16
  .cfi_endproc
  .size lowbit_emulator_switch, .-lowbit_emulator_switch
)");
constexpr int kSavedWords = 20;
constexpr int kEntryWord = 0;
constexpr int kTopWords = 0;
#endif

static void machine_switch(Context& from, Context& to) {
  lowbit_emulator_switch(&from.stack_pointer, to.stack_pointer);
}

static void machine_make(Context& context, void* stack, size_t bytes, void (*entry)()) {
  const uintptr_t top = (reinterpret_cast<uintptr_t>(stack) + bytes) & ~uintptr_t{15};
  auto* words = reinterpret_cast<uintptr_t*>(top) - kTopWords - kSavedWords;
  std::memset(words, 0, (kTopWords + kSavedWords) * sizeof *words);
  words[kEntryWord] = reinterpret_cast<uintptr_t>(entry);
  context.stack_pointer = words;
}

void free_context(Context& context) { context = Context{}; }

#endif

// ---- with a sanitizer told ---------------------------------------------------------------------------------------------

#if defined(__SANITIZE_ADDRESS__)

// Who was left, so that the first switch away from a CPU thread's own stack learns where that stack is.
static thread_local Context* left = nullptr;

void finish_first_switch() {
  const void* bottom = nullptr;
  size_t size = 0;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  left->stack_bottom = bottom;
  left->stack_size = size;
}

void switch_context(Context& from, Context& to) {
  left = &from;
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack_bottom, to.stack_size);
  machine_switch(from, to);
  const void* bottom = nullptr;
  size_t size = 0;
  __sanitizer_finish_switch_fiber(from.fake_stack, &bottom, &size);
  left->stack_bottom = bottom;
  left->stack_size = size;
}

#else

void finish_first_switch() {}
void switch_context(Context& from, Context& to) { machine_switch(from, to); }

#endif

void make_context(Context& context, void* stack, size_t bytes, void (*entry)()) {
  context.stack_bottom = stack;
  context.stack_size = bytes;
  context.fake_stack = nullptr;
  machine_make(context, stack, bytes, entry);
}

// ---- stacks ------------------------------------------------------------------------------------------------------------

namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 256 << 10;  // red zones around every local array
#else
constexpr size_t kStackBytes = 64 << 10;
#endif

constexpr size_t kTopStep = 5 * 64;

size_t page_bytes() {
  static const size_t bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}
size_t stride() { return kStackBytes + page_bytes(); }

}  // namespace

// Tops a few cache lines apart: at equal distances, what lanes use of their stacks would fall on each other in the cache.
size_t Stacks::bytes(int index) const {
  return kStackBytes - static_cast<size_t>(index) % 64 * kTopStep;
}

void Stacks::reserve(int count) {
  if (count <= count_) return;
  release();
  const size_t bytes = static_cast<size_t>(count) * stride();
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<unsigned char*>(memory);
  count_ = count;
  for (int i = 0; i < count; ++i) {
    mprotect(memory_ + static_cast<size_t>(i) * stride(), page_bytes(), PROT_NONE);
  }
  forget_frames();
}

void* Stacks::stack(int index) const {
  return memory_ + static_cast<size_t>(index) * stride() + page_bytes();
}

void Stacks::forget_frames() {
#if defined(__SANITIZE_ADDRESS__)
  for (int i = 0; i < count_; ++i) ASAN_UNPOISON_MEMORY_REGION(stack(i), kStackBytes);
#endif
}

void Stacks::release() {
  if (memory_ != nullptr) {
    forget_frames();
    munmap(memory_, static_cast<size_t>(count_) * stride());
  }
  memory_ = nullptr;
  count_ = 0;
}

}  // namespace lowbit::emulator
