// The generator that draws the order of blocks and threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace sparse_rcnn::emulator {

class Random {
 public:
  void seed(uint64_t seed) { state_ = seed; }

  // In [0, bound).
  uint32_t below(uint32_t bound) {
    uint64_t x = state_ += 0x9e3779b97f4a7c15u;  // splitmix64
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return static_cast<uint32_t>(((x ^ x >> 31) >> 32) * bound >> 32);
  }

  template <class T>
  void shuffle(std::vector<T>& values) {
    for (size_t left = values.size(); left > 1; --left) {
      std::swap(values[left - 1], values[below(static_cast<uint32_t>(left))]);
    }
  }

 private:
  uint64_t state_ = 0;
};

}  // namespace sparse_rcnn::emulator
