// Resize, normalise, pad and cast on the GPU, a batch in one launch (of 32 images).
//
// A block makes a tile of 16 rows of 64 pixels. It takes the input rows that the tile sees 32 at a
// time: the horizontal pass of these goes to shared memory, a thread a column, 4 rows at once, so
// that a weight is read once for 12 products; the vertical pass adds them to sums in registers,
// four adjacent values a thread. How far an image shrinks is therefore not limited; only beyond
// 15-fold the columns' weights do not fit in their table, and each thread computes its own, row
// after row. Sizes are read from device memory: a captured launch obeys new ones. Reads and writes
// bound it where the launch does not: 0.9 MB and 5.2 MB for 640x480 to 800x1067 in bfloat16.
//
// budget: normalize_pad_kernel: 80 registers, 18368 bytes shared, 256 threads
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "common/cuda.cuh"
#include "common/normalize_pad_args.h"

namespace sparse_rcnn {
namespace {

constexpr int kThreads = 256;
constexpr int kColumns = 64;  // of a tile, in pixels
constexpr int kRows = 16;
constexpr int kRowValues = 3 * kColumns;
constexpr int kChunk = 32;  // input rows in shared memory
constexpr int kTableTaps = 32;
constexpr double kTableSupport = (kTableTaps - 1) / 2.0;  // an axis of no more has no more taps
constexpr int kGroups = kThreads / kColumns;  // of threads, which share the rows of a chunk
constexpr int kRowsAtOnce = 4;
constexpr int kQuad = 4;  // values that a thread reads, sums and writes together
constexpr int kRowQuads = kRowValues / kQuad;
constexpr int kQuadsPerThread = kRows * kRowQuads / kThreads;
constexpr int kMaxImages = 32;  // a launch; their views fill half of the kernel's argument block

struct Batch {
  ImageView images[kMaxImages];
  const int64_t* sizes;  // [B, 4]
  int height, width;
  float mean[3], std[3];
};

struct Tile {
  ResampleAxis horizontal, vertical;
  ResampleWindow columns[kColumns];
  ResampleWindow rows[kRows];
  int column_weights[kTableTaps][kColumns];
  int row_weights[kChunk][kRows];  // of the input rows in `pixels`
  alignas(16) uint8_t pixels[kChunk][kRowValues];  // interleaved, horizontally resized
};

// What the tile at (row, column) sees: a thread an output column or row.
__device__ void fill_windows(const ImageSizes& sizes, int row, int column, Tile& tile) {
  const int thread = threadIdx.x;
  const bool is_column = thread < kColumns;
  const int place = is_column ? thread : thread - kColumns;
  if (!is_column && place >= kRows) return;
  const ResampleAxis axis = is_column ? resample_axis(sizes.width, sizes.new_width)
                                      : resample_axis(sizes.height, sizes.new_height);
  const int index = (is_column ? column : row) + place;
  ResampleWindow window{0.0, 0.0, 0, 0};
  if (index < (is_column ? sizes.new_width : sizes.new_height)) {
    window = resample_window(axis, index);
  }
  (is_column ? tile.columns : tile.rows)[place] = window;
  if (place == 0) (is_column ? tile.horizontal : tile.vertical) = axis;
  if (!is_column || axis.support > kTableSupport) return;
  for (int tap = 0; tap < window.count; ++tap) {
    tile.column_weights[tap][place] = resample_weight(axis, window, tap);
  }
}

// The weights of the input rows from `begin` on.
__device__ void fill_row_weights(int begin, Tile& tile) {
  for (int i = threadIdx.x; i < kChunk * kRows; i += kThreads) {
    const ResampleWindow& window = tile.rows[i % kRows];
    const int tap = begin + i / kRows - window.begin;
    if (tap >= 0 && tap < window.count) {
      tile.row_weights[i / kRows][i % kRows] = resample_weight(tile.vertical, window, tap);
    }
  }
}

__device__ __forceinline__ int level_of(int sum) { return min(sum >> kResampleBits, 255); }

// The horizontal pass over input rows `begin` to `end`, at most kChunk of them; a thread takes
// kAtOnce rows at once.
template <bool kTable, int kAtOnce>
__device__ __forceinline__ void resample_rows(const ImageView& image, int64_t row_stride,
                                              int begin, int end, Tile& tile) {
  const int column = threadIdx.x % kColumns;
  const ResampleWindow& window = tile.columns[column];
  const int count = window.count;
  // The row is the same for a whole warp.
  for (int row = begin + threadIdx.x / kColumns; row < end; row += kGroups * kAtOnce) {
    const uint8_t* pixel = image.data + row * row_stride + window.begin * image.pixel_stride;
    int sums[kAtOnce][3];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      sums[k][0] = sums[k][1] = sums[k][2] = kResampleHalf;
    }
    for (int tap = 0; tap < count; ++tap) {
      const int weight = kTable ? tile.column_weights[tap][column]
                                : resample_weight(tile.horizontal, window, tap);
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        if (row + k * kGroups >= end) break;
        const uint8_t* from = pixel + k * kGroups * row_stride;
#pragma unroll
        for (int channel = 0; channel < 3; ++channel) {
          sums[k][channel] += weight * __ldg(from + channel * image.channel_stride);
        }
      }
      pixel += image.pixel_stride;
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (row + k * kGroups >= end) break;
      uint8_t* levels = &tile.pixels[row + k * kGroups - begin][3 * column];
#pragma unroll
      for (int channel = 0; channel < 3; ++channel) {
        levels[channel] = static_cast<uint8_t>(level_of(sums[k][channel]));
      }
    }
  }
}

