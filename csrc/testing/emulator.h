// CUDA for g++: what the text of a .cu file needs to run on the CPU. common/cuda.cuh includes it in
// place of the CUDA runtime when SPARSE_RCNN_EMULATED is defined.
//
// A launch runs its blocks one after the other, in random order. A block's threads are fibers: one
// runs until a barrier or a warp operation, then another that is ready goes on, drawn at random, so
// that what no barrier orders happens in every order sooner or later; set_seed() repeats a run.
// Shared memory holds garbage when a block starts and is fenced. Reported, as a std::runtime_error
// out of launch(): writes over a fence, barriers and warp operations that not all threads reach or
// that they reach at different places, deadlock, and whatever a primitive of emulated_primitives.h
// finds misused. Stricter than the hardware: threads that have returned count as missing. Of plain
// accesses that should be atomic nothing shows, since one thread runs at a time: see races.h.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <string>
#include <type_traits>
#include <typeinfo>

#include "races.h"

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ static_assert(false, "declare it by SPARSE_RCNN_SHARED or dynamic_shared()");

// A key of its own for each declaration, also for each instance of a template.
#define SPARSE_RCNN_SHARED(type, name, size)                                   \
  type(&name)[size] = *static_cast<type(*)[size]>([] {                         \
    static const char key = 0;                                                 \
    return ::sparse_rcnn::emulator::static_shared(&key, sizeof(type) * (size), \
                                                  alignof(type), #name);       \
  }())

namespace sparse_rcnn {

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct alignas(8) uint2 {
  unsigned x, y;
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct alignas(8) float2 {
  float x, y;
};

struct alignas(16) float4 {
  float x, y, z, w;
};

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct Stream;
using cudaStream_t = Stream*;

// Of the thread that runs.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

namespace emulator {

using Where = std::source_location;

struct Statistics {
  uint64_t launches, blocks, threads;
  uint64_t barriers;          // of whole blocks
  uint64_t warp_operations;   // shuffles, votes, __syncwarp, mma, ldmatrix
  uint64_t mma;               // a warp's instructions
  uint64_t ldmatrix;          // 8x8 matrices, and the extra passes their bank conflicts cost
  uint64_t ldmatrix_conflicts;
  uint64_t cp_async_bytes;
  uint64_t shared_bytes;      // the most that a block used, static and dynamic
};
Statistics& statistics();

// The order of blocks and threads from here on.
void set_seed(uint64_t seed);
// The byte that shared memory is filled with at the start of a block; 0xff makes a NaN of every
// type. Negative: not filled, a block finds what those before it left.
void set_poison(int byte);

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

// The rest is called from kernels.

[[noreturn]] void fail(const std::string& message);

void* dynamic_shared();
void* static_shared(const void* key, size_t bytes, size_t alignment, const char* name);
// Fails unless the bytes are the block's shared memory.
void check_shared(const void* address, size_t bytes, const char* what);
void check_alignment(const void* address, size_t alignment);

void block_barrier(Where where);

// A warp operation: every lane comes with an operand, and the lane that is last gets them all (the
// others null, once it has called leave_warp()). Lanes must come to the same `where` and `what`
// with operands of the same type.
void* const* join_warp(void* operand, const std::type_info& type, const char* what, Where where);
void leave_warp();

// body(of) runs once, of(lane) is that lane's operand, which it may change.
template <class Operand, class Body>
void warp_operation(Operand& operand, const char* what, Where where, Body body) {
  if (void* const* operands = join_warp(&operand, typeid(Operand), what, where)) {
    const Unchecked others_operands;
    body([&](int lane) -> Operand& { return *static_cast<Operand*>(operands[lane]); });
    leave_warp();
  }
}

// One cp.async of the running thread; nothing arrives before cp_async_wait(). See
// emulated_primitives.h.
void cp_async(void* shared, const void* global, bool valid);
void cp_async_commit();
void cp_async_wait(int pending);

inline void check_mask(unsigned mask) {
  if (mask != 0xffffffffu) fail("a warp operation whose mask is not the whole warp");
}

template <class T>
T shuffle(T value, int source, const char* what, Where where) {
  static_assert(std::is_arithmetic_v<T>);
  struct Operand {
    T value;
    int source;
    T result;
  } mine{value, source, value};
  warp_operation(mine, what, where, [](auto of) {
    for (int lane = 0; lane < warpSize; ++lane) of(lane).result = of(of(lane).source).value;
  });
  return mine.result;
}

inline unsigned ballot(bool predicate, const char* what, Where where) {
  struct Operand {
    bool predicate;
    unsigned result;
  } mine{predicate, 0};
  warp_operation(mine, what, where, [](auto of) {
    unsigned all = 0;
    for (int lane = 0; lane < warpSize; ++lane) all |= unsigned{of(lane).predicate} << lane;
    for (int lane = 0; lane < warpSize; ++lane) of(lane).result = all;
  });
  return mine.result;
}

inline int lane() {
  return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % warpSize;
}

}  // namespace emulator

// ------------------------------------------------------------------------------------------------
// Barriers and warp operations
// ------------------------------------------------------------------------------------------------

inline void __syncthreads(emulator::Where where = emulator::Where::current()) {
  emulator::block_barrier(where);
}

inline void __syncwarp(unsigned mask = 0xffffffffu,
                       emulator::Where where = emulator::Where::current()) {
  emulator::check_mask(mask);
  char nothing = 0;
  emulator::warp_operation(nothing, "__syncwarp", where, [](auto) {});
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source,
              emulator::Where where = emulator::Where::current()) {
  emulator::check_mask(mask);
  return emulator::shuffle(value, source % warpSize, "__shfl_sync", where);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask,
                  emulator::Where where = emulator::Where::current()) {
  emulator::check_mask(mask);
  return emulator::shuffle(value, (emulator::lane() ^ lane_mask) % warpSize, "__shfl_xor_sync",
                           where);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, int delta,
                   emulator::Where where = emulator::Where::current()) {
  emulator::check_mask(mask);
  const int source = emulator::lane() + delta;
  return emulator::shuffle(value, source < warpSize ? source : emulator::lane(),
                           "__shfl_down_sync", where);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, int delta,
                 emulator::Where where = emulator::Where::current()) {
  emulator::check_mask(mask);
  const int source = emulator::lane() - delta;
  return emulator::shuffle(value, source >= 0 ? source : emulator::lane(), "__shfl_up_sync", where);
}

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              emulator::Where where = emulator::Where::current()) {
  emulator::check_mask(mask);
  return emulator::ballot(predicate != 0, "__ballot_sync", where);
}

inline int __all_sync(unsigned mask, int predicate,
                      emulator::Where where = emulator::Where::current()) {
  emulator::check_mask(mask);
  return emulator::ballot(predicate != 0, "__all_sync", where) == 0xffffffffu;
}

inline int __any_sync(unsigned mask, int predicate,
                      emulator::Where where = emulator::Where::current()) {
  emulator::check_mask(mask);
  return emulator::ballot(predicate != 0, "__any_sync", where) != 0;
}

// ------------------------------------------------------------------------------------------------
// Memory
// ------------------------------------------------------------------------------------------------

template <class T>
T __ldg(const T* address) {
  return *address;
}

// One thread runs at a time: nothing can come between.
template <class T>
__forceinline__ T atomicAdd(T* address, std::type_identity_t<T> value) {
  emulator::note_access(address, sizeof(T), emulator::Access::atomic);
  const emulator::Unchecked noted;
  const T before = *address;
  *address += value;
  return before;
}

template <class T>
__forceinline__ T atomicMax(T* address, std::type_identity_t<T> value) {
  static_assert(std::is_integral_v<T>);
  emulator::note_access(address, sizeof(T), emulator::Access::atomic);
  const emulator::Unchecked noted;
  const T before = *address;
  if (value > before) *address = value;
  return before;
}

inline void __threadfence() {}
inline void __threadfence_block() {}

// ------------------------------------------------------------------------------------------------
// Arithmetic
// ------------------------------------------------------------------------------------------------

inline float rsqrtf(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }

// Rounded on their own, never fused: compile with -ffp-contract=off.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double x) { return std::sqrt(x); }

inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

inline int __float_as_int(float x) { return static_cast<int>(__float_as_uint(x)); }
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<unsigned>(bits)); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }

// As CUDA's: of a number and a NaN, the number.
#define SPARSE_RCNN_MIN_MAX(type, less, greater)           \
  inline type min(type a, type b) { return less; }         \
  inline type max(type a, type b) { return greater; }
SPARSE_RCNN_MIN_MAX(int, a < b ? a : b, a > b ? a : b)
SPARSE_RCNN_MIN_MAX(unsigned, a < b ? a : b, a > b ? a : b)
SPARSE_RCNN_MIN_MAX(long, a < b ? a : b, a > b ? a : b)
SPARSE_RCNN_MIN_MAX(unsigned long, a < b ? a : b, a > b ? a : b)
SPARSE_RCNN_MIN_MAX(long long, a < b ? a : b, a > b ? a : b)
SPARSE_RCNN_MIN_MAX(unsigned long long, a < b ? a : b, a > b ? a : b)
SPARSE_RCNN_MIN_MAX(float, std::fmin(a, b), std::fmax(a, b))
SPARSE_RCNN_MIN_MAX(double, std::fmin(a, b), std::fmax(a, b))
#undef SPARSE_RCNN_MIN_MAX

}  // namespace sparse_rcnn
