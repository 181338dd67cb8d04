// RoIAlign over all levels of a pyramid and all images in one launch, forward and backward.
//
// Budget: 256 threads a block at most, no spills, no local memory; shared memory for 7 x 2 samples.
//                                       registers   shared memory   blocks a multiprocessor
//   forward, 16-byte accesses                  80          1.8 KB   3
//   forward, scalar                            71          1.8 KB   3
//   backward, 16-byte accesses                 56     14 or 27 KB   4 (16 or 32-bit gradients)
//   backward, scalar                           64          1.8 KB   4
//   ordered backward, 16-byte accesses         80          1.9 KB   3
//   ordered backward, scalar                  116          1.9 KB   2
//
// Predicted, not measured; to be checked on a GPU. R50 maps of 800 x 1344, 300 boxes of 32 to 512
// pixels, C = 256, 16-bit, L2 read at 5 TB/s. A box has 300 to 420 distinct cells of 512 bytes
// (784 samples' cells, 400 KB, if each tap were read for itself):
//   forward           A row of bins reads its own rows of cells, so neighbours read a fifth of them
//                     twice: 52 MB an image from L2 if the L1 catches that, else 64 MB. 10 to 13 us
//                     at batch 1, 170 to 200 us at batch 16. Next limit: about 5.5 million warp
//                     instructions an image, 8 us on 132 multiprocessors.
//   backward          One reduction a cell and channel, 350 KB a box, 105 MB an image, where one a
//                     tap would be 235 MB. With reductions at half the rate of reads: 40 us at
//                     batch 1, 0.7 ms at batch 16.
//   ordered backward  300 boxes reach about 3600 tiles of 8 x 8 cells, each in four parts by
//                     channel that make the box's taps anew: 35 us at batch 1, bound by
//                     instructions. Boxes that all lie on the few tiles of the coarsest level, as
//                     a first stage's do, are worse at batch 1: 96 blocks go through 300 boxes
//                     each, 0.4 ms.
// budget: multiscale_roi_align_forward_kernel: 80 registers, 65536 bytes shared, 256 threads
// budget: multiscale_roi_align_backward_kernel: 64 registers, 65536 bytes shared, 256 threads
// budget: multiscale_roi_align_ordered_backward_kernel: 116 registers, 65536 bytes shared, 256 threads
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "common/check.h"
#include "common/cuda.cuh"
#include "common/roi_align_args.h"
#include "cuda/roi_align.cuh"