// The vertical pass: adds the rows `begin` to `end` to the four sums at (row, value) of the tile.
__device__ __forceinline__ void add_rows(const Tile& tile, int begin, int end, int row, int value,
                                         int (&sums)[kQuad]) {
  const ResampleWindow& window = tile.rows[row];
  const int first = max(window.begin, begin), last = min(window.begin + window.count, end);
  for (int y = first; y < last; ++y) {
    const int weight = tile.row_weights[y - begin][row];
    const Vec<uint8_t, kQuad> levels = load_vec<kQuad>(&tile.pixels[y - begin][value]);
#pragma unroll
    for (int k = 0; k < kQuad; ++k) sums[k] += weight * levels[k];
  }
}

__device__ __forceinline__ float of_channel(const float (&values)[3], int channel) {
  return channel == 0 ? values[0] : channel == 1 ? values[1] : values[2];
}

// Normalises four sums and writes them to `out`, [width, 3] of one row of the batch; zeros behind
// the `filled` first values.
template <class T>
__device__ __forceinline__ void write_quad(const Batch& batch, const int (&sums)[kQuad],
                                           int value, int filled, T* out) {
  Vec<T, kQuad> quad;
#pragma unroll
  for (int k = 0; k < kQuad; ++k) {
    const int channel = (value + k) % 3;
    const float level = static_cast<float>(level_of(sums[k]));
    const float normal = __fdiv_rn(__fsub_rn(level, of_channel(batch.mean, channel)),
                                   of_channel(batch.std, channel));
    quad[k] = from_acc<T>(value + k < filled ? normal : 0.0f);
  }
  const int row_values = 3 * batch.width;
  if (batch.width % kQuad == 0) {  // every row begins where a vector may
    if (value < row_values) store_vec(out + value, quad);
    return;
  }
#pragma unroll
  for (int k = 0; k < kQuad; ++k) {
    if (value + k < row_values) out[value + k] = quad[k];
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 3)
    normalize_pad_kernel(const __grid_constant__ Batch batch, T* out) {
  SPARSE_RCNN_SHARED(Tile, shared, 1);
  Tile& tile = shared[0];
  const int across = (batch.width + kColumns - 1) / kColumns;
  const int row = static_cast<int>(blockIdx.x) / across * kRows;
  const int column = static_cast<int>(blockIdx.x) % across * kColumns;
  const ImageView& image = batch.images[blockIdx.y];
  const ImageSizes sizes =
      resolve_sizes(image, batch.sizes + 4 * int64_t{blockIdx.y}, batch.height, batch.width);

  int sums[kQuadsPerThread][kQuad];
#pragma unroll
  for (int j = 0; j < kQuadsPerThread; ++j) {
#pragma unroll
    for (int k = 0; k < kQuad; ++k) sums[j][k] = kResampleHalf;
  }
  if (row < sizes.new_height && column < sizes.new_width) {  // the whole block
    fill_windows(sizes, row, column, tile);
    __syncthreads();
    const ResampleWindow& lowest = tile.rows[min(kRows, sizes.new_height - row) - 1];
    const int end = lowest.begin + lowest.count;
    for (int begin = tile.rows[0].begin; begin < end; begin += kChunk) {
      const int chunk_end = min(begin + kChunk, end);
      fill_row_weights(begin, tile);
      if (tile.horizontal.support <= kTableSupport) {
        resample_rows<true, kRowsAtOnce>(image, sizes.row_stride, begin, chunk_end, tile);
      } else {
        resample_rows<false, 1>(image, sizes.row_stride, begin, chunk_end, tile);
      }
      __syncthreads();
#pragma unroll
      for (int j = 0; j < kQuadsPerThread; ++j) {
        const int quad = threadIdx.x + j * kThreads;
        add_rows(tile, begin, chunk_end, quad / kRowQuads, quad % kRowQuads * kQuad, sums[j]);
      }
      __syncthreads();
    }
  }
#pragma unroll
  for (int j = 0; j < kQuadsPerThread; ++j) {
    const int quad = threadIdx.x + j * kThreads;
    const int y = row + quad / kRowQuads;
    if (y < batch.height) {
      const int64_t out_row = int64_t{blockIdx.y} * batch.height + y;
      write_quad(batch, sums[j], 3 * column + quad % kRowQuads * kQuad,
                 y < sizes.new_height ? 3 * sizes.new_width : 0, out + out_row * batch.width * 3);
    }
  }
}

template <class T>
void launch_normalize_pad(const NormalizePadInputs& inputs, const Tensor& out) {
  Batch batch{};
  batch.height = static_cast<int>(inputs.height);
  batch.width = static_cast<int>(inputs.width);
  std::copy(inputs.mean, inputs.mean + 3, batch.mean);
  std::copy(inputs.std, inputs.std + 3, batch.std);
  const int64_t tiles = ceil_div(inputs.height, kRows) * ceil_div(inputs.width, kColumns);
  const int64_t count = static_cast<int64_t>(inputs.images.size());
  for (int64_t first = 0; first < count; first += kMaxImages) {
    const int64_t images = std::min<int64_t>(kMaxImages, count - first);
    std::copy_n(inputs.images.begin() + first, images, batch.images);
    batch.sizes = inputs.sizes.const_data_ptr<int64_t>() + 4 * first;
    const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(images));
    launch(normalize_pad_kernel<T>, grid, dim3(kThreads), 0, current_stream(out), batch,
           static_cast<T*>(out.mutable_data_ptr()) + first * inputs.height * inputs.width * 3);
  }
}

Tensor normalize_pad_cuda(const std::vector<Tensor>& images, const Tensor& sizes, int64_t height,
                          int64_t width, const std::vector<double>& mean,
                          const std::vector<double>& std, ScalarType dtype) {
  const NormalizePadInputs inputs = parse_normalize_pad(images, sizes, height, width, mean, std);
  const DeviceGuard guard(images[0]);
  const int64_t B = static_cast<int64_t>(images.size());
  const Tensor out =
      torch::stable::new_empty(images[0], std::vector<int64_t>{B, height, width, 3}, dtype);
  switch (dtype) {
    case ScalarType::Float: launch_normalize_pad<float>(inputs, out); break;
    case ScalarType::BFloat16: launch_normalize_pad<bfloat16>(inputs, out); break;
    case ScalarType::Half: launch_normalize_pad<float16>(inputs, out); break;
    default: STD_TORCH_CHECK(false, "dtype: expected float32, bfloat16 or float16");
  }
  return out;
}

}  // namespace
}  // namespace sparse_rcnn

SPARSE_RCNN_CUDA_IMPL(m) {
  m.impl("normalize_pad", TORCH_BOX(&sparse_rcnn::normalize_pad_cuda));
}
