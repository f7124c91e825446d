// One row of activations and one block of up to 256 threads: norms, rotations, and the forms that products read.
//
// A thread has eight neighbouring columns, 8 (256 i + thread) for i = 0, 1, ..; whoever works on a row, alone or before a product, does
// it in this order, so that the bits are the same.
#pragma once
#include "packed.cuh"

#define ROW_STEPS 4  // rows of up to 8192 columns stay in registers
#define ROW_COLUMNS 2048

// Where the row of a product comes from.
struct RowInput {
  Mat x;              // floats; the twin is read where it is taken as it lies
  const u8* digits;   // the same for affine formats
  u32 kind;           // 0: as it lies (twin or digits), 1: from its floats, 2: from their norm
  float eps;
  const float* weight;
  Mat out;            // where the norm goes too, as floats and twin; null where it does not. Not over x: other blocks may still read it
  u8* out_digits;     // and as digits, or null
};

DEVICE u32 row_column(u32 i) { return (i * 256 + threadIdx.x) * 8; }
DEVICE bool is_wide(const float* p, u32 cols) { return (u64)p % 16 == 0 && cols % 8 == 0; }

// Columns c .. c + 8 of a row; zeros past its end. `wide`: the row starts at a multiple of 16 bytes and has whole eights.
DEVICE void load8(float v[8], const float* row, u32 c, u32 cols, bool wide) {
  if (wide) {
    float4 lo = make_float4(0.f, 0.f, 0.f, 0.f), hi = lo;
    if (c < cols) { lo = *(const float4*)(row + c); hi = *(const float4*)(row + c + 4); }
    v[0] = lo.x; v[1] = lo.y; v[2] = lo.z; v[3] = lo.w; v[4] = hi.x; v[5] = hi.y; v[6] = hi.z; v[7] = hi.w;
  } else {
#pragma unroll
    for (int k = 0; k < 8; k++) v[k] = c + k < cols ? row[c + k] : 0.f;
  }
}
DEVICE void store8(float* row, const float v[8], u32 c, u32 cols, bool wide) {
  if (wide) {
    if (c < cols) { *(float4*)(row + c) = make_float4(v[0], v[1], v[2], v[3]); *(float4*)(row + c + 4) = make_float4(v[4], v[5], v[6], v[7]); }
  } else {
#pragma unroll
    for (int k = 0; k < 8; k++) if (c + k < cols) row[c + k] = v[k];
  }
}
DEVICE uint4 pack8(const float v[8]) { return make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7])); }
DEVICE void store8(u16* row, const float v[8], u32 c, u32 cols) {
  if ((u64)row % 16 == 0 && cols % 8 == 0) { if (c < cols) *(uint4*)(row + c) = pack8(v); }
  else {
#pragma unroll
    for (int k = 0; k < 8; k++) if (c + k < cols) row[c + k] = f32_to_bf16(v[k]);
  }
}

// A lane's eight of 64 columns as digits (packed.cuh), and what stands behind all of them.
struct Digits8 {
  u32 high[2], low[2];
  float4 about;
  METHOD void store(u8* tile) const {
    u32 q = threadIdx.x % 8, at = 16 * (q % 4) + 8 * (q / 4);
    *(uint2*)(tile + at) = make_uint2(high[0], high[1]);
    *(uint2*)(tile + 64 + at) = make_uint2(low[0], low[1]);
    if (q == 0) *(float4*)(tile + 128) = about;
  }
};
// Eight lanes have 64 columns, eight each. All lanes of the warp take part.
DEVICE Digits8 digits_of(const float v[8]) {
  Digits8 d;
  float largest = 0.f;
#pragma unroll
  for (int k = 0; k < 8; k++) largest = fmaxf(largest, fabsf(v[k]));
#pragma unroll
  for (int s = 1; s < 8; s <<= 1) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, s));
  // Below this 1 / scale would not be a number any more; such columns are zeros.
  bool some = largest > 1e-30f;
  float scale = some ? largest * (1.f / 16256.f) : 0.f, inverse = some ? __fdividef(16256.f, largest) : 0.f;
  // Added to 3 * 2^22 + 64 a number becomes the nearest integer, whose bits are x + 64: the digits are seven and eight of them.
  u32 y[8];
  int sum = 0;
#pragma unroll
  for (int k = 0; k < 8; k++) {
    y[k] = __float_as_uint(__fadd_rn(__fmul_rn(v[k], inverse), 12582976.f));
    sum += (int)y[k];
  }
  sum -= (int)(8u * (0x4b400000u + 64));