namespace sparse_rcnn {
namespace {

constexpr int kThreads = 256;

// ------------------------------------------------------------------------------------------------
// Forward: a block has `rows` rows of bins of one box; a thread one row of bins and N channels.
// ------------------------------------------------------------------------------------------------

template <class T, bool kVectors>
__global__ void __launch_bounds__(kThreads, 3)
    multiscale_roi_align_forward_kernel(const __grid_constant__ RoiAlignArgs args, int rows,
                                        T* pooled) {
  using A = acc_t<T>;
  constexpr int N = kVectors ? kVecWidth<T> : 1;
  const int64_t roi = blockIdx.x;
  const auto taps = make_roi_taps<TapOrder::by_bin, A, !kVectors>(
      args, roi, dynamic_shared<char>());
  const int first = blockIdx.y * rows;
  const int last = min(first + rows, args.output_size);
  T* out = pooled + roi * args.output_size * args.output_size * args.channels;
  pool_bins<N, T>(args, taps, first, last, [&](int bin, int channel, const Vec<A, N>& sum) {
    Vec<T, N> rounded;
#pragma unroll
    for (int e = 0; e < N; ++e) rounded[e] = from_acc<T>(sum[e]);
    store_vec(out + bin * args.channels + channel, rounded);
  });
}

// ------------------------------------------------------------------------------------------------
// Backward, in no order: a block has kChunk channels of one box, its part of the gradient in
// shared memory if kStaged; a thread one row of cells and N channels.
// ------------------------------------------------------------------------------------------------

constexpr int kChunk = 128;

// A larger gradient is read where it is: less than three blocks would fit a multiprocessor.
constexpr size_t kStagedLimit = 64 * 1024;

template <class T>
size_t staged_bytes(const RoiAlignArgs& args) {
  return roi_taps_bytes<acc_t<T>>(args) + args.bins() * kChunk * sizeof(T);
}

// Starts copying channels first .. first + count of one box's gradient to tile [P][kChunk].
template <class T>
__device__ __forceinline__ void stage_gradient(const T* grad, int64_t channels, int bins, int count,
                                               T* tile) {
  const int vectors = count / kVecWidth<T>;
  for (int k = threadIdx.x; k < bins * vectors; k += kThreads) {
    const int bin = k / vectors, channel = k % vectors * kVecWidth<T>;
    cp_async_16(tile + bin * kChunk + channel, grad + bin * channels + channel, true);
  }
  cp_async_commit();
}

template <class T, bool kVectors, bool kStaged>
__global__ void __launch_bounds__(kThreads, 4)
    multiscale_roi_align_backward_kernel(const __grid_constant__ RoiAlignArgs args, const T* grad,
                                         acc_t<T>* grad_cells) {
  using A = acc_t<T>;
  constexpr int N = kVectors ? 4 : 1;
  const int64_t roi = blockIdx.x, first = int64_t{blockIdx.y} * kChunk;
  const int bins = args.output_size * args.output_size;
  const int count = static_cast<int>(min(args.channels - first, int64_t{kChunk}));
  const T* box_grad = grad + roi * bins * args.channels + first;
  char* shared = dynamic_shared<char>();
  T* tile = reinterpret_cast<T*>(shared + roi_taps_bytes<A>(args));
  if constexpr (kStaged) stage_gradient(box_grad, args.channels, bins, count, tile);
  const auto taps = make_roi_taps<TapOrder::by_cell, A, !kVectors>(args, roi, shared);
  if constexpr (kStaged) {
    cp_async_wait<0>();
    __syncthreads();
  }
  scatter_cells<N>(args, taps, first, count, grad_cells, [&](int bin, int channel) {
    if constexpr (kStaged) {
      return load_vec<N>(tile + bin * kChunk + channel);
    } else {
      return load_vec_const<N>(box_grad + bin * args.channels + channel);
    }
  });
}

// ------------------------------------------------------------------------------------------------
// Backward, in the boxes' order: a block has kTileChannels channels of a tile of cells of one map,
// and goes through the boxes of its image that reach the tile; a thread adds up kItems cells at N
// channels in registers. No other thread writes them, so results do not depend on the schedule.
// ------------------------------------------------------------------------------------------------

constexpr int kTile = 8;  // cells a side

template <bool kVectors>
constexpr int kTileChannels = kVectors ? 64 : 16;

struct Tile {
  int level;
  int64_t image;
  int row, column;  // of its first cell
};

__host__ __device__ inline int64_t tiles_along(int length) { return (length + kTile - 1) / kTile; }

__host__ __device__ inline int64_t tiles_of(const RoiAlignLevel& level) {
  return tiles_along(level.height) * tiles_along(level.width);
}

// Tiles count through the levels, then the images, rows and columns.
__device__ __forceinline__ Tile locate_tile(const RoiAlignArgs& args, int64_t index) {
  int level = 0;
  for (; index >= args.images * tiles_of(args.levels[level]); ++level) {
    index -= args.images * tiles_of(args.levels[level]);
  }
  const int64_t tiles = tiles_of(args.levels[level]);
  const int64_t columns = tiles_along(args.levels[level].width), in_map = index % tiles;
  return {.level = level,
          .image = index / tiles,
          .row = static_cast<int>(in_map / columns) * kTile,
          .column = static_cast<int>(in_map % columns) * kTile};
}

// False only if no sample between the two edges of a box reads the kTile cells from `first` on.
template <class BoxType>
__device__ __forceinline__ bool reaches(BoxType edge0, BoxType edge1, BoxType scale, int length,
                                        int first) {
  const BoxType last = static_cast<BoxType>(length - 1);
  const BoxType point0 = edge0 * scale - BoxType(0.5), point1 = edge1 * scale - BoxType(0.5);
  const BoxType low = min(max(min(point0, point1), BoxType(0)), last);
  const BoxType high = min(max(max(point0, point1), BoxType(0)), last);
  // A sample reads its own cell and the next; one more is for the rounding of the samples.
  return high + BoxType(2) >= BoxType(first) && low - BoxType(1) < BoxType(first) + BoxType(kTile);
}

template <class BoxType>
__device__ __forceinline__ bool box_reaches(const RoiAlignArgs& args, int64_t roi,
                                            const Tile& tile) {
  const BoxType* edges = static_cast<const BoxType*>(args.boxes) + 4 * roi;
  const BoxType box[4] = {edges[0], edges[1], edges[2], edges[3]};
  const RoiAlignLevel& level = args.levels[tile.level];
  const auto scale = static_cast<BoxType>(level.scale);
  return box_pools(box) && reaches(box[0], box[2], scale, level.width, tile.column) &&
         reaches(box[1], box[3], scale, level.height, tile.row) &&
         box_level(box, args.level_rule, args.finest, args.level_count) == tile.level;
}

// groups[axis][line]: the group of taps of each row and column of the tile, or -1.
template <class A>
__device__ __forceinline__ void find_groups(const RoiTaps<A>& taps, const Tile& tile,
                                            int (&groups)[2 * kTile]) {
  if (threadIdx.x < 2 * kTile) {
    const bool column = threadIdx.x >= kTile;
    const int* cells = column ? taps.columns.cells : taps.rows.cells;
    const int count = column ? taps.columns.count : taps.rows.count;
    const int cell = (column ? tile.column : tile.row) + threadIdx.x % kTile;
    int group = -1;
    for (int g = 0; g < count; ++g) {
      if (cells[g] == cell) group = g;
    }
    groups[threadIdx.x] = group;
  }
}

template <class T, bool kVectors>
__global__ void __launch_bounds__(kThreads, kVectors ? 3 : 2)
    multiscale_roi_align_ordered_backward_kernel(const __grid_constant__ RoiAlignArgs args,
                                                 const T* grad, acc_t<T>* grad_cells) {
  using A = acc_t<T>;
  constexpr int N = kVectors ? 4 : 1;
  constexpr int kVectorsOfTile = kTileChannels<kVectors> / N;
  constexpr int kItems = kTile * kTile * kVectorsOfTile / kThreads;
  SPARSE_RCNN_SHARED(unsigned, reaching, kThreads / kWarp);
  SPARSE_RCNN_SHARED(int, groups, 2 * kTile);
  const Tile tile = locate_tile(args, blockIdx.x);
  const int bins = args.output_size * args.output_size;
  // All of a thread's items have the same channels.
  const int channel = blockIdx.y * kTileChannels<kVectors> + threadIdx.x % kVectorsOfTile * N;
  const int first_cell = threadIdx.x / kVectorsOfTile;
  constexpr int kCellStep = kThreads / kVectorsOfTile;
  Vec<A, N> sums[kItems];
#pragma unroll
  for (int item = 0; item < kItems; ++item) set_zero(sums[item]);
  bool reached = false;
  for (int64_t base = 0; base < args.proposals; base += kThreads) {
    const int64_t proposal = base + threadIdx.x, roi = tile.image * args.proposals + proposal;
    const bool reach = proposal < args.proposals &&
                       (!kVectors && args.double_boxes ? box_reaches<double>(args, roi, tile)
                                                       : box_reaches<float>(args, roi, tile));
    const unsigned lanes = __ballot_sync(kWholeWarp, reach);
    __syncthreads();
    if (threadIdx.x % kWarp == 0) reaching[threadIdx.x / kWarp] = lanes;
    __syncthreads();
    for (int warp = 0; warp < kThreads / kWarp; ++warp) {
      for (unsigned left = reaching[warp]; left != 0; left &= left - 1) {
        const int64_t next = tile.image * args.proposals + base + warp * kWarp +
                             __ffs(static_cast<int>(left)) - 1;
        const auto taps = make_roi_taps<TapOrder::by_cell, A, !kVectors>(args, next,
                                                                         dynamic_shared<char>());
        find_groups(taps, tile, groups);
        __syncthreads();
        reached = true;
        const T* box_grad = grad + next * bins * args.channels + channel;
        const auto load = [&](int bin) {
          return load_vec_const<N>(box_grad + bin * args.channels);
        };
#pragma unroll
        for (int item = 0; item < kItems; ++item) {
          const int cell = first_cell + item * kCellStep;
          const int row = groups[cell / kTile], column = groups[kTile + cell % kTile];
          if (row >= 0 && column >= 0 && channel < args.channels) {
            gather_cell<N>(taps, row, column, args.output_size, load, sums[item]);
          }
        }
      }
    }
  }
  if (!reached || channel >= args.channels) return;
  const RoiAlignLevel& level = args.levels[tile.level];
#pragma unroll
  for (int item = 0; item < kItems; ++item) {
    const int cell = first_cell + item * kCellStep;
    const int row = tile.row + cell / kTile, column = tile.column + cell % kTile;
    if (row >= level.height || column >= level.width) continue;
    const int64_t at = level.row_offset + (tile.image * level.height + row) * level.width + column;
    A* address = grad_cells + at * args.channels + channel;
    Vec<A, N> total = load_vec<N>(address);
    add_scaled(total, A(1), sums[item]);
    store_vec(address, total);
  }
}

// ------------------------------------------------------------------------------------------------
// Launches
// ------------------------------------------------------------------------------------------------

bool is_aligned(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0;
}

// Grids count boxes or tiles along x and parts of the channels along y; threads count in 32 bits.
dim3 grid_of(int64_t x, int64_t y) {
  STD_TORCH_CHECK(x <= std::numeric_limits<int32_t>::max() && y <= 65535,
                  "multiscale_roi_align: too many boxes, cells or channels for one launch: ", x,
                  " x ", y, " blocks");
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y));
}

