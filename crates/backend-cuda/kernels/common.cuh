// Shared by every kernel file. Compiled by NVRTC without any header: the few intrinsics that are needed are written here.
//
// Conventions:
// - A kernel takes one `const __grid_constant__` argument struct; its twin in src/args.rs is #[repr(C)], field by field.
// - `Mat` is a 2-D view of f32 (or u32) device memory; `twin` is the same view rounded to bfloat16, written by producers
//   and read by matrix products of quantized weights, null where nobody wants it.
// - Every kernel first lets its successor start (pdl_launch) and waits for its predecessors (pdl_wait) before it reads or
//   writes anything that an operation may have written. Weights may be read before the wait: nobody writes them.
// - What is written to a row depends on that row alone: no atomics on floats, reductions in an order that is a function
//   of the shape of one row.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define INFINITY __int_as_float(0x7f800000)
#define DEVICE static __device__ __forceinline__
#define METHOD __device__ __forceinline__
#define KERNEL extern "C" __global__ void

struct Mat {
  float* p;     // first element
  u16* twin;    // bfloat16 copy with the same stride, or null
  u32 rows, cols;
  u32 stride;   // elements between the starts of two rows
  u32 pad;
};

struct Paging {
  const u32* positions;
  const u32* sequences;
  const u32* block_table;
  u32 max_blocks;   // columns of the block table
  u32 block_size;
};

DEVICE void pdl_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
DEVICE void pdl_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Which warp of its block this is, so that the compiler knows that all of its lanes have the same number: addresses and counts that follow from it
// are kept once for the warp. By whole warps.
DEVICE u32 warp_index() { return __shfl_sync(0xffffffffu, threadIdx.x / 32, 0); }

DEVICE float bf16_to_f32(u16 x) { return __uint_as_float((u32)x << 16); }
// Nearest, ties to even.
DEVICE u32 pack_bf16(float lo, float hi) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}
DEVICE u16 f32_to_bf16(float x) { return (u16)pack_bf16(x, 0.f); }
DEVICE float f16_to_f32(u16 x) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(x));
  return r;
}
DEVICE u32 fma_bf16x2(u32 a, u32 b, u32 c) {
  u32 r;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}

// Streaming loads of weights: read once, so they should not push activations out of the first-level cache.
DEVICE uint4 load_stream(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
DEVICE uint2 load_stream(const uint2* p) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}
DEVICE u32 load_stream(const u32* p) {
  u32 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}

// c += a b for a 16x16 (rows of weights), b 16x8 (tokens), in bfloat16 with f32 sums.
DEVICE void mma_bf16(float c[4], const u32 a[4], u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

DEVICE float warp_sum(float x) {
#pragma unroll
  for (int d = 16; d > 0; d >>= 1) x += __shfl_xor_sync(0xffffffffu, x, d);
  return x;
}
DEVICE float warp_max(float x) {
#pragma unroll
  for (int d = 16; d > 0; d >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, d));
  return x;
}
// Sum over the block, in a fixed order; `scratch` holds a float a warp. Every thread gets it.
DEVICE float block_sum(float x, float* scratch) {
  x = warp_sum(x);
  int warps = (blockDim.x + 31) / 32;
  if (warps == 1) return x;
  __syncthreads();
  if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = x;
  __syncthreads();
  float s = 0.f;
  for (int i = 0; i < warps; i++) s += scratch[i];
  return s;
}

DEVICE float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }
// kind 0: SwiGLU; 1: clamped SwiGLU of gpt-oss.
struct Activation { u32 kind; float alpha, limit; u32 pad; };
DEVICE float activate(const Activation& a, float gate, float up) {
  if (a.kind == 0) return gate * sigmoid(gate) * up;
  gate = fminf(gate, a.limit);
  up = fminf(fmaxf(up, -a.limit), a.limit);
  return (up + 1.f) * gate * sigmoid(a.alpha * gate);
}

DEVICE void store(const Mat& m, u32 row, u32 col, float value) {
  u64 at = (u64)row * m.stride + col;
  m.p[at] = value;
  if (m.twin) m.twin[at] = f32_to_bf16(value);
}
