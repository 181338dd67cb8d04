// What one box reads of its level, ready for the kernels of cpu/roi_align_kernels.h: compiled once,
// for the baseline.
#pragma once

#include <cstdint>
#include <vector>

#include "common/box_math.h"
#include "common/roi_align_args.h"
#include "cpu/isa.h"

namespace sparse_rcnn {

// The taps of one axis in groups: those of a bin, or those of a cell. Group g is taps[begin[g]] ..
// taps[begin[g + 1]].
template <typename A>
struct TapGroups {
  const Tap<A>* taps;
  const int* begin;
  int count;
};

// The part of a level's map that one box reads, and with which weights. A box that pools to zeros
// has no taps.
template <typename A>
struct RoiTaps {
  int level;
  int64_t image;
  int64_t width;      // cells of a row of the map
  int64_t first_row;  // of the image's map in grad_cells
  int64_t bins;       // S, of each axis
  TapGroups<A> rows;
  TapGroups<A> columns;
};

// Makes RoiTaps, in memory that it owns: a result holds until the next one is made.
template <typename A>
class RoiTapMaker {
 public:
  explicit RoiTapMaker(const RoiAlignArgs& args) : args_(args) {
    const size_t taps = size_t{2} * args.output_size * args.sampling_ratio;
    for (int axis = 0; axis < 2; ++axis) {
      taps_[axis].resize(taps);
      begin_[axis].resize(taps + 1);  // cells are as many as taps at most, bins are fewer
    }
  }

  // For the forward: groups are the S bins of each axis, in order.
  template <typename BoxType>
  RoiTaps<A> by_bin(const BoxType* boxes, int64_t roi) {
    return make<false>(boxes + roi * 4, roi);
  }

  // For the backward: groups are the distinct cells of each axis, ascending.
  template <typename BoxType>
  RoiTaps<A> by_cell(const BoxType* boxes, int64_t roi) {
    return make<true>(boxes + roi * 4, roi);
  }

 private:
  template <bool kByCell, typename BoxType>
  RoiTaps<A> make(const BoxType* box, int64_t roi) {
    const int index = box_level(box, args_.level_rule, args_.finest, args_.level_count);
    const RoiAlignLevel& level = args_.levels[index];
    const int64_t image = roi / args_.proposals;
    const auto scale = static_cast<BoxType>(level.scale);
    const bool pools = box_pools(box);
    return {
        .level = index,
        .image = image,
        .width = level.width,
        .first_row = level.row_offset + image * level.height * level.width,
        .bins = args_.output_size,
        .rows = group<kByCell>(make_axis(box[1], box[3], scale, level.height, args_.output_size),
                               pools, 0),
        .columns = group<kByCell>(make_axis(box[0], box[2], scale, level.width, args_.output_size),
                                  pools, 1),
    };
  }

  template <bool kByCell, typename BoxType>
  TapGroups<A> group(const Axis<BoxType>& axis, bool pools, int which) {
    Tap<A>* taps = taps_[which].data();
    int* begin = begin_[which].data();
    int groups = 0, count = 0;
    begin[0] = 0;
    if constexpr (kByCell) {
      count = pools ? axis_taps(axis, args_.output_size, args_.sampling_ratio, taps) : 0;
      sort_by_cell(taps, count);
      for (int k = 1; k <= count; ++k) {
        if (k == count || taps[k].cell != taps[k - 1].cell) begin[++groups] = k;
      }
    } else {
      for (int bin = 0; bin < args_.output_size; ++bin) {
        if (pools) count += bin_taps(axis, bin, args_.sampling_ratio, taps + count);
        begin[++groups] = count;
      }
    }
    return {taps, begin, groups};
  }

  const RoiAlignArgs& args_;
  std::vector<Tap<A>> taps_[2];
  std::vector<int> begin_[2];
};

}  // namespace sparse_rcnn
