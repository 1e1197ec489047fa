// Faults that the machine or the compiler notices: which kernel, block and thread.

#include "emulator/faults.h"

#include <signal.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>

#include "common/check.h"
#include "emulator/scheduler.h"

namespace lowbit::emulator {

#if defined(__SANITIZE_ADDRESS__)

void watch_faults() {}  // the sanitizer does, and says more

#else

namespace {

constexpr int kSignals[] = {SIGSEGV, SIGBUS};
struct sigaction before[2];

// Says where, and leaves the rest to whoever was here before (Python's faulthandler, or the system).
void say_where(int signal) {
  char text[256];
  int length = 0;
  if (current != nullptr) {
    const Thread& thread = this_thread();
    length = std::snprintf(text, sizeof text,
                           "emulator: bad address in %s, block (%u, %u, %u), thread %d\n",
                           thread.block->call->name, thread.block_index.x, thread.block_index.y,
                           thread.block_index.z, thread.index);
  } else {
    length = std::snprintf(text, sizeof text, "emulator: bad address outside of any kernel\n");
  }
  if (write(STDERR_FILENO, text, static_cast<size_t>(length)) < 0) return;
  for (int i = 0; i < 2; ++i) {
    if (kSignals[i] == signal) sigaction(signal, &before[i], nullptr);
  }
}

}  // namespace

void watch_faults() {
  // The stack that overflowed is no place for the handler.
  static thread_local const bool has_stack = [] {
    constexpr size_t kBytes = 64 << 10;
    stack_t stack{};
    if (sigaltstack(nullptr, &stack) == 0 && (stack.ss_flags & SS_DISABLE) == 0) return true;
    stack = {};
    stack.ss_sp = std::malloc(kBytes);  // as long-lived as the thread
    stack.ss_size = kBytes;
    return sigaltstack(&stack, nullptr) == 0;
  }();
  (void)has_stack;
  static const bool once = [] {
    struct sigaction action{};
    action.sa_handler = say_where;
    action.sa_flags = SA_ONSTACK;
    for (int i = 0; i < 2; ++i) sigaction(kSignals[i], &action, &before[i]);
    return true;
  }();
  (void)once;
}

#endif

}  // namespace lowbit::emulator

#if defined(LOWBIT_EMULATOR_ALIGNMENT)

// Kernels are compiled with -fsanitize=alignment, which calls this (the interface of gcc's and clang's libubsan, that is not
// linked then) where an address is not a multiple of what its type asks for. uint4 and float4 ask for 16.
struct Mismatch {
  const char* file;
  uint32_t line, column;
  const void* type;
  unsigned char log_alignment;
  unsigned char kind;
};

extern "C" [[noreturn]] void __ubsan_handle_type_mismatch_v1_abort(const Mismatch* where,
                                                                   uintptr_t address) {
  using namespace lowbit::emulator;
  const Site at{where->file, static_cast<int>(where->line)};
  const std::string what =
      lowbit::concat("an access at an address that ends in ", address % 16,
                     ", which is not aligned to ", 1 << where->log_alignment, " bytes");
  if (current != nullptr) fail_here(what, at);
  std::fprintf(stderr, "%s (%s)\n", what.c_str(), describe(at).c_str());
  std::abort();
}

#endif
