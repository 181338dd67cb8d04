// A block of tiles of winograd_conv2d, for cpu/for_each_isa.h (its rules: cpu/isa.h). Needs
// cpu/thread_memory.h and cpu/winograd_conv2d.h.
//
// F(4x4, 3x3) of Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2016: a tile
// is 4 x 4 cells of the result and the 6 x 6 cells of x that they see. Transformed, both are of 36
// points, and at each point the convolution is a product of matrices over the channels: 36 products
// for 16 results instead of 144. Lavin and Gray interpolate at 0, 1, -1, 2, -2 and infinity; at
// 0, 2/3, -2/3, 3/2, -3/2 and infinity the error is half as large on average and a sixth at worst.
#include "cpu/small_gemm_operands.h"
// Second, as it uses the first.
#include "cpu/small_gemm_kernels.h"

// Tiles that go through all of it together: their points stay in the second cache, and the weights
// come from the third once a block.
constexpr int64_t winograd_tiles = 4 * tile_rows<float>;

static int64_t winograd_space(WinogradSizes sizes) {
  return kWinogradPoints * winograd_tiles * (sizes.channels + kWinogradMostOutputs) * 4;
}

// Where the cells of a tile lie.
struct TilePlace {
  int64_t y;  // of the first cell of the result, in the rows of all images
  int64_t x;
  int64_t image_y;  // the same in its image
};

static inline TilePlace tile_place(WinogradSizes sizes, int64_t tile) {
  const int64_t across = (sizes.width + 3) / 4, down = (sizes.height + 3) / 4;
  const int64_t row = tile / across, image = row / down, image_y = 4 * (row - image * down);
  return {image * sizes.height + image_y, 4 * (tile - row * across), image_y};
}

// A point and its square; the other is its reciprocal, and so the product of their squares is 1.
constexpr float kNear = 2.0f / 3, kNear2 = 4.0f / 9, kFar = 1.5f, kFar2 = 2.25f;

// The products of B^T, [6, 6], and six vectors.
static inline void interpolate(const Vec<float>* cells, Vec<float> (&points)[6]) {
  const Vec<float> d0 = cells[0], d1 = cells[1], d2 = cells[2];
  const Vec<float> d3 = cells[3], d4 = cells[4], d5 = cells[5];
  const Vec<float> near_even = d4 - kFar2 * d2, near_odd = kNear * (d3 - kFar2 * d1);
  const Vec<float> far_even = d4 - kNear2 * d2, far_odd = kFar * (d3 - kNear2 * d1);
  points[0] = (d0 + d4) - (kNear2 + kFar2) * d2;
  points[1] = near_even + near_odd;
  points[2] = near_even - near_odd;
  points[3] = far_even + far_odd;
  points[4] = far_even - far_odd;
  points[5] = (d1 + d5) - (kNear2 + kFar2) * d3;
}

// The products of A^T, [4, 6], and six vectors.
static inline void evaluate(const Vec<float>* points, Vec<float> (&cells)[4]) {
  const Vec<float> m1 = points[1], m2 = points[2], m3 = points[3], m4 = points[4];
  const Vec<float> near_even = m1 + m2, near_odd = kNear * (m1 - m2);
  const Vec<float> far_even = m3 + m4, far_odd = kFar * (m3 - m4);
  cells[0] = (near_even + far_even) + points[0];
  cells[1] = near_odd + far_odd;
  cells[2] = kNear2 * near_even + kFar2 * far_even;
  cells[3] = (kNear2 * near_odd + kFar2 * far_odd) + points[5];
}

// points [36, C], `step` from one to the next, = B^T cells B, of the pixels' channels.
static inline void transform_cells(const float* const (&cells)[kWinogradPoints], int64_t channels,
                                   int64_t step, float* points) {
  for (int64_t c = 0; c < channels; c += lanes<float>) {
    Vec<float> rows[kWinogradPoints];
    for (int j = 0; j < 6; ++j) {
      Vec<float> column[6], result[6];
#pragma GCC unroll 6
      for (int i = 0; i < 6; ++i) column[i] = load(cells[6 * i + j] + c);
      interpolate(column, result);
#pragma GCC unroll 6
      for (int i = 0; i < 6; ++i) rows[6 * i + j] = result[i];
    }
    for (int i = 0; i < 6; ++i) {
      Vec<float> result[6];
      interpolate(rows + 6 * i, result);
#pragma GCC unroll 6
      for (int j = 0; j < 6; ++j) store(points + (6 * i + j) * step + c, result[j]);
    }
  }
}

