// Every PTX instruction that the kernels use, one named wrapper each. csrc/testing has the same
// functions for the CPU (emulated_primitives.h), which also check what the hardware demands.
//
// Fragments of mma, as in the PTX ISA; g = lane / 4, t = lane % 4, register r holds a pair whose
// first element is in the low half (k and n count along the rows of memory):
//   m16n8k16, 16-bit:  a[0] = A[g][2t..]   a[1] = A[g+8][2t..]   a[2] = A[g][2t+8..]
//                      a[3] = A[g+8][2t+8..]
//                      b[0] = B[2t..][g]   b[1] = B[2t+8..][g]          (a pair runs along k)
//   m16n8k8, tf32:     a[0] = A[g][t]  a[1] = A[g+8][t]  a[2] = A[g][t+4]  a[3] = A[g+8][t+4]
//                      b[0] = B[t][g]  b[1] = B[t+4][g]
//   both:              d[0], d[1] = D[g][2t], D[g][2t+1]   d[2], d[3] = D[g+8][2t], D[g+8][2t+1]
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cuda.cuh"

namespace sparse_rcnn {

// ------------------------------------------------------------------------------------------------
// Tensor cores
// ------------------------------------------------------------------------------------------------

// d += a * b for T = bfloat16 or float16, accumulated in float.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, bfloat16> || std::is_same_v<T, float16>);
  if constexpr (std::is_same_v<T, bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// d += a * b for operands from to_tf32().
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Rounds to the 10-bit mantissa of tf32, ties away from zero.
__device__ __forceinline__ uint32_t to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

// Two floats rounded (to nearest even) to a pair of T, `low` in the low half: a fragment register.
template <class T>
__device__ __forceinline__ uint32_t pack2(float low, float high) {
  static_assert(std::is_same_v<T, bfloat16> || std::is_same_v<T, float16>);
  uint32_t bits;
  if constexpr (std::is_same_v<T, bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&bits, &pair, sizeof(bits));
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&bits, &pair, sizeof(bits));
  }
  return bits;
}

// ------------------------------------------------------------------------------------------------
// Shared memory -> fragments: 8x8 matrices of 16-bit elements
// ------------------------------------------------------------------------------------------------

// Lane 8j + i gives the address of row i (16 bytes, aligned to 16) of matrix j; register j of lane
// l becomes elements 2(l % 4), 2(l % 4) + 1 of row l / 4 of matrix j. With _trans: rows 2(l % 4),
// 2(l % 4) + 1 of column l / 4. The _x2 forms read the addresses of lanes 0 to 15 only.

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

// ------------------------------------------------------------------------------------------------
// Global -> shared memory, asynchronously
// ------------------------------------------------------------------------------------------------

// Starts copying 16 bytes (both addresses multiples of 16); zeros, and no read, unless `valid`.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0)
               : "memory");
}

// Closes the group of the thread's copies started since the last commit; a group may be empty.
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most the newest Pending of the thread's own groups are under way. Other threads
// see the data after a barrier that follows.
template <int Pending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// ------------------------------------------------------------------------------------------------
// Reductions in global memory, relaxed, in no order
// ------------------------------------------------------------------------------------------------

__device__ __forceinline__ void red_add(float* address, float value) { atomicAdd(address, value); }
__device__ __forceinline__ void red_add(double* address, double value) {
  atomicAdd(address, value);
}

// Four adjacent floats, the address a multiple of 16 bytes. Each is atomic, the four together not.
__device__ __forceinline__ void red_add4(float* address, float v0, float v1, float v2, float v3) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(
                   __cvta_generic_to_global(address)),
               "f"(v0), "f"(v1), "f"(v2), "f"(v3)
               : "memory");
#else
  red_add(address, v0);
  red_add(address + 1, v1);
  red_add(address + 2, v2);
  red_add(address + 3, v3);
#endif
}

}  // namespace sparse_rcnn
