// The tensor cores' own instruction of Hopper, in bfloat16: 64 rows times 64 columns, the first operand in registers (as that of mma.m16n8k16 for each of four
// warps), the second in shared memory.
#pragma once
#include "common.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// A matrix in shared memory: rows of 128 swizzled bytes (its pieces of 16 bytes are in the order piece ^ row % 8), groups of eight rows 1024 bytes apart.
DEVICE u64 descriptor(u32 at) { return (u64)(at >> 4 & 0x3fff) | (u64)64 << 16 | (u64)64 << 32 | (u64)1 << 62; }

#define WGMMA_F4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define WGMMA_F32 WGMMA_F4(0), WGMMA_F4(4), WGMMA_F4(8), WGMMA_F4(12), WGMMA_F4(16), WGMMA_F4(20), WGMMA_F4(24), WGMMA_F4(28)
#define WGMMA_SUMS "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}"
// d = a b (`more` 0) or d += a b: 64 rows, 16 products, 64 columns. A row in shared memory is a column of b, or (TRANSPOSED) one of its 16 rows.
template <bool TRANSPOSED> DEVICE void wgmma_bf16(float d[32], const u32 a[4], u64 b, u32 more) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %37, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " WGMMA_SUMS ", {%32,%33,%34,%35}, %36, p, 1, 1, %38; }"
      : WGMMA_F32 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(more), "n"(TRANSPOSED ? 1 : 0));
}
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits for all products but the N latest groups, and keeps what reads their sums behind it.
template <int N> DEVICE void wgmma_wait(float d[32]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
#pragma unroll
  for (int i = 0; i < 32; i++) asm volatile("" : "+f"(d[i])::"memory");
}

#endif