template <class T, bool kVectors>
void launch_forward(const RoiAlignInputs& inputs, const Tensor& pooled) {
  const RoiAlignArgs& args = inputs.args;
  const int64_t size = args.output_size;
  const int64_t vectors = args.channels / (kVectors ? kVecWidth<T> : 1);
  const int64_t rows = std::clamp<int64_t>(kThreads / vectors, 1, size);
  const int64_t threads = std::min<int64_t>(ceil_div(vectors * rows, kWarp) * kWarp, kThreads);
  launch(multiscale_roi_align_forward_kernel<T, kVectors>,
         grid_of(args.rois(), ceil_div(size, rows)), dim3(static_cast<unsigned>(threads)),
         roi_taps_bytes<acc_t<T>>(args), current_stream(inputs.boxes), args,
         static_cast<int>(rows), static_cast<T*>(pooled.data_ptr()));
}

template <class T, bool kVectors, bool kStaged>
void launch_backward(const RoiAlignInputs& inputs, const Tensor& grad, const Tensor& grad_cells) {
  const RoiAlignArgs& args = inputs.args;
  const size_t shared = kStaged ? staged_bytes<T>(args) : roi_taps_bytes<acc_t<T>>(args);
  launch(multiscale_roi_align_backward_kernel<T, kVectors, kStaged>,
         grid_of(args.rois(), ceil_div(args.channels, kChunk)), dim3(kThreads), shared,
         current_stream(inputs.boxes), args, static_cast<const T*>(grad.data_ptr()),
         static_cast<acc_t<T>*>(grad_cells.data_ptr()));
}

