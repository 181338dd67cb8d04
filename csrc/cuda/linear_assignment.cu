// Batched assignment on the GPU: one warp a problem, all problems in one launch.
//
// The algorithm and its order of ties are those of csrc/cpu/linear_assignment.cpp; the lanes share
// each scan over the columns. A problem takes min(N, M) augmentations of a few scans each, every
// scan a handful of dependent steps, so the time is latency: a warp has no barriers to wait at, and
// six stages of sixteen images are 96 warps, fewer than an H200 has schedulers. The state of a
// problem (32 bytes a column) and its costs lie in shared memory where they fit, else in global
// memory, which the L2 serves.
//
// A cost that is not finite counts as kNotFinite: to raise, the host would have to wait.
//
// budget: linear_assignment_kernel: 112 registers, 101376 bytes shared, 32 threads
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "common/cuda.cuh"
#include "common/linear_assignment_args.h"

namespace sparse_rcnn {
namespace {

constexpr size_t kMaxShared = 99 * 1024;  // what every supported architecture grants a block
constexpr double kNotFinite = 1e30;
constexpr double kUnreached = 1e300;

// Where the arrays of one problem lie, in bytes; `rows` <= `columns`.
struct StateLayout {
  int64_t v, shortest, u, path, row_of_column, remaining, column_seen, column_of_row, row_seen, size;
};

__host__ __device__ inline StateLayout state_layout(int64_t rows, int64_t columns) {
  StateLayout at{};
  at.v = 0;
  at.shortest = at.v + 8 * columns;
  at.u = at.shortest + 8 * columns;
  at.path = at.u + 8 * rows;
  at.row_of_column = at.path + 4 * columns;
  at.remaining = at.row_of_column + 4 * columns;
  at.column_seen = at.remaining + 4 * columns;
  at.column_of_row = at.column_seen + 4 * columns;
  at.row_seen = at.column_of_row + 4 * rows;
  at.size = (at.row_seen + 4 * rows + 15) / 16 * 16;
  return at;
}

// One problem; its arrays are written by the lanes in turn, with a __syncwarp() between.
template <typename T>
struct Problem {
  const T* cost;
  int64_t row_stride, column_stride;  // of cost
  double *u, *v, *shortest;
  int *path, *row_of_column, *remaining, *column_seen, *column_of_row, *row_seen;
  int rows, columns;

