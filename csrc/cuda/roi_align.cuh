// RoIAlign of one box by one block, forward and backward: what multiscale_roi_align.cu and the
// fused roi_dynamic_conv.cu share.
//
//   make_roi_taps   the box's level and its taps (common/box_math.h), computed once into shared
//                   memory: in groups by bin for the forward, by cell for the backward
//   pool_bins       each bin is the weighted sum of the cells of its group of rows and of columns
//   scatter_cells   each cell of the footprint gets the weighted sum of the gradients of its bins,
//                   in one reduction
//
// A thread has N adjacent channels; N * sizeof is one vector access, or N = 1 for channels that are
// no multiple of it. The block has any multiple of 32 threads, all of which call make_roi_taps().
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/box_math.h"
#include "common/cuda.cuh"
#include "common/roi_align_args.h"

namespace sparse_rcnn {

// ------------------------------------------------------------------------------------------------
// Taps in shared memory
// ------------------------------------------------------------------------------------------------

enum class TapOrder { by_bin, by_cell };

// Of a bin: `index` is a cell; of a cell: a bin.
template <class A>
struct alignas(2 * sizeof(A)) GroupedTap {
  int index;
  A weight;
};

// The taps of one axis. Group g is taps[begin[g]] up to taps[begin[g + 1]], indices ascending.
template <class A>
struct TapGroups {
  const GroupedTap<A>* taps;
  const int* begin;
  const int* cells;  // by cell: that of each group, ascending
  int count;         // by bin: output_size, also where the box reads nothing
};

// What one box reads. A box that pools to zeros has groups without taps, or no groups.
template <class A>
struct RoiTaps {
  int level;
  int64_t image;
  TapGroups<A> rows;
  TapGroups<A> columns;
};

namespace detail {

constexpr int kNoCell = INT32_MAX;

__host__ __device__ constexpr size_t padded(size_t bytes) { return (bytes + 15) / 16 * 16; }

// Where make_roi_taps() puts things, for each axis in turn.
template <class A>
struct TapSpace {
  int capacity;  // taps of an axis

  __host__ __device__ explicit TapSpace(int samples) : capacity(2 * samples) {}