template <class T, bool kVectors>
void launch_ordered_backward(const RoiAlignInputs& inputs, const Tensor& grad,
                             const Tensor& grad_cells) {
  const RoiAlignArgs& args = inputs.args;
  int64_t tiles = 0;
  for (int level = 0; level < args.level_count; ++level) {
    tiles += args.images * tiles_of(args.levels[level]);
  }
  launch(multiscale_roi_align_ordered_backward_kernel<T, kVectors>,
         grid_of(tiles, ceil_div(args.channels, kTileChannels<kVectors>)), dim3(kThreads),
         roi_taps_bytes<acc_t<T>>(args), current_stream(inputs.boxes), args,
         static_cast<const T*>(grad.data_ptr()), static_cast<acc_t<T>*>(grad_cells.data_ptr()));
}

template <class T>
void launch_multiscale_roi_align(const RoiAlignInputs& inputs, const Tensor& pooled) {
  if constexpr (!std::is_same_v<T, double>) {
    if (has_vector_channels<T>(inputs.args)) return launch_forward<T, true>(inputs, pooled);
  }
  launch_forward<T, false>(inputs, pooled);
}

template <class T>
void launch_multiscale_roi_align_backward(const RoiAlignInputs& inputs, const Tensor& grad,
                                          bool deterministic, const Tensor& grad_cells) {
  if constexpr (!std::is_same_v<T, double>) {
    if (has_vector_channels<T>(inputs.args) && is_aligned(grad) && is_aligned(grad_cells)) {
      if (deterministic) return launch_ordered_backward<T, true>(inputs, grad, grad_cells);
      return staged_bytes<T>(inputs.args) <= kStagedLimit
                 ? launch_backward<T, true, true>(inputs, grad, grad_cells)
                 : launch_backward<T, true, false>(inputs, grad, grad_cells);
    }
  }
  deterministic ? launch_ordered_backward<T, false>(inputs, grad, grad_cells)
                : launch_backward<T, false, false>(inputs, grad, grad_cells);
}

