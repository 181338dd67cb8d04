#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <new>

#include "sanitizer.h"

namespace sparse_rcnn::emulator {

namespace {

constexpr size_t kStackBytes = kAddressSanitizer ? 512 * 1024 : 128 * 1024;

size_t page_bytes() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

}  // namespace

void Fiber::allocate_stack() {
  const size_t guard = page_bytes();
  void* memory = mmap(nullptr, guard + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, guard, PROT_NONE) != 0) throw std::bad_alloc();
  stack_ = static_cast<char*>(memory) + guard;
  stack_bytes_ = kStackBytes;
  owns_stack_ = true;
}

Fiber::~Fiber() {
  if (!owns_stack_) return;
  make_addressable(stack_, stack_bytes_);
  munmap(stack_ - page_bytes(), page_bytes() + stack_bytes_);
}

// ------------------------------------------------------------------------------------------------
// The switch
// ------------------------------------------------------------------------------------------------

#ifdef SPARSE_RCNN_UCONTEXT_FIBERS

void Fiber::start(void (*entry)()) {
  if (!owns_stack_) allocate_stack();
  make_addressable(stack_, stack_bytes_);  // the frames that are forgotten
  fake_stack_ = nullptr;
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = stack_bytes_;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
}

#else

// What a function must preserve goes onto the stack that is left, whose pointer goes to *save, and
// is taken back from the stack at `load`. The floating-point modes are the same for all fibers.
asm(R"(
.text
.type sparse_rcnn_switch_stack, @function
sparse_rcnn_switch_stack:
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
.size sparse_rcnn_switch_stack, .-sparse_rcnn_switch_stack
)");
extern "C" void sparse_rcnn_switch_stack(void** save, void* load);

void Fiber::start(void (*entry)()) {
  if (!owns_stack_) allocate_stack();
  make_addressable(stack_, stack_bytes_);  // the frames that are forgotten
  fake_stack_ = nullptr;
  // Stacks begin at different distances from a page's start: at the same one, all fibers would
  // contend for a few sets of the first-level cache.
  static unsigned colour = 0;
  void** top = reinterpret_cast<void**>(stack_ + stack_bytes_ - colour++ % 16 * 192);
  *--top = nullptr;                         // where `entry` would return to
  *--top = reinterpret_cast<void*>(entry);  // where the switch returns to
  for (int registers = 0; registers < 6; ++registers) *--top = nullptr;
  stack_pointer_ = top;
}

#endif

#ifdef __SANITIZE_ADDRESS__

static Fiber* left = nullptr;  // the one that was switched away from last

void Fiber::entered() {
  const void* stack = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(fake_stack_, &stack, &bytes);
  left->stack_ = static_cast<char*>(const_cast<void*>(stack));
  left->stack_bytes_ = bytes;
}

#else

void Fiber::entered() {}

#endif

void Fiber::switch_to(Fiber& next) {
#ifdef __SANITIZE_ADDRESS__
  left = this;
  __sanitizer_start_switch_fiber(&fake_stack_, next.stack_, next.stack_bytes_);
#endif
#ifdef SPARSE_RCNN_UCONTEXT_FIBERS
  swapcontext(&context_, &next.context_);
#else
  sparse_rcnn_switch_stack(&stack_pointer_, next.stack_pointer_);
#endif
  entered();
}

}  // namespace sparse_rcnn::emulator