  __host__ __device__ size_t slots() const { return 0; }
  __host__ __device__ size_t taps() const { return padded(sizeof(Tap<A>) * capacity); }
  __host__ __device__ size_t order() const {
    return taps() + padded(sizeof(GroupedTap<A>) * capacity);
  }
  __host__ __device__ size_t cells() const { return order() + padded(sizeof(int) * capacity); }
  __host__ __device__ size_t begin() const { return cells() + padded(sizeof(int) * capacity); }
  __host__ __device__ size_t count() const {
    return begin() + padded(sizeof(int) * (capacity + 1));
  }
  __host__ __device__ size_t axis_bytes() const { return count() + padded(sizeof(int)); }
};

// The slots of one bin of one axis: its taps, then none. Returns the box's level.
template <class A, class BoxType>
__device__ __forceinline__ int fill_slots(const RoiAlignArgs& args, int64_t roi, char* shared) {
  const TapSpace<A> space(args.output_size * args.sampling_ratio);
  const BoxType* edges = static_cast<const BoxType*>(args.boxes) + 4 * roi;
  const BoxType box[4] = {edges[0], edges[1], edges[2], edges[3]};
  const int level = box_level(box, args.level_rule, args.finest, args.level_count);
  const auto scale = static_cast<BoxType>(args.levels[level].scale);
  const int per_bin = 2 * args.sampling_ratio;
  for (int k = threadIdx.x; k < 2 * args.output_size; k += blockDim.x) {
    const bool column = k >= args.output_size;
    const int bin = column ? k - args.output_size : k;
    const int length = column ? args.levels[level].width : args.levels[level].height;
    const Axis<BoxType> axis = make_axis(column ? box[0] : box[1], column ? box[2] : box[3], scale,
                                         length, args.output_size);
    auto* slots = reinterpret_cast<Tap<A>*>(shared + column * space.axis_bytes() + space.slots());
    slots += bin * per_bin;
    int count = box_pools(box) ? bin_taps(axis, bin, args.sampling_ratio, slots) : 0;
    for (; count < per_bin; ++count) slots[count].cell = kNoCell;
  }
  return level;
}

// Slot `index` of an axis goes to its place: empty ones last, the others by bin, which is how they
// are, or by cell and then bin.
template <TapOrder kOrder, class A>
__device__ __forceinline__ void place_tap(const TapSpace<A>& space, int index, char* axis) {
  const auto* slots = reinterpret_cast<const Tap<A>*>(axis + space.slots());
  const auto key = [](const Tap<A>& tap) {
    return kOrder == TapOrder::by_cell ? tap.cell : static_cast<int>(tap.cell == kNoCell);
  };
  const Tap<A> tap = slots[index];
  int rank = 0;
  for (int k = 0; k < space.capacity; ++k) {
    const int other = key(slots[k]);
    rank += other < key(tap) || (other == key(tap) && k < index);
  }
  reinterpret_cast<int*>(axis + space.order())[rank] = tap.cell;
  if (tap.cell != kNoCell) {
    reinterpret_cast<GroupedTap<A>*>(axis + space.taps())[rank] = {
        kOrder == TapOrder::by_cell ? tap.bin : tap.cell, tap.weight};
  }
}

// Where the taps of bin `bin` begin once they are placed.
template <class A>
__device__ __forceinline__ void begin_bin(const TapSpace<A>& space, int bin, int per_bin,
                                          char* axis) {
  const auto* slots = reinterpret_cast<const Tap<A>*>(axis + space.slots());
  int taps = 0;
  for (int k = 0; k < bin * per_bin; ++k) taps += slots[k].cell != kNoCell;
  reinterpret_cast<int*>(axis + space.begin())[bin] = taps;
}

// The group that begins with placed tap `index`, if one does.
template <class A>
__device__ __forceinline__ void begin_cell(const TapSpace<A>& space, int index, char* axis) {
  const auto* order = reinterpret_cast<const int*>(axis + space.order());
  int* begin = reinterpret_cast<int*>(axis + space.begin());
  int* count = reinterpret_cast<int*>(axis + space.count());
  if (order[index] == kNoCell) {
    if (index == 0) *count = 0;
    return;
  }
  int group = 0;
  for (int k = 0; k < index; ++k) group += order[k] != order[k + 1];
  if (index == 0 || order[index] != order[index - 1]) {
    begin[group] = index;
    reinterpret_cast<int*>(axis + space.cells())[group] = order[index];
  }
  if (index + 1 == space.capacity || order[index + 1] == kNoCell) {
    begin[group + 1] = index + 1;
    *count = group + 1;
  }
}

}  // namespace detail

// Shared memory that make_roi_taps() needs, a multiple of 16 bytes.
template <class A>
__host__ __device__ inline size_t roi_taps_bytes(const RoiAlignArgs& args) {
  return 2 * detail::TapSpace<A>(args.output_size * args.sampling_ratio).axis_bytes();
}

// The taps of box `roi` (of B * N) for sums in A. `shared` is roi_taps_bytes() of shared memory,
// aligned to 16. Has barriers, the last one at the end; after one call the next may follow, but a
// barrier must lie between any other use of `shared` and this. Without kDoubleBoxes the boxes must
// be float, which saves a third of the registers.
template <TapOrder kOrder, class A, bool kDoubleBoxes>
__device__ __forceinline__ RoiTaps<A> make_roi_taps(const RoiAlignArgs& args, int64_t roi,
                                                    char* shared) {
  const detail::TapSpace<A> space(args.output_size * args.sampling_ratio);
  const size_t axis_bytes = space.axis_bytes();
  const int level = kDoubleBoxes && args.double_boxes
                        ? detail::fill_slots<A, double>(args, roi, shared)
                        : detail::fill_slots<A, float>(args, roi, shared);
  __syncthreads();
  for (int k = threadIdx.x; k < 2 * space.capacity; k += blockDim.x) {
    const bool column = k >= space.capacity;
    detail::place_tap<kOrder>(space, column ? k - space.capacity : k, shared + column * axis_bytes);
  }
  if constexpr (kOrder == TapOrder::by_bin) {
    const int ends = args.output_size + 1;
    for (int k = threadIdx.x; k < 2 * ends; k += blockDim.x) {
      const bool column = k >= ends;
      detail::begin_bin(space, column ? k - ends : k, 2 * args.sampling_ratio,
                        shared + column * axis_bytes);
    }
  } else {
    __syncthreads();
    for (int k = threadIdx.x; k < 2 * space.capacity; k += blockDim.x) {
      const bool column = k >= space.capacity;
      detail::begin_cell(space, column ? k - space.capacity : k, shared + column * axis_bytes);
    }
  }
  __syncthreads();
  const auto groups = [&](char* axis) {
    return TapGroups<A>{
        .taps = reinterpret_cast<const GroupedTap<A>*>(axis + space.taps()),
        .begin = reinterpret_cast<const int*>(axis + space.begin()),
        .cells = reinterpret_cast<const int*>(axis + space.cells()),
        .count = kOrder == TapOrder::by_bin ? args.output_size
                                            : *reinterpret_cast<const int*>(axis + space.count())};
  };
  return {.level = level,
          .image = roi / args.proposals,
          .rows = groups(shared),
          .columns = groups(shared + axis_bytes)};
}

// ------------------------------------------------------------------------------------------------
// Forward
// ------------------------------------------------------------------------------------------------

template <class A, int N>
__device__ __forceinline__ void set_zero(Vec<A, N>& values) {
#pragma unroll
  for (int e = 0; e < N; ++e) values[e] = A(0);
}

// sum += weight * values
template <class A, class T, int N>
__device__ __forceinline__ void add_scaled(Vec<A, N>& sum, A weight, const Vec<T, N>& values) {
#pragma unroll
  for (int e = 0; e < N; ++e) sum[e] += weight * static_cast<A>(values[e]);
}

namespace detail {

// Rows of cells that a thread loads at once: all that a bin has with up to two samples a side.
constexpr int kRowsAtOnce = 4;

// N values as they were loaded: 16-bit ones stay two to a register until they are used.
template <class T, int N>
struct Packed {
  using Word = std::conditional_t<sizeof(T) == 2 && N % 2 == 0, uint32_t, T>;
  static constexpr int kWords = N * sizeof(T) / sizeof(Word);
  Vec<Word, kWords> words;

