// Batched assignment on the CPU: shortest augmenting paths, one problem a task.
//
// The algorithm is that of D. F. Crouse, "On implementing 2D rectangular assignment algorithms"
// (2016), with SciPy's order of visiting columns, so that ties fall as in
// scipy.optimize.linear_sum_assignment. Sums are in double, as there.
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <cmath>
#include <vector>

#include "common/linear_assignment_args.h"

namespace sparse_rcnn {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// One problem with no more rows than columns. The arrays keep their memory from problem to problem.
class Assignment {
 public:
  // cost[row * columns + column]
  std::vector<double> cost;
  std::vector<int32_t> column_of_row;

  void solve(int32_t rows, int32_t columns) {
    rows_ = rows;
    columns_ = columns;
    u_.assign(rows, 0.0);
    v_.assign(columns, 0.0);
    path_.assign(columns, -1);
    row_of_column_.assign(columns, -1);
    column_of_row.assign(rows, -1);
    shortest_.resize(columns);
    remaining_.resize(columns);
    for (int32_t row = 0; row < rows; ++row) {
      const int32_t sink = shortest_path(row);
      update_duals(row);
      augment(row, sink);
    }
  }

 private:
  // Dijkstra over reduced costs from a free row to the nearest free column, which it returns.
  int32_t shortest_path(int32_t row) {
    distance_ = 0;
    row_seen_.assign(rows_, 0);
    column_seen_.assign(columns_, 0);
    std::fill(shortest_.begin(), shortest_.end(), kInfinity);
    int32_t left = columns_;
    // Backwards, so that a constant matrix gives the identity.
    for (int32_t k = 0; k < columns_; ++k) remaining_[k] = columns_ - k - 1;
    while (true) {
      row_seen_[row] = 1;
      const int32_t place = relax(row, left);
      distance_ = shortest_[remaining_[place]];
      const int32_t column = remaining_[place];
      column_seen_[column] = 1;
      remaining_[place] = remaining_[--left];
      if (row_of_column_[column] < 0) return column;
      row = row_of_column_[column];
    }
  }

  // Shorten the distances through `row`; where the nearest column stands among the remaining. Of
  // equally near ones a free column is preferred, the last of them.
  int32_t relax(int32_t row, int32_t left) {
    const double* costs = cost.data() + static_cast<int64_t>(row) * columns_;
    const double potential = u_[row];
    double lowest = kInfinity;
    int32_t place = 0;
    for (int32_t k = 0; k < left; ++k) {
      const int32_t column = remaining_[k];
      const double length = distance_ + costs[column] - potential - v_[column];
      if (length < shortest_[column]) {
        path_[column] = row;
        shortest_[column] = length;
      }
      const double nearest = shortest_[column];
      if (nearest < lowest || (nearest == lowest && row_of_column_[column] < 0)) {
        lowest = nearest;
        place = k;
      }
    }
    return place;
  }

  void update_duals(int32_t start) {
    u_[start] += distance_;
    for (int32_t row = 0; row < rows_; ++row) {
      if (row_seen_[row] && row != start) u_[row] += distance_ - shortest_[column_of_row[row]];
    }
    for (int32_t column = 0; column < columns_; ++column) {
      if (column_seen_[column]) v_[column] -= distance_ - shortest_[column];
    }
  }

  void augment(int32_t start, int32_t column) {
    while (true) {
      const int32_t row = path_[column];
      row_of_column_[column] = row;
      const int32_t next = column_of_row[row];
      column_of_row[row] = column;
      if (row == start) return;
      column = next;
    }
  }

  int32_t rows_ = 0, columns_ = 0;
  double distance_ = 0;
  std::vector<double> u_, v_, shortest_;
  std::vector<int32_t> path_, row_of_column_, remaining_;
  std::vector<uint8_t> row_seen_, column_seen_;
};

// Copies the problem with its shorter side as rows. False when a cost is not finite.
template <typename T>
bool load(const T* cost, int32_t proposals, int32_t targets, int32_t count, bool rows_are_targets,
          std::vector<double>& into) {
  into.resize(static_cast<size_t>(proposals) * count);
  for (int64_t proposal = 0; proposal < proposals; ++proposal) {
    for (int64_t target = 0; target < count; ++target) {
      const double value = cost[proposal * targets + target];
      into[rows_are_targets ? target * proposals + proposal : proposal * count + target] = value;
      if (!(std::abs(value) < kInfinity)) return false;
    }
  }
  return true;
}

template <typename T>
void solve_problem(const LinearAssignmentInputs& inputs, int64_t problem, Assignment& assignment,
                   int64_t* result, std::atomic<bool>& finite) {
  const int32_t N = inputs.proposals, M = inputs.targets;
  const int32_t count = static_cast<int32_t>(inputs.counts.const_data_ptr<int64_t>()[problem]);
  const T* cost = inputs.cost.const_data_ptr<T>() + problem * N * M;
  const bool rows_are_targets = count < N;
  std::fill(result, result + M, int64_t{-1});
  if (!load(cost, N, M, count, rows_are_targets, assignment.cost)) {
    finite = false;
    return;
  }
  assignment.solve(std::min(N, count), std::max(N, count));
  for (int32_t row = 0; row < std::min(N, count); ++row) {
    const int32_t column = assignment.column_of_row[row];
    result[rows_are_targets ? row : column] = rows_are_targets ? column : row;
  }
}

Tensor linear_assignment_cpu(const Tensor& cost, const Tensor& counts) {
  const LinearAssignmentInputs inputs = parse_linear_assignment(cost, counts);
  const int64_t* sizes = inputs.counts.const_data_ptr<int64_t>();
  for (int64_t problem = 0; problem < inputs.problems; ++problem) {
    STD_TORCH_CHECK(sizes[problem] >= 0 && sizes[problem] <= inputs.targets, "counts: expected 0..",
                    inputs.targets, ", the columns of cost, got ", sizes[problem]);
  }
  const Tensor result = torch::stable::new_empty(
      inputs.counts, std::vector<int64_t>{inputs.problems, inputs.targets});
  int64_t* matches = result.mutable_data_ptr<int64_t>();
  std::atomic<bool> finite = true;
  torch::stable::parallel_for(0, inputs.problems, 1, [&](int64_t begin, int64_t end) {
    Assignment assignment;
    for (int64_t problem = begin; problem < end; ++problem) {
      int64_t* row = matches + problem * inputs.targets;
      if (inputs.cost.scalar_type() == ScalarType::Double) {
        solve_problem<double>(inputs, problem, assignment, row, finite);
      } else {
        solve_problem<float>(inputs, problem, assignment, row, finite);
      }
    }
  });
  STD_TORCH_CHECK(finite, "cost: expected finite numbers, got NaN or infinity");
  return result;
}

}  // namespace
}  // namespace sparse_rcnn

STABLE_TORCH_LIBRARY_IMPL(sparse_rcnn, CPU, m) {
  m.impl("linear_assignment", TORCH_BOX(&sparse_rcnn::linear_assignment_cpu));
}
