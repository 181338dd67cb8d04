// What winograd_conv2d.cpp and its kernels agree on.
#pragma once

#include <cstdint>

namespace sparse_rcnn {

constexpr int kWinogradPoints = 36;  // of a tile
constexpr int kWinogradCells = 16;   // of its result
constexpr int64_t kWinogradChannels = 16;  // whole vectors of any level
constexpr int64_t kWinogradMostOutputs = 64;

struct WinogradSizes {
  int64_t height;  // of x and of the result
  int64_t width;
  int64_t channels;
  int64_t outputs;
  int64_t together;  // outputs, whose weights lie together: whole vectors, at most 64
};

struct WinogradTensors {
  const float* x;         // [B, H, W, Ci]
  const float* weight;    // [Co / T, 36, Ci, T], T outputs together
  const float* bias;      // [Co], or null
  const float* residual;  // [B, H, W, Co], or null
  const float* zeros;     // [Ci]
  float* out;             // [B, H, W, Co]
  bool relu;
};

}  // namespace sparse_rcnn
