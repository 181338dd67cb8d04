// The inner loops of RoIAlign for one box, for cpu/for_each_isa.h (its rules: cpu/isa.h). Needs
// cpu/roi_taps.h.
//
//   pool_roi(by bin, map, channels, out)                     out [P, C] = the box's bins
//   scatter_roi(by cell, first, end, grad, channels, cells)  rows of cells += the gradient
//
// Both keep a few vectors of channels in registers while they run over the taps. A bin is summed
// straight from the at most (2 * samples)^2 cells it reads, not by way of interpolated rows: the
// additions are as many, nothing in between is stored, and a cell that two bins read comes from a
// near cache the second time.

constexpr int kBlockVectors = SPARSE_RCNN_LEVEL >= SPARSE_RCNN_AVX512 ? 16 : 8;

// Some channels of one bin: kVectors vectors of them, or the first `part` lanes of one where kPart.
template <int kVectors, bool kPart, typename T, typename Out>
static inline void pool_channels(const RoiTaps<Accumulation<T>>& roi, int row_bin, int column_bin,
                                 const T* map, int64_t channels, int part, Out* out) {
  using A = Accumulation<T>;
  const TapGroups<A>& rows = roi.rows;
  const TapGroups<A>& columns = roi.columns;
  Vec<A> sums[kVectors] = {};
  for (int r = rows.begin[row_bin]; r < rows.begin[row_bin + 1]; ++r) {
    const T* row = map + rows.taps[r].cell * roi.width * channels;
    for (int k = columns.begin[column_bin]; k < columns.begin[column_bin + 1]; ++k) {
      const T* cell = row + columns.taps[k].cell * channels;
      const Vec<A> weight = splat<A>(rows.taps[r].weight * columns.taps[k].weight);
      for (int v = 0; v < kVectors; ++v) {
        const Vec<A> values = kPart ? load_part(cell, part) : load(cell + v * lanes<A>);
        sums[v] = fused_multiply_add(weight, values, sums[v]);
      }
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    if (kPart) {
      store_part(out, sums[v], part);
    } else {
      store(out + v * lanes<A>, sums[v]);
    }
  }
}

// `roi` by bin; `map` [H, W, C] of its level and image; `out` [S * S, C], every element written, of
// T or of the accumulation type.
template <typename T, typename Out>
static void pool_roi(const RoiTaps<Accumulation<T>>& roi, const T* map, int64_t channels,
                     Out* out) {
  constexpr int width = lanes<Accumulation<T>>;
  for (int i = 0; i < roi.rows.count; ++i) {
    for (int j = 0; j < roi.columns.count; ++j, out += channels) {
      int64_t c = 0;
      for (; c + kBlockVectors * width <= channels; c += kBlockVectors * width) {
        pool_channels<kBlockVectors, false>(roi, i, j, map + c, channels, 0, out + c);
      }
      for (; c + width <= channels; c += width) {
        pool_channels<1, false>(roi, i, j, map + c, channels, 0, out + c);
      }
      if (c < channels) {
        const int part = static_cast<int>(channels - c);
        pool_channels<1, true>(roi, i, j, map + c, channels, part, out + c);
      }
    }
  }
}

// Some channels of one cell, as above. The box's share is summed first and added to the cell once.
template <int kVectors, bool kPart, typename T>
static inline void scatter_channels(const RoiTaps<Accumulation<T>>& roi, int row_cell,
                                    int column_cell, const T* grad, int64_t channels, int part,
                                    Accumulation<T>* cell) {
  using A = Accumulation<T>;
  const TapGroups<A>& rows = roi.rows;
  const TapGroups<A>& columns = roi.columns;
  Vec<A> sums[kVectors] = {};
  for (int r = rows.begin[row_cell]; r < rows.begin[row_cell + 1]; ++r) {
    const T* row = grad + rows.taps[r].bin * roi.bins * channels;
    for (int k = columns.begin[column_cell]; k < columns.begin[column_cell + 1]; ++k) {
      const T* bin = row + columns.taps[k].bin * channels;
      const Vec<A> weight = splat<A>(rows.taps[r].weight * columns.taps[k].weight);
      for (int v = 0; v < kVectors; ++v) {
        const Vec<A> values = kPart ? load_part(bin, part) : load(bin + v * lanes<A>);
        sums[v] = fused_multiply_add(weight, values, sums[v]);
      }
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    if (kPart) {
      store_part(cell, load_part(cell, part) + sums[v], part);
    } else {
      store(cell + v * lanes<A>, load(cell + v * lanes<A>) + sums[v]);
    }
  }
}

// Adds to the rows `first` .. `end` of `cells` [H, W, C], of the box's level and image. `roi` by
// cell, `grad` [S * S, C].
template <typename T>
static void scatter_roi(const RoiTaps<Accumulation<T>>& roi, int first, int end, const T* grad,
                        int64_t channels, Accumulation<T>* cells) {
  using A = Accumulation<T>;
  constexpr int width = lanes<A>;
  for (int i = 0; i < roi.rows.count; ++i) {
    const int y = roi.rows.taps[roi.rows.begin[i]].cell;
    if (y < first || y >= end) continue;
    for (int j = 0; j < roi.columns.count; ++j) {
      const int x = roi.columns.taps[roi.columns.begin[j]].cell;
      A* cell = cells + (y * roi.width + x) * channels;
      int64_t c = 0;
      for (; c + kBlockVectors * width <= channels; c += kBlockVectors * width) {
        scatter_channels<kBlockVectors, false>(roi, i, j, grad + c, channels, 0, cell + c);
      }
      for (; c + width <= channels; c += width) {
        scatter_channels<1, false>(roi, i, j, grad + c, channels, 0, cell + c);
      }
      if (c < channels) {
        const int part = static_cast<int>(channels - c);
        scatter_channels<1, true>(roi, i, j, grad + c, channels, part, cell + c);
      }
    }
  }
}
