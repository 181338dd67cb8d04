// Fibers: functions with a stack of their own that hand the processor to each other by name.
#pragma once

#include <cstddef>

// SPARSE_RCNN_UCONTEXT asks for the portable switch, ten times slower, where there is another.
#if !defined(__x86_64__) || defined(SPARSE_RCNN_UCONTEXT)
#define SPARSE_RCNN_UCONTEXT_FIBERS
#include <ucontext.h>
#endif

namespace sparse_rcnn::emulator {

// One that is never started stands for the thread that first switches away from it.
class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber();

  // The next switch to it calls `entry`, which calls entered() first and never returns. Whatever
  // it was doing is forgotten, without unwinding. The first call allocates the stack.
  void start(void (*entry)());
  void entered();

  // Whether the address is on its stack.
  bool owns(const void* address) const {
    const char* at = static_cast<const char*>(address);
    return at >= stack_ && at < stack_ + stack_bytes_;
  }

  // Stops this fiber, which is the one that runs, and goes on with `next` where that one stopped.
  void switch_to(Fiber& next);

 private:
  void allocate_stack();

  char* stack_ = nullptr;  // the lowest address; below it lies a page that faults
  size_t stack_bytes_ = 0;
  bool owns_stack_ = false;
  void* fake_stack_ = nullptr;  // AddressSanitizer's
#ifdef SPARSE_RCNN_UCONTEXT_FIBERS
  ucontext_t context_;
#else
  void* stack_pointer_ = nullptr;
#endif
};

}  // namespace sparse_rcnn::emulator
