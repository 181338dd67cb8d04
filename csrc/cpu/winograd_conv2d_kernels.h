// A block of tiles of winograd_conv2d, for cpu/for_each_isa.h (its rules: cpu/isa.h). Needs
// cpu/thread_memory.h and cpu/winograd_conv2d.h.
//
// F(2x2, 3x3) of Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2016: a tile
// is 2 x 2 cells of the result and the 4 x 4 cells of x that they see. Transformed, both are of 16
// points, and at each point the convolution is a product of matrices over the channels: 16 products
// for 4 results instead of 36.
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
  const int64_t across = (sizes.width + 1) / 2, down = (sizes.height + 1) / 2;
  const int64_t row = tile / across, image = row / down, image_y = 2 * (row - image * down);
  return {image * sizes.height + image_y, 2 * (tile - row * across), image_y};
}

// points [16, C], `step` from one to the next, = B^T cells B, of the pixels' channels.
static inline void transform_cells(const float* const (&cells)[kWinogradPoints], int64_t channels,
                                   int64_t step, float* points) {
  for (int64_t c = 0; c < channels; c += lanes<float>) {
    Vec<float> rows[kWinogradPoints];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Vec<float> d0 = load(cells[j] + c), d1 = load(cells[4 + j] + c);
      const Vec<float> d2 = load(cells[8 + j] + c), d3 = load(cells[12 + j] + c);
      rows[j] = d0 - d2;
      rows[4 + j] = d1 + d2;
      rows[8 + j] = d2 - d1;
      rows[12 + j] = d1 - d3;
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Vec<float>* row = rows + 4 * i;
      float* out = points + 4 * i * step + c;
      store(out, row[0] - row[2]);
      store(out + step, row[1] + row[2]);
      store(out + 2 * step, row[2] - row[1]);
      store(out + 3 * step, row[1] - row[3]);
    }
  }
}

// The comparison keeps NaN, as PyTorch's ReLU does.
static inline Vec<float> relu_if(bool relu, Vec<float> values) {
  return relu ? (Vec<float>{} > values ? Vec<float>{} : values) : values;
}

// Some outputs of the four cells of a tile, A^T points A; null pointers are outside of the map.
struct TileResult {
  const float* residual[4];
  float* out[4];
};

static inline void transform_points(const float* points, int64_t step, int64_t outputs,
                                    const float* bias, bool relu, const TileResult& result) {
  for (int64_t c = 0; c < outputs; c += lanes<float>) {
    Vec<float> rows[2][4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Vec<float> m0 = load(points + j * step + c), m1 = load(points + (4 + j) * step + c);
      const Vec<float> m2 = load(points + (8 + j) * step + c), m3 = load(points + (12 + j) * step + c);
      rows[0][j] = m0 + m1 + m2;
      rows[1][j] = m1 - m2 - m3;
    }
    const Vec<float> shift = bias ? load(bias + c) : Vec<float>{};
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const Vec<float>* row = rows[i];
      const Vec<float> values[2] = {row[0] + row[1] + row[2], row[1] - row[2] - row[3]};
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        const int cell = 2 * i + j;
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
  float* points = reinterpret_cast<float*>(space);         // [16, count, C]
  float* products = points + kWinogradPoints * count * C;  // [16, count, T]
  for (int64_t tile = 0; tile < count; ++tile) {
    const TilePlace place = tile_place(sizes, first + tile);
    const float* cells[kWinogradPoints];
    for (int cell = 0; cell < kWinogradPoints; ++cell) {
      const int64_t dy = cell / 4 - 1, x = place.x + cell % 4 - 1, y = place.image_y + dy;
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
      for (int cell = 0; cell < 4; ++cell) {
        const int64_t dy = cell / 2, x = place.x + cell % 2;
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
