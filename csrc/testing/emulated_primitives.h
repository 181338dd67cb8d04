// The functions of common/cuda_primitives.cuh for the CPU: same names, same fragment layouts (its
// head comment), and the worst of what the hardware may do where it has a choice.
#pragma once

#include "../common/cuda.cuh"

namespace sparse_rcnn {

namespace emulator {

template <class T>
float half_of(uint32_t pair, int which) {
  return static_cast<float>(T(static_cast<uint16_t>(pair >> (16 * which)), T::from_bits()));
}

// The tensor cores read no more than tf32's bits of an operand.
inline float tf32_of(uint32_t bits) { return __uint_as_float(bits & 0xffffe000u); }

// d += a * b for the 16 x K and K x 8 matrices of a warp, from row-major copies. One product after
// the other in float: the hardware's order and inner precision are its own.
template <int K, class Of>
void accumulate(const float (&a)[16][K], const float (&b)[K][8], Of of) {
  for (int row = 0; row < 16; ++row) {
    float sum[8];
    for (int column = 0; column < 8; ++column) {
      sum[column] = of(row % 8 * 4 + column / 2).d[row / 8 * 2 + column % 2];
    }
    for (int k = 0; k < K; ++k) {
      for (int column = 0; column < 8; ++column) sum[column] += a[row][k] * b[k][column];
    }
    for (int column = 0; column < 8; ++column) {
      of(row % 8 * 4 + column / 2).d[row / 8 * 2 + column % 2] = sum[column];
    }
  }
}

struct MmaOperand {
  float* d;
  const uint32_t *a, *b;
};

struct MatrixRow {
  const void* address;
  uint32_t* r;
};

// The hardware reads a matrix in one pass, unless rows (not the same one twice) share banks.
template <class Of>
void count_conflicts(int matrix, Of of) {
  int rows_of_banks[8] = {};
  int passes = 1;
  for (int i = 0; i < 8; ++i) {
    const auto address = [&](int row) {
      return reinterpret_cast<uintptr_t>(of(matrix * 8 + row).address);
    };
    bool again = false;
    for (int earlier = 0; earlier < i; ++earlier) again |= address(earlier) == address(i);
    if (again) continue;
    const int rows = ++rows_of_banks[address(i) / 16 % 8];
    passes = rows > passes ? rows : passes;
  }
  statistics().ldmatrix += 1;
  statistics().ldmatrix_conflicts += passes - 1;
}

template <int Matrices, bool Transposed>
__forceinline__ void ldmatrix(uint32_t (&r)[Matrices], const void* row, Where where) {
  if (lane() < 8 * Matrices) {
    check_shared(row, 16, "ldmatrix");
    check_alignment(row, 16);
    note_access(row, 16, Access::read);
  }
  MatrixRow mine{row, r};
  warp_operation(mine, Transposed ? "ldmatrix.trans" : "ldmatrix", where, [](auto of) {
    for (int matrix = 0; matrix < Matrices; ++matrix) {
      count_conflicts(matrix, of);
      uint16_t m[8][8];
      for (int i = 0; i < 8; ++i) std::memcpy(m[i], of(matrix * 8 + i).address, 16);
      for (int lane = 0; lane < warpSize; ++lane) {
        const int i = lane / 4, j = lane % 4 * 2;
        const uint32_t low = Transposed ? m[j][i] : m[i][j];
        const uint32_t high = Transposed ? m[j + 1][i] : m[i][j + 1];
        of(lane).r[matrix] = low | high << 16;
      }
    }
  });
}

}  // namespace emulator

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  emulator::Where where = emulator::Where::current()) {
  static_assert(std::is_same_v<T, bfloat16> || std::is_same_v<T, float16>);
  emulator::MmaOperand mine{d, a, b};
  emulator::warp_operation(mine, "mma_m16n8k16", where, [](auto of) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < warpSize; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int half = 0; half < 2; ++half) {
        for (int r = 0; r < 4; ++r) {
          a[g + r % 2 * 8][2 * t + half + r / 2 * 8] = emulator::half_of<T>(of(lane).a[r], half);
        }
        for (int r = 0; r < 2; ++r) {
          b[2 * t + half + r * 8][g] = emulator::half_of<T>(of(lane).b[r], half);
        }
      }
    }
    emulator::accumulate(a, b, of);
    emulator::statistics().mma += 1;
  });
}

inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             emulator::Where where = emulator::Where::current()) {
  emulator::MmaOperand mine{d, a, b};
  emulator::warp_operation(mine, "mma_m16n8k8_tf32", where, [](auto of) {
    float a[16][8], b[8][8];
    for (int lane = 0; lane < warpSize; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int r = 0; r < 4; ++r) {
        a[g + r % 2 * 8][t + r / 2 * 4] = emulator::tf32_of(of(lane).a[r]);
      }
      for (int r = 0; r < 2; ++r) b[t + r * 4][g] = emulator::tf32_of(of(lane).b[r]);
    }
    emulator::accumulate(a, b, of);
    emulator::statistics().mma += 1;
  });
}

inline uint32_t to_tf32(float value) {
  const uint32_t bits = __float_as_uint(value);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return finite ? (bits + 0x1000u) & 0xffffe000u : std::isnan(value) ? 0x7fffffffu : bits;
}

template <class T>
uint32_t pack2(float low, float high) {
  static_assert(std::is_same_v<T, bfloat16> || std::is_same_v<T, float16>);
  return T(low).x | static_cast<uint32_t>(T(high).x) << 16;
}

__forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row,
                        emulator::Where where = emulator::Where::current()) {
  emulator::ldmatrix<4, false>(r, row, where);
}

__forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row,
                              emulator::Where where = emulator::Where::current()) {
  emulator::ldmatrix<4, true>(r, row, where);
}

__forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* row,
                        emulator::Where where = emulator::Where::current()) {
  emulator::ldmatrix<2, false>(r, row, where);
}

__forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row,
                              emulator::Where where = emulator::Where::current()) {
  emulator::ldmatrix<2, true>(r, row, where);
}

// The destination holds garbage from here until the wait for the copy, which is when it is made.
__forceinline__ void cp_async_16(void* shared, const void* global, bool valid) {
  emulator::cp_async(shared, global, valid);
}

inline void cp_async_commit() { emulator::cp_async_commit(); }

template <int Pending>
void cp_async_wait() {
  static_assert(Pending >= 0);
  emulator::cp_async_wait(Pending);
}

__forceinline__ void red_add(float* address, float value) { atomicAdd(address, value); }
__forceinline__ void red_add(double* address, double value) { atomicAdd(address, value); }

__forceinline__ void red_add4(float* address, float v0, float v1, float v2, float v3) {
  emulator::check_alignment(address, 16);
  red_add(address, v0);
  red_add(address + 1, v1);
  red_add(address + 2, v2);
  red_add(address + 3, v3);
}

}  // namespace sparse_rcnn