  __device__ __forceinline__ void load(const char* address) {
    words = load_vec_const<kWords>(reinterpret_cast<const Word*>(address));
  }
  __device__ __forceinline__ acc_t<T> operator[](int e) const {
    if constexpr (std::is_same_v<T, bfloat16> && std::is_same_v<Word, uint32_t>) {
      // A bfloat16 is the upper half of a float.
      return __uint_as_float(e % 2 == 0 ? words[e / 2] << 16 : words[e / 2] & 0xffff0000u);
    } else {
      Vec<T, N> values;
      memcpy(&values, &words, sizeof(values));
      return to_acc(values[e]);
    }
  }
};

// The sum over rows begin .. end of weight * cell, in the column of cells that starts at `column`.
template <class T, int N, class A>
__device__ __forceinline__ Vec<A, N> sum_column(const GroupedTap<A>* rows, int begin, int end,
                                                const char* column, uint32_t row_bytes) {
  Vec<A, N> sum;
  set_zero(sum);
#pragma unroll 1
  for (int r = begin; r < end; r += kRowsAtOnce) {
    Packed<T, N> cells[kRowsAtOnce];
    A weights[kRowsAtOnce];
#pragma unroll
    for (int k = 0; k < kRowsAtOnce; ++k) {
      // Past the end the last row again, for nothing: no branches, and its cells are at hand.
      const GroupedTap<A> row = rows[min(r + k, end - 1)];
      cells[k].load(column + uint64_t{static_cast<uint32_t>(row.index)} * row_bytes);
      weights[k] = r + k < end ? row.weight : A(0);
    }
#pragma unroll
    for (int k = 0; k < kRowsAtOnce; ++k) {
#pragma unroll
      for (int e = 0; e < N; ++e) sum[e] += weights[k] * cells[k][e];
    }
  }
  return sum;
}

}  // namespace detail

// Rows `first` up to `last` of the box's bins: store(bin, channel, Vec<A, N>) is called once for
// each of their bins and N channels, by the thread that has them. `taps` are by bin.
template <int N, class T, class Store>
__device__ __forceinline__ void pool_bins(const RoiAlignArgs& args, const RoiTaps<acc_t<T>>& taps,
                                          int first, int last, Store store) {
  using A = acc_t<T>;
  const RoiAlignLevel& level = args.levels[taps.level];
  // Products of two 32-bit numbers: check_roi_align_sizes() sees to it.
  const uint32_t cell_bytes = static_cast<uint32_t>(args.channels) * sizeof(T);
  const uint32_t row_bytes = level.width * cell_bytes;
  const int64_t map_cells = static_cast<int64_t>(level.height) * level.width;
  const T* map = static_cast<const T*>(level.data) + taps.image * map_cells * args.channels;
  const int vectors = static_cast<int>(args.channels) / N;
  for (int item = threadIdx.x; item < (last - first) * vectors; item += blockDim.x) {
    const int row = first + item / vectors, channel = item % vectors * N;
    const char* cells = reinterpret_cast<const char*>(map + channel);
    const int row_begin = taps.rows.begin[row], row_end = taps.rows.begin[row + 1];
    Vec<A, N> column_sum;
    set_zero(column_sum);
    // A column is summed once for all bins, mostly two neighbours, that have it.
    int summed_cell = -1;
    for (int t = 0, column = 0; column < args.output_size; ++column) {
      Vec<A, N> sum;
      set_zero(sum);
      for (const int end = taps.columns.begin[column + 1]; t < end; ++t) {
        const GroupedTap<A> tap = taps.columns.taps[t];
        if (tap.index != summed_cell) {
          summed_cell = tap.index;
          column_sum = detail::sum_column<T, N>(
              taps.rows.taps, row_begin, row_end,
              cells + uint64_t{static_cast<uint32_t>(tap.index)} * cell_bytes, row_bytes);
        }
        add_scaled(sum, tap.weight, column_sum);
      }
      store(row * args.output_size + column, channel, sum);
    }
  }
}

// ------------------------------------------------------------------------------------------------
// Backward
// ------------------------------------------------------------------------------------------------

// Adds to `sum` the gradient of the cell at one group of rows and one of columns; load(bin) gives
// the Vec<T, N> of a bin's gradient.
template <int N, class A, class Load>
__device__ __forceinline__ void gather_cell(const RoiTaps<A>& taps, int row_group, int column_group,
                                            int output_size, Load load, Vec<A, N>& sum) {
  const int row_end = taps.rows.begin[row_group + 1];
  const int column_end = taps.columns.begin[column_group + 1];
#pragma unroll 1
  for (int r = taps.rows.begin[row_group]; r < row_end; ++r) {
    const GroupedTap<A> row = taps.rows.taps[r];
#pragma unroll 1
    for (int t = taps.columns.begin[column_group]; t < column_end; ++t) {
      const GroupedTap<A> column = taps.columns.taps[t];
      add_scaled(sum, row.weight * column.weight, load(row.index * output_size + column.index));
    }
  }
}

// Adds the gradient of channels `first` up to first + count into grad_cells, one reduction a cell
// and N channels. load(bin, channel) counts channels from `first`. `taps` are by cell.
template <int N, class A, class Load>
__device__ __forceinline__ void scatter_cells(const RoiAlignArgs& args, const RoiTaps<A>& taps,
                                              int64_t first, int count, A* grad_cells, Load load) {
  const RoiAlignLevel& level = args.levels[taps.level];
  const int64_t map_row = level.row_offset + taps.image * level.height * level.width;
  const int vectors = count / N;
  for (int item = threadIdx.x; item < taps.rows.count * vectors; item += blockDim.x) {
    const int row = item / vectors, channel = item % vectors * N;
    const int64_t first_cell = map_row + static_cast<int64_t>(taps.rows.cells[row]) * level.width;
    A* cells = grad_cells + first_cell * args.channels + first + channel;
    const auto load_bin = [&](int bin) { return load(bin, channel); };
    for (int column = 0; column < taps.columns.count; ++column) {
      Vec<A, N> sum;
      set_zero(sum);
      gather_cell<N>(taps, row, column, args.output_size, load_bin, sum);
      A* cell = cells + taps.columns.cells[column] * args.channels;
      if constexpr (N == 4 && std::is_same_v<A, float>) {
        red_add4(cell, sum[0], sum[1], sum[2], sum[3]);
      } else {
#pragma unroll
        for (int e = 0; e < N; ++e) red_add(cell + e, sum[e]);
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------
// Host side
// ------------------------------------------------------------------------------------------------

// Whether the vector kernels can be used: float boxes, and 16-byte accesses along the channels of
// the maps. Everything else, and double throughout, goes through the scalar ones.
template <class T>
inline bool has_vector_channels(const RoiAlignArgs& args) {
  bool possible = !std::is_same_v<T, double> && !args.double_boxes &&
                  args.channels % kVecWidth<T> == 0;
  for (int level = 0; level < args.level_count; ++level) {
    possible = possible && reinterpret_cast<uintptr_t>(args.levels[level].data) % 16 == 0;
  }
  return possible;
}

// What the kernels count in 32 bits: the bytes of a row of cells, the threads' items.
inline void check_roi_align_sizes(const RoiAlignArgs& args, size_t element_size) {
  for (int level = 0; level < args.level_count; ++level) {
    const int64_t cells = std::max<int64_t>(args.levels[level].width, kMaxSamples);
    STD_TORCH_CHECK(args.channels <= UINT32_MAX / static_cast<int64_t>(element_size) / cells,
                    "features[", level, "]: rows too large, ", args.levels[level].width,
                    " cells of ", args.channels, " channels");
  }
}

// The pooled features, [B, N, P, C]. In multiscale_roi_align.cu.
Tensor pool_rois(const RoiAlignInputs& inputs);

// Adds the gradient of the maps, given that of the pooled features, [B, N, P, C], contiguous and of
// the maps' type, into grad_cells. In multiscale_roi_align.cu.
void add_roi_align_gradient(const RoiAlignInputs& inputs, const Tensor& grad, bool deterministic,
                            const Tensor& grad_cells);

}  // namespace sparse_rcnn
