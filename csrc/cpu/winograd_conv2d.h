// What winograd_conv2d.cpp and its kernels agree on.
#pragma once

#include <cstdint>

namespace sparse_rcnn {

constexpr int kWinogradPoints = 16;
constexpr int64_t kWinogradOutputs = 64;  // that the weights lie together for
constexpr int64_t kWinogradChannels = 16;  // whole vectors of any level

struct WinogradSizes {
  int64_t height;  // of x and of the result
  int64_t width;
  int64_t channels;
  int64_t outputs;
};

struct WinogradTensors {
  const float* x;         // [B, H, W, Ci]
  const float* weight;    // [Co / 64, 16, Ci, 64]
  const float* bias;      // [Co], or null
  const float* residual;  // [B, H, W, Co], or null
  const float* zeros;     // [Ci]
  float* out;             // [B, H, W, Co]
  bool relu;
};

}  // namespace sparse_rcnn
