// A thread's own memory, and the cache of its core.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace sparse_rcnn {

// Memory that is used next, in ranges, to be brought into the cache in the course of what is
// computed now, in this order; there may not be time for all of it.
struct Ahead {
  struct Range {
    const char* next;
    const char* end;
  };
  static constexpr int most = 40;
  Range ranges[most];
  int count;
  int current;

  Ahead() : count(0), current(0) {}

  // Ranges beyond the most are dropped.
  template <typename T>
  void add(const T* first, int64_t length) {
    if (count == most) return;
    ranges[count++] = {reinterpret_cast<const char*>(first),
                       reinterpret_cast<const char*>(first + length)};
  }
};

// Memory of one thread for the time of one call.
class ThreadMemory {
 public:
  explicit ThreadMemory(int64_t bytes) : data_(new (alignment) char[bytes]) {}
  char* get() const { return data_.get(); }

 private:
  static constexpr std::align_val_t alignment{64};
  struct Free {
    void operator()(char* data) const { operator delete[](data, alignment); }
  };
  std::unique_ptr<char, Free> data_;
};

}  // namespace sparse_rcnn
