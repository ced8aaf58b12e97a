// A stack to run on, and the switch from one stack to another. The switch saves what a call preserves and nothing more:
// swapcontext would save the signal mask as well, by a system call each time. AddressSanitizer is told of every switch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace fusedrnn::cuda::host {

struct Stack {
  char* bottom = nullptr;
  size_t bytes = 0;
};

#if defined(__x86_64__)

using Context = void*;  // the stack pointer, above the saved registers

extern "C" void fusedrnn_switch_stack(void** save, void* load);
asm(R"(
  .pushsection .text
  .hidden fusedrnn_switch_stack
  .globl fusedrnn_switch_stack
  .type fusedrnn_switch_stack, @function
fusedrnn_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size fusedrnn_switch_stack, .-fusedrnn_switch_stack
  .popsection
)");

// `entry` is called on the new stack at the first switch to it, and must not return.
inline void prepare(Context& context, const Stack& stack, void (*entry)()) {
  auto* top = reinterpret_cast<uintptr_t*>(reinterpret_cast<uintptr_t>(stack.bottom + stack.bytes) & ~uintptr_t{15});
  *--top = 0;  // where a return address would be: the stack is aligned as after a call
  *--top = reinterpret_cast<uintptr_t>(entry);
  for (int k = 0; k < 6; ++k) *--top = 0;
  context = top;
}

inline void switch_context(Context& save, Context& load) { fusedrnn_switch_stack(&save, load); }

#else

using Context = ucontext_t;

inline void prepare(Context& context, const Stack& stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack.bottom;
  context.uc_stack.ss_size = stack.bytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}

inline void switch_context(Context& save, Context& load) { swapcontext(&save, &load); }

#endif

// One side of a switch; the side that runs now keeps nothing.
struct Fiber {
  Context context{};
  Stack stack;  // of the scheduler: learnt at the first switch away from it
  void* fake_stack = nullptr;
};

inline void arrived([[maybe_unused]] Fiber& here, [[maybe_unused]] Fiber* from) {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(here.fake_stack, &bottom, &bytes);
  if (from != nullptr) from->stack = {static_cast<char*>(const_cast<void*>(bottom)), bytes};
#endif
}

// `last` says that `here` is never entered again.
inline void switch_fiber(Fiber& here, Fiber& to, [[maybe_unused]] bool last = false) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &here.fake_stack, to.stack.bottom, to.stack.bytes);
#endif
  switch_context(here.context, to.context);
  arrived(here, nullptr);
}

// A stack that was left in the middle may be used again.
inline void forget([[maybe_unused]] const Stack& stack) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack.bottom, stack.bytes);
#endif
}

}  // namespace fusedrnn::cuda::host