  __device__ double cost_of(int row, int column) const {
    const double value = static_cast<double>(cost[row * row_stride + column * column_stride]);
    return value > -kNotFinite && value < kNotFinite ? value : kNotFinite;
  }
};

template <typename T>
__device__ Problem<T> place_arrays(char* state, int rows, int columns) {
  const StateLayout at = state_layout(rows, columns);
  Problem<T> problem{};
  problem.v = reinterpret_cast<double*>(state + at.v);
  problem.shortest = reinterpret_cast<double*>(state + at.shortest);
  problem.u = reinterpret_cast<double*>(state + at.u);
  problem.path = reinterpret_cast<int*>(state + at.path);
  problem.row_of_column = reinterpret_cast<int*>(state + at.row_of_column);
  problem.remaining = reinterpret_cast<int*>(state + at.remaining);
  problem.column_seen = reinterpret_cast<int*>(state + at.column_seen);
  problem.column_of_row = reinterpret_cast<int*>(state + at.column_of_row);
  problem.row_seen = reinterpret_cast<int*>(state + at.row_seen);
  problem.rows = rows;
  problem.columns = columns;
  return problem;
}

// The nearest column seen so far: its distance, its place among the remaining, and whether it is free.
struct Nearest {
  double distance;
  int place;
  bool free;
};

// Of equally near columns a free one is preferred, the last of them; else the first: what a scan in
// order ends with.
__device__ inline Nearest nearer(const Nearest& a, const Nearest& b) {
  if (a.distance != b.distance) return a.distance < b.distance ? a : b;
  if (a.free != b.free) return a.free ? a : b;
  return (a.place > b.place) == a.free ? a : b;
}

// Shorten the distances through `row`; the nearest of the `left` remaining columns, the same in every lane.
template <typename T>
__device__ Nearest relax(const Problem<T>& problem, int row, double distance, int left) {
  const double potential = problem.u[row];
  Nearest best{kUnreached, 1 << 30, false};
  for (int place = threadIdx.x; place < left; place += kWarp) {
    const int column = problem.remaining[place];
    const double length = distance + problem.cost_of(row, column) - potential - problem.v[column];
    if (length < problem.shortest[column]) {
      problem.path[column] = row;
      problem.shortest[column] = length;
    }
    best = nearer(best, {problem.shortest[column], place, problem.row_of_column[column] < 0});
  }
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    best = nearer(best, {shfl_xor(best.distance, mask), shfl_xor(best.place, mask),
                         shfl_xor(static_cast<int>(best.free), mask) != 0});
  }
  return best;
}

// Dijkstra from the free row `start` to the nearest free column, and the flip of the path to it.
template <typename T>
__device__ void augment_from(const Problem<T>& problem, int start) {
  const int lane = threadIdx.x;
  for (int column = lane; column < problem.columns; column += kWarp) {
    problem.shortest[column] = kUnreached;
    problem.column_seen[column] = 0;
    problem.remaining[column] = problem.columns - column - 1;
  }
  for (int row = lane; row < problem.rows; row += kWarp) problem.row_seen[row] = 0;
  __syncwarp();

  double distance = 0;
  int row = start, sink = -1;
  for (int left = problem.columns; sink < 0; --left) {
    const Nearest nearest = relax(problem, row, distance, left);
    const int column = problem.remaining[nearest.place];
    distance = nearest.distance;
    __syncwarp();  // all have read `remaining`
    if (lane == 0) {
      problem.row_seen[row] = 1;
      problem.column_seen[column] = 1;
      problem.remaining[nearest.place] = problem.remaining[left - 1];
    }
    sink = nearest.free ? column : -1;
    row = nearest.free ? row : problem.row_of_column[column];
    __syncwarp();
  }

  for (int seen = lane; seen < problem.rows; seen += kWarp) {
    if (seen == start) {
      problem.u[seen] += distance;
    } else if (problem.row_seen[seen]) {
      problem.u[seen] += distance - problem.shortest[problem.column_of_row[seen]];
    }
  }
  for (int column = lane; column < problem.columns; column += kWarp) {
    if (problem.column_seen[column]) problem.v[column] -= distance - problem.shortest[column];
  }
  __syncwarp();
  if (lane == 0) {
    for (int column = sink, flipped = -1; flipped != start;) {
      flipped = problem.path[column];
      problem.row_of_column[column] = flipped;
      const int next = problem.column_of_row[flipped];
      problem.column_of_row[flipped] = column;
      column = next;
    }
  }
  __syncwarp();
}

template <typename T>
__global__ void __launch_bounds__(kWarp, 16)  // without a number sm_90 is given too few registers
    linear_assignment_kernel(const T* costs, const int64_t* counts, int64_t* matches,
                             char* global_state, int proposals, int targets, bool state_shared,
                             bool cost_shared) {
  const int64_t index = blockIdx.x;
  const int lane = threadIdx.x;
  const int64_t wanted = counts[index];
  const int count = wanted < 0 ? 0 : wanted > targets ? targets : static_cast<int>(wanted);
  const bool rows_are_targets = count < proposals;
  const int rows = rows_are_targets ? count : proposals;
  const int columns = rows_are_targets ? proposals : count;
  const int64_t most = state_layout(min(proposals, targets), max(proposals, targets)).size;

  char* shared = dynamic_shared<char>();
  Problem<T> problem =
      place_arrays<T>(state_shared ? shared : global_state + index * most, rows, columns);
  const T* cost = costs + index * proposals * targets;
  if (cost_shared) {  // the real columns only, in the given order
    T* staged = reinterpret_cast<T*>(shared + (state_shared ? most : 0));
    for (int64_t k = lane; k < static_cast<int64_t>(proposals) * count; k += kWarp) {
      staged[k] = cost[k / count * targets + k % count];
    }
    cost = staged;
  }
  problem.cost = cost;
  const int64_t stride = cost_shared ? count : targets;
  problem.row_stride = rows_are_targets ? 1 : stride;
  problem.column_stride = rows_are_targets ? stride : 1;

  for (int column = lane; column < columns; column += kWarp) {
    problem.v[column] = 0;
    problem.path[column] = -1;
    problem.row_of_column[column] = -1;
  }
  for (int row = lane; row < rows; row += kWarp) {
    problem.u[row] = 0;
    problem.column_of_row[row] = -1;
  }
  __syncwarp();
  for (int row = 0; row < rows; ++row) augment_from(problem, row);

  int64_t* match = matches + index * targets;
  for (int target = lane; target < targets; target += kWarp) {
    const int* partner = rows_are_targets ? problem.column_of_row : problem.row_of_column;
    match[target] = target < count ? partner[target] : -1;
  }
}

template <typename T>
void launch_linear_assignment(const LinearAssignmentInputs& inputs, const Tensor& matches) {
  const int64_t rows = std::min(inputs.proposals, inputs.targets);
  const int64_t columns = std::max(inputs.proposals, inputs.targets);
  const size_t state = static_cast<size_t>(state_layout(rows, columns).size);
  const size_t costs = sizeof(T) * static_cast<size_t>(rows) * static_cast<size_t>(columns);
  const bool state_shared = state <= kMaxShared;
  const bool cost_shared = state_shared && state + costs <= kMaxShared;
  const int64_t scratch = state_shared ? 0 : static_cast<int64_t>(state) * inputs.problems;
  const Tensor global_state =
      torch::stable::new_empty(inputs.cost, std::vector<int64_t>{scratch}, ScalarType::Byte);
  launch(linear_assignment_kernel<T>, dim3(static_cast<unsigned>(inputs.problems)), dim3(kWarp),
         (state_shared ? state : 0) + (cost_shared ? costs : 0), current_stream(inputs.cost),
         inputs.cost.const_data_ptr<T>(), inputs.counts.const_data_ptr<int64_t>(),
         matches.mutable_data_ptr<int64_t>(), static_cast<char*>(global_state.mutable_data_ptr()),
         inputs.proposals, inputs.targets, state_shared, cost_shared);
}

Tensor linear_assignment_cuda(const Tensor& cost, const Tensor& counts) {
  const LinearAssignmentInputs inputs = parse_linear_assignment(cost, counts);
  const DeviceGuard guard(inputs.cost);
  const Tensor matches = torch::stable::new_empty(
      inputs.counts, std::vector<int64_t>{inputs.problems, inputs.targets});
  if (inputs.targets == 0) return matches;
  if (inputs.cost.scalar_type() == ScalarType::Double) {
    launch_linear_assignment<double>(inputs, matches);
  } else {
    launch_linear_assignment<float>(inputs, matches);
  }
  return matches;
}

}  // namespace
}  // namespace sparse_rcnn

SPARSE_RCNN_CUDA_IMPL(m) {
  m.impl("linear_assignment", TORCH_BOX(&sparse_rcnn::linear_assignment_cuda));
}
