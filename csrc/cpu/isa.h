// One binary, several instruction sets: a kernel header is compiled once for each level below, in a
// namespace of that level's name, and the best that the processor has is chosen at run time.
//
// A source file does
//     #define SPARSE_RCNN_KERNELS "cpu/<op>_kernels.h"
//     #include "cpu/for_each_isa.h"
//     ...
//     const auto kernel = SPARSE_RCNN_BEST(pool_roi<float, float>);
// The kernel header has no include guard and no #include but of other kernel headers: what it needs
// is included before. It uses the helpers of cpu/vector.h (included for it, level by level), its
// own functions, and intrinsics under #if SPARSE_RCNN_LEVEL >= SPARSE_RCNN_AVX512 and the like.
// Four traps:
//   - not #ifdef __AVX512F__: GCC reads a whole C++ file before it obeys the pragmas that would
//     define it;
//   - no std:: templates or inline functions of other headers: compiled for a wide level, theirs
//     could be the copy that the linker keeps for all callers, on every processor;
//   - no lambdas in function templates: GCC gives them the flags in force where the template is
//     instantiated;
//   - parallel_for stays in the source file, which is compiled for the baseline.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SPARSE_RCNN_X86 1
#include <immintrin.h>
#else
#define SPARSE_RCNN_X86 0
#endif

namespace sparse_rcnn {

// Ascending; each has what those before have. avx512_bf16 adds conversions and dot products.
#define SPARSE_RCNN_BASELINE 0
#define SPARSE_RCNN_AVX2 1
#define SPARSE_RCNN_AVX512 2
#define SPARSE_RCNN_AVX512_BF16 3
enum class Isa { baseline, avx2, avx512, avx512_bf16 };

inline const char* isa_name(Isa isa) {
  constexpr const char* names[] = {"baseline", "avx2", "avx512", "avx512_bf16"};
  return names[static_cast<int>(isa)];
}

// What the processor has, at most what torch's own ATEN_CPU_CAPABILITY allows ("default", "avx2",
// "avx512").
inline Isa detect_isa() {
#if SPARSE_RCNN_X86
  const char* allowed = std::getenv("ATEN_CPU_CAPABILITY");
  if (allowed && std::strcmp(allowed, "default") == 0) return Isa::baseline;
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2"))) {
    return Isa::baseline;
  }
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) ||
      (allowed && std::strcmp(allowed, "avx2") == 0)) {
    return Isa::avx2;
  }
  return __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512;
#else
  return Isa::baseline;
#endif
}

inline Isa current_isa() {
  static const Isa isa = detect_isa();
  return isa;
}

// The stored forms of the half types, free of the inline conversions of torch's classes (see the
// second trap).
struct BFloat16Bits {
  uint16_t bits;
};
struct HalfBits {
  uint16_t bits;
};

// The type that sums over values of T are kept in.
template <typename T>
struct AccumulationOf {
  using type = float;
};
template <>
struct AccumulationOf<double> {
  using type = double;
};
template <typename T>
using Accumulation = typename AccumulationOf<T>::type;

}  // namespace sparse_rcnn

// A pointer to the best level's instance of a function (template arguments included).
#if SPARSE_RCNN_X86
#define SPARSE_RCNN_BEST(...)                                                                  \
  (::sparse_rcnn::current_isa() == ::sparse_rcnn::Isa::avx512_bf16 ? &avx512_bf16::__VA_ARGS__ \
   : ::sparse_rcnn::current_isa() == ::sparse_rcnn::Isa::avx512    ? &avx512::__VA_ARGS__      \
   : ::sparse_rcnn::current_isa() == ::sparse_rcnn::Isa::avx2      ? &avx2::__VA_ARGS__        \
                                                                   : &baseline::__VA_ARGS__)
#else
#define SPARSE_RCNN_BEST(...) (&baseline::__VA_ARGS__)
#endif
