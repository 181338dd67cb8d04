// A block's shared memory: the dynamic part and each static array lie between fences, which take
// what is written out of bounds (and are unaddressable under AddressSanitizer).
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace sparse_rcnn::emulator {

class SharedMemory {
 public:
  // What the smallest of the architectures gives a block, and how much of it may be static.
  static constexpr size_t kLimit = 99 * 1024;
  static constexpr size_t kStaticLimit = 48 * 1024;

  SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;
  ~SharedMemory();

  void begin_launch(size_t dynamic_bytes);
  // Fills all arrays with the byte `poison`; a negative one leaves what is there.
  void begin_block(int poison);
  // What was written outside the arrays, in words; empty if nothing.
  std::string damage() const;

  void* dynamic() const { return arena_ + kDynamicStart; }
  // The array of `key`, which its first call in a launch makes; null where there is no room for it.
  void* static_array(const void* key, size_t bytes, size_t alignment, const char* name, int poison);
  bool contains(const void* address, size_t bytes) const;
  size_t static_bytes() const { return static_bytes_; }
  size_t bytes() const { return static_bytes_ + regions_.front().bytes; }

 private:
  struct Region {
    const void* key;
    std::string name;
    size_t start, bytes, fence;  // a fence on both sides
  };

  static constexpr size_t kDynamicFence = 16 * 1024;
  static constexpr size_t kStaticFence = 1024;
  static constexpr size_t kDynamicStart = kDynamicFence;
  static constexpr size_t kStaticStart = kDynamicStart + kLimit + kDynamicFence + kStaticFence;
  static constexpr size_t kArena = kStaticStart + 4 * kStaticLimit;

  char* arena_;
  std::vector<Region> regions_;  // ascending; the first is the dynamic part
  size_t static_bytes_ = 0;
};

}  // namespace sparse_rcnn::emulator
