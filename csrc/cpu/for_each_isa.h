// Compiles the header named by SPARSE_RCNN_KERNELS once for each level of cpu/isa.h, with
// SPARSE_RCNN_LEVEL defined. No include guard: one use a file.
#include "cpu/isa.h"

namespace sparse_rcnn {

#define SPARSE_RCNN_LEVEL SPARSE_RCNN_BASELINE
namespace baseline {
#include "cpu/vector.h"
#include SPARSE_RCNN_KERNELS
}  // namespace baseline
#undef SPARSE_RCNN_LEVEL

#if SPARSE_RCNN_X86

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2")
#define SPARSE_RCNN_LEVEL SPARSE_RCNN_AVX2
namespace avx2 {
#include "cpu/vector.h"
#include SPARSE_RCNN_KERNELS
}  // namespace avx2
#undef SPARSE_RCNN_LEVEL
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define SPARSE_RCNN_LEVEL SPARSE_RCNN_AVX512
namespace avx512 {
#include "cpu/vector.h"
#include SPARSE_RCNN_KERNELS
}  // namespace avx512
#undef SPARSE_RCNN_LEVEL
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target( \
    "avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,prefer-vector-width=512")
#define SPARSE_RCNN_LEVEL SPARSE_RCNN_AVX512_BF16
namespace avx512_bf16 {
#include "cpu/vector.h"
#include SPARSE_RCNN_KERNELS
}  // namespace avx512_bf16
#undef SPARSE_RCNN_LEVEL
#pragma GCC pop_options

#endif

}  // namespace sparse_rcnn