#pragma unroll
  for (int k = 0; k < 2; k++) {
    u32 a = __byte_perm(y[4 * k], y[4 * k + 1], 0x5410), b = __byte_perm(y[4 * k + 2], y[4 * k + 3], 0x5410);
    d.high[k] = __byte_perm(a >> 7, b >> 7, 0x6420);
    d.low[k] = __byte_perm((a & 0x007f007fu) + 0x00c000c0u, (b & 0x007f007fu) + 0x00c000c0u, 0x6420);
  }
  sum += __shfl_xor_sync(0xffffffffu, sum, 1);
  sum += __shfl_xor_sync(0xffffffffu, sum, 2);
  int other = __shfl_xor_sync(0xffffffffu, sum, 4);
  d.about = make_float4(scale, scale * (float)sum, scale * (float)other, scale * (float)(sum + other));
  return d;
}
// Writes them at `tile`, unless it is null.
DEVICE void digits8(const float v[8], u8* tile) {
  Digits8 d = digits_of(v);
  if (tile) d.store(tile);
}

// 1 / rms of a row in registers.
DEVICE float inverse_rms(const float v[][8], int steps, u32 cols, float eps, float* scratch) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < steps; i++)
#pragma unroll
    for (int k = 0; k < 8; k++) sum = fmaf(v[i][k], v[i][k], sum);
  return rsqrtf(block_sum(sum, scratch) / (float)cols + eps);
}

// A pair, rotated by the angle with cosine `c` and sine `s`.
// Which product is rounded is said here: where a compiler chooses, two kernels do not round alike.
DEVICE float2 rotated(float x0, float x1, float c, float s) { return make_float2(fmaf(x0, c, -__fmul_rn(x1, s)), fmaf(x1, c, __fmul_rn(x0, s))); }
// Rotates one pair of the head that starts at column `head` of row `t`.
DEVICE void rope_pair(const Mat& x, u32 t, u32 head, const float* table, u32 half, u32 i, bool interleaved) {
  u32 c0 = head + (interleaved ? 2 * i : i), c1 = head + (interleaved ? 2 * i + 1 : i + half);
  const float* row = x.p + (u64)t * x.stride;
  float2 y = rotated(row[c0], row[c1], table[i], table[half + i]);
  store(x, t, c0, y.x);
  store(x, t, c1, y.y);
}

DEVICE void cache_store(void* cache, bool is_bf16, u64 at, float x) {
  if (is_bf16) ((u16*)cache)[at] = f32_to_bf16(x);
  else ((float*)cache)[at] = x;
}

// What stands beside the product of a layer's queries with its heads: the rest of latent attention's input. A slot a row.
struct Latent {
  Mat latent, k_pe, q, table;   // normed in place; rotated in place
  const float* weight;
  const u32* slots;
  void* cache;
  u32 cache_width, cache_bf16;
  u32 num_heads, head_stride, interleaved;
  float eps;
};
// Row `t`, by the blocks of a row of the grid: the first norms, the others rotate queries.
DEVICE void latent_row(const Latent& l, u32 t, float* scratch) {
  const float* table = l.table.p + (u64)t * l.table.stride;
  u32 half = l.table.cols / 2;
  if (blockIdx.x == 0) {
    u32 cols = l.latent.cols, c = row_column(0);
    u64 at = (u64)l.slots[t] * l.cache_width;
    float v[1][8], weight[8];
    const float* row = l.latent.p + (u64)t * l.latent.stride;
    load8(v[0], row, c, cols, is_wide(row, cols));
    load8(weight, l.weight, c, cols, is_wide(l.weight, cols));
    float scale = inverse_rms(v, 1, cols, l.eps, scratch);
#pragma unroll
    for (int k = 0; k < 8; k++) {
      if (c + k >= cols) continue;
      float y = v[0][k] * scale * weight[k];
      store(l.latent, t, c + k, y);
      cache_store(l.cache, l.cache_bf16, at + c + k, y);
    }
    for (u32 i = threadIdx.x; i < half; i += blockDim.x) {
      rope_pair(l.k_pe, t, 0, table, half, i, l.interleaved);
      u32 c0 = l.interleaved ? 2 * i : i, c1 = l.interleaved ? 2 * i + 1 : i + half;
      cache_store(l.cache, l.cache_bf16, at + cols + c0, l.k_pe.p[(u64)t * l.k_pe.stride + c0]);
      cache_store(l.cache, l.cache_bf16, at + cols + c1, l.k_pe.p[(u64)t * l.k_pe.stride + c1]);
    }
    if (gridDim.x > 1) return;
  }
  u32 first = gridDim.x > 1 ? blockIdx.x - 1 : 0, blocks = gridDim.x > 1 ? gridDim.x - 1 : 1;
  for (u32 i = first * blockDim.x + threadIdx.x; i < l.num_heads * half; i += blocks * blockDim.x)
    rope_pair(l.q, t, i / half * l.head_stride, table, half, i % half, l.interleaved);
}