// function(T()) for the maps' type T.
template <class Function>
void with_type(ScalarType dtype, Function function) {
  switch (dtype) {
    case ScalarType::Float:
      return function(float());
    case ScalarType::Double:
      return function(double());
    case ScalarType::BFloat16:
      return function(bfloat16());
    default:  // parse_roi_align() lets no other through
      return function(float16());
  }
}

Tensor multiscale_roi_align_cuda(const std::vector<Tensor>& features, const Tensor& boxes,
                                 const std::vector<int64_t>& strides, int64_t output_size,
                                 int64_t sampling_ratio, const std::string& level_rule) {
  const RoiAlignInputs inputs =
      parse_roi_align(features, boxes, strides, output_size, sampling_ratio, level_rule);
  const DeviceGuard guard(inputs.boxes);
  return pool_rois(inputs);
}

void multiscale_roi_align_backward_cuda(const Tensor& grad, const std::vector<Tensor>& features,
                                        const Tensor& boxes, const std::vector<int64_t>& strides,
                                        int64_t output_size, int64_t sampling_ratio,
                                        const std::string& level_rule, bool deterministic,
                                        const Tensor& grad_cells) {
  const RoiAlignInputs inputs = parse_roi_align(features, boxes, strides, output_size,
                                                sampling_ratio, level_rule, /*need_maps=*/false);
  const DeviceGuard guard(inputs.boxes);
  const Tensor dense_grad = parse_roi_align_grad(grad, inputs);
  if (wants_grad_cells(grad_cells, inputs)) {
    add_roi_align_gradient(inputs, dense_grad, deterministic, grad_cells);
  }
}

}  // namespace

Tensor pool_rois(const RoiAlignInputs& inputs) {
  const RoiAlignArgs& args = inputs.args;
  Tensor pooled = torch::stable::new_empty(
      inputs.maps[0], {args.images, args.proposals, args.bins(), args.channels});
  if (pooled.numel() > 0) {
    check_roi_align_sizes(args, pooled.element_size());
    with_type(inputs.dtype, [&](auto element) {
      launch_multiscale_roi_align<decltype(element)>(inputs, pooled);
    });
  }
  return pooled;
}

void add_roi_align_gradient(const RoiAlignInputs& inputs, const Tensor& grad, bool deterministic,
                            const Tensor& grad_cells) {
  if (grad.numel() == 0) return;
  with_type(inputs.dtype, [&](auto element) {
    using T = decltype(element);
    launch_multiscale_roi_align_backward<T>(inputs, grad, deterministic, grad_cells);
  });
}

}  // namespace sparse_rcnn

SPARSE_RCNN_CUDA_IMPL(m) {
  m.impl("multiscale_roi_align", TORCH_BOX(&sparse_rcnn::multiscale_roi_align_cuda));
  m.impl("multiscale_roi_align_backward",
         TORCH_BOX(&sparse_rcnn::multiscale_roi_align_backward_cuda));
}