// The comparison keeps NaN, as PyTorch's ReLU does.
static inline Vec<float> relu_if(bool relu, Vec<float> values) {
  return relu ? (Vec<float>{} > values ? Vec<float>{} : values) : values;
}

// Some outputs of the cells of a tile, A^T points A; null pointers are outside of the map.
struct TileResult {
  const float* residual[kWinogradCells];
  float* out[kWinogradCells];
};

static inline void transform_points(const float* points, int64_t step, int64_t outputs,
                                    const float* bias, bool relu, const TileResult& result) {
  for (int64_t c = 0; c < outputs; c += lanes<float>) {
    Vec<float> rows[4 * 6];
    for (int j = 0; j < 6; ++j) {
      Vec<float> column[6], cells[4];
#pragma GCC unroll 6
      for (int i = 0; i < 6; ++i) column[i] = load(points + (6 * i + j) * step + c);
      evaluate(column, cells);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) rows[6 * i + j] = cells[i];
    }
    const Vec<float> shift = bias ? load(bias + c) : Vec<float>{};
    for (int i = 0; i < 4; ++i) {
      Vec<float> values[4];
      evaluate(rows + 6 * i, values);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const int cell = 4 * i + j;
        if (!result.out[cell]) continue;
        Vec<float> value = values[j] + shift;
        if (result.residual[cell]) value += load(result.residual[cell] + c);
        store(result.out[cell] + c, relu_if(relu, value));
      }
    }
  }
}

// Computes `count` tiles from `first` on. Of `ahead` it has its own use.
static void winograd_block(WinogradSizes sizes, const WinogradTensors& tensors, int64_t first,
                           int64_t count, Ahead& ahead, char* space) {
  const int64_t C = sizes.channels, K = sizes.outputs, T = sizes.together;
  float* points = reinterpret_cast<float*>(space);         // [36, count, C]
  float* products = points + kWinogradPoints * count * C;  // [36, count, T]
  for (int64_t tile = 0; tile < count; ++tile) {
    const TilePlace place = tile_place(sizes, first + tile);
    const float* cells[kWinogradPoints];
    for (int cell = 0; cell < kWinogradPoints; ++cell) {
      const int64_t dy = cell / 6 - 1, x = place.x + cell % 6 - 1, y = place.image_y + dy;
      const bool inside = y >= 0 && y < sizes.height && x >= 0 && x < sizes.width;
      const int64_t pixel = (place.y + dy) * sizes.width + x;
      cells[cell] = inside ? tensors.x + pixel * C : tensors.zeros;
    }
    transform_cells(cells, C, count * C, points + tile * C);
  }
  const int64_t piece = C * T;  // of the weights: those of T outputs at one point
  const float* weight = tensors.weight;
  const float* end = weight + K / T * kWinogradPoints * piece;
  for (int64_t k = 0; k < K; k += T) {
    for (int point = 0; point < kWinogradPoints; ++point, weight += piece) {
      const bool last = weight + piece == end;
      ahead.ranges[0] = {reinterpret_cast<const char*>(weight + piece),
                         reinterpret_cast<const char*>(weight + 2 * piece)};
      ahead.count = last ? 0 : 1;
      ahead.current = 0;
      multiply<float>({points + point * count * C, C, 1}, {weight, T, 1}, count, T, C, ahead,
                      products + point * count * T, T);
    }
    for (int64_t tile = 0; tile < count; ++tile) {
      const TilePlace place = tile_place(sizes, first + tile);
      TileResult result = {};
      for (int cell = 0; cell < kWinogradCells; ++cell) {
        const int64_t dy = cell / 4, x = place.x + cell % 4;
        if (place.image_y + dy >= sizes.height || x >= sizes.width) continue;
        const int64_t offset = ((place.y + dy) * sizes.width + x) * K + k;
        result.out[cell] = tensors.out + offset;
        if (tensors.residual) result.residual[cell] = tensors.residual + offset;
      }
      transform_points(products + tile * T, count * T, T, tensors.bias ? tensors.bias + k : nullptr,
                       tensors.relu, result);
    }
  }
}
