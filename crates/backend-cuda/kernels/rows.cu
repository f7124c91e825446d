// Operations on rows of activations: norms, rotations, copies, cache stores, choices. None reads more than a few
// kilobytes a row; what counts is that they start and end quickly.
#include "product.cuh"
#include "route.cuh"
#include "row.cuh"

// Reads memory and does nothing with it: what the device can do at best. Eight loads of 16 bytes in flight a thread.
struct ReadArgs { const uint4* p; u64 len; u32* out; };
KERNEL __launch_bounds__(512) read_all(const __grid_constant__ ReadArgs a) {
  u64 step = (u64)gridDim.x * blockDim.x, at = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  u32 x = 0;
  for (; at + 7 * step < a.len; at += 8 * step) {
    uint4 v[8];
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = load_stream(a.p + at + i * step);
#pragma unroll
    for (int i = 0; i < 8; i++) x ^= v[i].x ^ v[i].y ^ v[i].z ^ v[i].w;
  }
  if (x == 0x9e3779b9u) *a.out = x;  // practically never, but the compiler cannot know
}

// The bfloat16 twin of x, for inputs whose producer did not write one. One block a row.
struct TwinArgs { Mat x; };
KERNEL write_twin(const __grid_constant__ TwinArgs a) {
  pdl_launch();
  pdl_wait();
  u64 row = (u64)blockIdx.x * a.x.stride;
  for (u32 c = blockIdx.y * blockDim.x + threadIdx.x; c < a.x.cols; c += blockDim.x * gridDim.y)
    a.x.twin[row + c] = f32_to_bf16(a.x.p[row + c]);
}

struct RmsNormArgs { Mat x, delta, out; const float* weight; u8* digits; float eps; u32 pad; };
// One block a row, of a thread for eight columns and at most 256. `digits`: the result once more in that form, or null.
KERNEL __launch_bounds__(256) rms_norm(const __grid_constant__ RmsNormArgs a) {
  __shared__ float scratch[32];
  pdl_launch();
  u32 row = blockIdx.x, cols = a.x.cols;
  float* x = a.x.p + (u64)row * a.x.stride;
  const float* delta = a.delta.p ? a.delta.p + (u64)row * a.delta.stride : nullptr;
  float* out = a.out.p + (u64)row * a.out.stride;
  u16* twin = a.out.twin ? a.out.twin + (u64)row * a.out.stride : nullptr;
  u8* digits = a.digits ? a.digits + (u64)row * ((cols + 63) / 64) * DIGITS_BYTES : nullptr;
  bool wide = is_wide(x, cols) && is_wide(out, cols) && (!delta || is_wide(delta, cols)) && is_wide(a.weight, cols);
  auto finish = [&](float v[8], float scale, u32 c) {
    float weight[8];
    load8(weight, a.weight, c, cols, wide);
#pragma unroll
    for (int k = 0; k < 8; k++) v[k] = v[k] * scale * weight[k];
    store8(out, v, c, cols, wide);
    if (twin) store8(twin, v, c, cols);
    if (digits) digits8(v, c < cols ? digits + c / 64 * DIGITS_BYTES : nullptr);
  };
  pdl_wait();
  if (cols <= ROW_STEPS * ROW_COLUMNS) {
    float v[ROW_STEPS][8];
#pragma unroll
    for (int i = 0; i < ROW_STEPS; i++) {
      u32 c = row_column(i);
      load8(v[i], x, c, cols, wide);
      if (delta && i * ROW_COLUMNS < cols) {
        float d[8];
        load8(d, delta, c, cols, wide);
#pragma unroll
        for (int k = 0; k < 8; k++) v[i][k] += d[k];
        store8(x, v[i], c, cols, wide);
      }
    }
    float scale = inverse_rms(v, ROW_STEPS, cols, a.eps, scratch);
#pragma unroll
    for (int i = 0; i < ROW_STEPS; i++) if (i * ROW_COLUMNS < cols) finish(v[i], scale, row_column(i));
    return;
  }
  float sum = 0.f;
  for (u32 i = 0; i * ROW_COLUMNS < cols; i++) {
    u32 c = row_column(i);
    float v[8], d[8];
    load8(v, x, c, cols, wide);
    if (delta) {
      load8(d, delta, c, cols, wide);
#pragma unroll
      for (int k = 0; k < 8; k++) v[k] += d[k];
      store8(x, v, c, cols, wide);
    }
#pragma unroll
    for (int k = 0; k < 8; k++) sum = fmaf(v[k], v[k], sum);
  }
  float scale = rsqrtf(block_sum(sum, scratch) / (float)cols + a.eps);
  for (u32 i = 0; i * ROW_COLUMNS < cols; i++) {
    float v[8];
    load8(v, x, row_column(i), cols, wide);
    finish(v, scale, row_column(i));
  }
}

struct LayerNormArgs { Mat x, out; const float* weight; const float* bias; float eps; u32 pad; };
KERNEL layer_norm(const __grid_constant__ LayerNormArgs a) {
  __shared__ float scratch[32];
  pdl_launch();
  pdl_wait();
  u32 row = blockIdx.x, cols = a.x.cols;
  const float* x = a.x.p + (u64)row * a.x.stride;
  float sum = 0.f;
  for (u32 c = threadIdx.x; c < cols; c += blockDim.x) sum += x[c];
  float mean = block_sum(sum, scratch) / (float)cols;
  float squares = 0.f;
  for (u32 c = threadIdx.x; c < cols; c += blockDim.x) { float d = x[c] - mean; squares += d * d; }
  float scale = 1.f / sqrtf(block_sum(squares, scratch) / (float)cols + a.eps);
  for (u32 c = threadIdx.x; c < cols; c += blockDim.x)
    store(a.out, row, c, (x[c] - mean) * scale * a.weight[c] + a.bias[c]);
}

struct AddArgs { Mat x, y; };
KERNEL add(const __grid_constant__ AddArgs a) {
  pdl_launch();
  pdl_wait();
  u32 row = blockIdx.y, c = blockIdx.x * blockDim.x + threadIdx.x;
  if (c < a.x.cols) {
    u64 at = (u64)row * a.x.stride + c;
    store(a.x, row, c, a.x.p[at] + a.y.p[(u64)row * a.y.stride + c]);
  }
}

struct RopeTableArgs { const u32* positions; const float* inverse_frequencies; Mat table; float scale; u32 pad; };
KERNEL rope_table(const __grid_constant__ RopeTableArgs a) {
  pdl_launch();
  pdl_wait();
  u32 half = a.table.cols / 2, t = blockIdx.x;
  float p = (float)a.positions[t];
  for (u32 i = threadIdx.x; i < half; i += blockDim.x) {
    // The angle is rounded to f32 (part of the model); its sine is not: angles reach a million radians.
    double s, c;
    sincos((double)__fmul_rn(p, a.inverse_frequencies[i]), &s, &c);
    float* row = a.table.p + (u64)t * a.table.stride;
    row[i] = (float)c * a.scale;
    row[half + i] = (float)s * a.scale;
  }
}

struct RopeArgs { Mat x, table; u32 num_heads, head_stride, interleaved, pad; };
KERNEL rope(const __grid_constant__ RopeArgs a) {
  pdl_launch();
  pdl_wait();
  u32 t = blockIdx.y, half = a.table.cols / 2;
  u32 at = blockIdx.x * blockDim.x + threadIdx.x;
  if (at >= a.num_heads * half) return;
  u32 head = at / half;
  rope_pair(a.x, t, head * a.head_stride, a.table.p + (u64)t * a.table.stride, half, at % half, a.interleaved);
}

struct KvStoreArgs { Mat parts[4]; const u32* slots; void* cache; u32 num_parts, width, is_bf16, pad; };
KERNEL kv_store(const __grid_constant__ KvStoreArgs a) {
  pdl_launch();
  pdl_wait();
  u32 t = blockIdx.x;
  u64 row = (u64)a.slots[t] * a.width;
  u32 first = 0;
  for (u32 k = 0; k < a.num_parts; k++) {
    const float* x = a.parts[k].p + (u64)t * a.parts[k].stride;
    for (u32 c = threadIdx.x; c < a.parts[k].cols; c += blockDim.x) {
      cache_store(a.cache, a.is_bf16, row + first + c, x[c]);
    }
    first += a.parts[k].cols;
  }
}

struct GatherArgs { Mat x, out; const u32* rows; };
KERNEL gather_rows(const __grid_constant__ GatherArgs a) {
  pdl_launch();
  pdl_wait();
  const float* x = a.x.p + (u64)a.rows[blockIdx.x] * a.x.stride;
  for (u32 c = threadIdx.x; c < a.x.cols; c += blockDim.x) store(a.out, blockIdx.x, c, x[c]);
}

struct ArgmaxArgs {
  Mat logits;
  u32* out;
  u64* best;       // [rows][gridDim.y]
  u32* arrived;    // a counter a row, zero between two calls
  u32 out_stride, pad;
};
// Larger keys are better: NaN above everything, both zeros equal; 0 is below every number. The first of equals.
DEVICE u64 argmax_key(float x, u32 column) {
  u32 b = __float_as_uint(x == 0.f ? 0.f : x), key = x != x ? 0xffffffffu : b ^ ((b >> 31) ? 0xffffffffu : 0x80000000u);
  return (u64)key << 32 | (0xffffffffu - column);
}
DEVICE u64 block_max(u64 x, u64* scratch) {
  auto warp = [](u64 x) {
    for (int d = 16; d > 0; d >>= 1) { u64 y = __shfl_xor_sync(0xffffffffu, x, d); x = y > x ? y : x; }
    return x;
  };
  x = warp(x);
  if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = x;
  __syncthreads();
  return warp(threadIdx.x % 32 < blockDim.x / 32 ? scratch[threadIdx.x % 32] : 0);
}
// Grid (rows, blocks of a row): the last block of a row has the last word.
KERNEL __launch_bounds__(1024) argmax(const __grid_constant__ ArgmaxArgs a) {
  __shared__ u64 scratch[2][32];
  __shared__ u32 last;
  pdl_launch();
  pdl_wait();
  const float* x = a.logits.p + (u64)blockIdx.x * a.logits.stride;
  u64 best = 0;
  for (u32 c = blockIdx.y * blockDim.x + threadIdx.x; c < a.logits.cols; c += gridDim.y * blockDim.x) {
    u64 key = argmax_key(x[c], c);
    best = key > best ? key : best;
  }
  best = block_max(best, scratch[0]);
  u64* row = a.best + (u64)blockIdx.x * gridDim.y;
  if (threadIdx.x == 0) {
    row[blockIdx.y] = best;
    __threadfence();
    last = atomicInc(a.arrived + blockIdx.x, gridDim.y - 1) == gridDim.y - 1;
    __threadfence();
  }
  __syncthreads();
  if (!last) return;
  best = block_max(threadIdx.x < gridDim.y ? *(volatile u64*)(row + threadIdx.x) : 0, scratch[1]);
  if (threadIdx.x == 0) a.out[(u64)blockIdx.x * a.out_stride] = 0xffffffffu - (u32)best;
}

// h = f(gate, up) where both products went through memory.
struct ActivateArgs { Mat gate, up, out; Activation activation; };
KERNEL activate_rows(const __grid_constant__ ActivateArgs a) {
  pdl_launch();
  pdl_wait();
  u32 row = blockIdx.y, c = blockIdx.x * blockDim.x + threadIdx.x;
  if (c < a.out.cols)
    store(a.out, row, c, activate(a.activation, a.gate.p[(u64)row * a.gate.stride + c], a.up.p[(u64)row * a.up.stride + c]));
}

// out[t] = plus[t] + sum_i weights[t, i] y[t * top_k + i], in the order of i.
struct CombineArgs { Mat y, weights, plus, out; u32 top_k, pad; };
KERNEL moe_combine(const __grid_constant__ CombineArgs a) {
  pdl_launch();
  pdl_wait();
  u32 t = blockIdx.y, c = blockIdx.x * blockDim.x + threadIdx.x;
  if (c >= a.out.cols) return;
  float sum = a.plus.p ? a.plus.p[(u64)t * a.plus.stride + c] : 0.f;
  for (u32 i = 0; i < a.top_k; i++)
    sum = fmaf(a.weights.p[(u64)t * a.weights.stride + i], a.y.p[(u64)(t * a.top_k + i) * a.y.stride + c], sum);
  store(a.out, t, c, sum);
}

// The router. One warp a token; scores live in shared memory.
KERNEL route(const __grid_constant__ RouteArgs a) {
  extern __shared__ float shared[];
  pdl_launch();
  pdl_wait();
  u32 id;
  float weight;
  route_row(a, blockIdx.x, shared, id, weight);
  if (threadIdx.x < a.top_k) {
    a.ids[(u64)blockIdx.x * a.ids_stride + threadIdx.x] = id;
    a.weights.p[(u64)blockIdx.x * a.weights.stride + threadIdx.x] = weight;
  }
}

// ---- plain weights: f32, f16 and bf16, with activations in f32 ----

struct PlainArgs {
  const u8* weights;
  const float* bias;
  Mat x, out;
  Routing routing;         // offsets and sorted where ids is not null
  u64 matrix_elements;
  u32 rows, cols, x_head_stride, warps;
  u32 chunk, pad;          // rows of x that a block has at a time, at most 8
};
// KIND 0 f32, 1 f16, 2 bf16. `warps` warps (a power of two that depends on the columns alone) have one row of weights, eight rows of x at a time;
// their parts are added in order. Grid: (rows / (8 / warps), experts or heads, blocks that share the rows of x).
template <int KIND> DEVICE void plain(const PlainArgs& a) {
  __shared__ float parts[8][8];
  pdl_launch();
  pdl_wait();
  u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, matrix = blockIdx.y;
  u32 row = blockIdx.x * (8 / a.warps) + warp / a.warps, share = warp % a.warps;
  bool active = row < a.rows;
  if (!active) row = 0;
  u32 begin = 0, count = a.x.rows;
  if (a.routing.ids) { begin = a.routing.offsets[matrix]; count = a.routing.offsets[matrix + 1] - begin; }
  u64 first = matrix * a.matrix_elements + (u64)row * a.cols;
  bool aligned = a.cols % 8 == 0;
  bool wide = aligned && a.x.stride % 4 == 0 && (u64)a.x.p % 16 == 0 && a.x_head_stride % 4 == 0;
  for (u32 n0 = blockIdx.z * a.chunk; n0 < count; n0 += gridDim.z * a.chunk) {
    const float* x[8];
    u32 flat[8];
#pragma unroll
    for (int n = 0; n < 8; n++) {
      u32 m = n0 + n < count ? n0 + n : n0;
      flat[n] = a.routing.ids ? a.routing.sorted[begin + m] : m;
      if (a.routing.ids) {
        u32 token = flat[n] / a.routing.top_k;
        x[n] = a.x.p + (u64)token * a.x.stride + (a.routing.slots_in_x ? flat[n] % a.routing.top_k * a.cols : 0);
      } else x[n] = a.x.p + (u64)m * a.x.stride + matrix * a.x_head_stride;
    }
    u32 here = count - n0 < a.chunk ? count - n0 : a.chunk;
    float acc[8] = {};
    auto element = [&](u32 c) {
      return KIND == 0 ? ((const float*)a.weights)[first + c] : KIND == 1 ? f16_to_f32(((const u16*)a.weights)[first + c]) : bf16_to_f32(((const u16*)a.weights)[first + c]);
    };
#pragma unroll 2
    for (u32 c0 = (share * 32 + lane) * 8; c0 < a.cols; c0 += a.warps * 256) {
      float v[8];
      if (aligned && KIND != 0) {
        uint4 q = *(const uint4*)((const u16*)a.weights + first + c0);
        u32 words[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
          if (KIND == 2) { v[2 * i] = __uint_as_float(words[i] << 16); v[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u); }
          else { v[2 * i] = f16_to_f32(words[i] & 0xffff); v[2 * i + 1] = f16_to_f32(words[i] >> 16); }
        }
      } else {
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = c0 + i < a.cols ? element(c0 + i) : 0.f;
      }
#pragma unroll
      for (int n = 0; n < 8; n++) {
        if (n < here) {
          if (wide) {
            float4 lo = *(const float4*)(x[n] + c0), hi = *(const float4*)(x[n] + c0 + 4);
            acc[n] = fmaf(v[0], lo.x, acc[n]); acc[n] = fmaf(v[1], lo.y, acc[n]); acc[n] = fmaf(v[2], lo.z, acc[n]); acc[n] = fmaf(v[3], lo.w, acc[n]);
            acc[n] = fmaf(v[4], hi.x, acc[n]); acc[n] = fmaf(v[5], hi.y, acc[n]); acc[n] = fmaf(v[6], hi.z, acc[n]); acc[n] = fmaf(v[7], hi.w, acc[n]);
          } else {
#pragma unroll
            for (int i = 0; i < 8; i++) if (c0 + i < a.cols) acc[n] = fmaf(v[i], x[n][c0 + i], acc[n]);
          }
        }
      }
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < 8; n++) {
      if (n < here) {
        float y = warp_sum(acc[n]);
        if (lane == 0) parts[warp][n] = y;
      }
    }
    __syncthreads();
    if (active && share == 0 && lane < here) {
      float y = 0.f;
      for (u32 k = 0; k < a.warps; k++) y += parts[warp + k][lane];
      if (a.bias) y += a.bias[(u64)matrix * a.rows + row];
      u32 mine = a.routing.ids ? a.routing.sorted[begin + n0 + lane] : n0 + lane;
      store(a.out, mine, a.routing.ids ? row : matrix * a.rows + row, y);
    }
  }
}
// The same for a router and a few rows of x, a multiple of eight columns and 2048 of them at a time: a block has four rows of weights and four of x, so
// that each is read for four products. Grid: (rows / 4, rows of x / 4).
#define PLAIN_TALL 4
#define PLAIN_WIDE 4
template <int KIND> DEVICE void plain_few(const PlainArgs& a) {
  __shared__ float parts[8][PLAIN_TALL * PLAIN_WIDE];
  pdl_launch();
  pdl_wait();
  u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, first_row = blockIdx.x * PLAIN_TALL, first_x = blockIdx.y * PLAIN_WIDE;
  float acc[PLAIN_TALL][PLAIN_WIDE] = {};
  for (u32 c = threadIdx.x * 8; c < a.cols; c += 2048) {
    float v[PLAIN_TALL][8], x[PLAIN_WIDE][8];
#pragma unroll
    for (int r = 0; r < PLAIN_TALL; r++) {
      u64 at = (u64)(first_row + r < a.rows ? first_row + r : first_row) * a.cols + c;
      if constexpr (KIND == 0) load8(v[r], (const float*)a.weights + at, 0, 8, true);
      else {
        uint4 q = *(const uint4*)((const u16*)a.weights + at);
        const u32 words[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
        for (int i = 0; i < 8; i++) {
          u16 bits = (u16)(words[i / 2] >> (16 * (i % 2)));
          v[r][i] = KIND == 2 ? bf16_to_f32(bits) : f16_to_f32(bits);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < PLAIN_WIDE; n++)
      load8(x[n], a.x.p + (u64)(first_x + n < a.x.rows ? first_x + n : first_x) * a.x.stride + c, 0, 8, true);
#pragma unroll
    for (int i = 0; i < 8; i++)
#pragma unroll
      for (int r = 0; r < PLAIN_TALL; r++)
#pragma unroll
        for (int n = 0; n < PLAIN_WIDE; n++) acc[r][n] = fmaf(v[r][i], x[n][i], acc[r][n]);
  }
#pragma unroll
  for (int r = 0; r < PLAIN_TALL; r++)
#pragma unroll
    for (int n = 0; n < PLAIN_WIDE; n++) {
      float y = warp_sum(acc[r][n]);
      if (lane == 0) parts[warp][r * PLAIN_WIDE + n] = y;
    }
  __syncthreads();
  u32 row = first_row + threadIdx.x / PLAIN_WIDE, mine = first_x + threadIdx.x % PLAIN_WIDE;
  if (threadIdx.x >= PLAIN_TALL * PLAIN_WIDE || row >= a.rows || mine >= a.x.rows) return;
  float y = 0.f;
  for (u32 k = 0; k < 8; k++) y += parts[k][threadIdx.x];
  if (a.bias) y += a.bias[row];
  store(a.out, mine, row, y);
}
KERNEL __launch_bounds__(256) plain_few_f32(const __grid_constant__ PlainArgs a) { plain_few<0>(a); }
KERNEL __launch_bounds__(256) plain_few_f16(const __grid_constant__ PlainArgs a) { plain_few<1>(a); }
KERNEL __launch_bounds__(256) plain_few_bf16(const __grid_constant__ PlainArgs a) { plain_few<2>(a); }
KERNEL __launch_bounds__(256) plain_f32(const __grid_constant__ PlainArgs a) { plain<0>(a); }
KERNEL __launch_bounds__(256) plain_f16(const __grid_constant__ PlainArgs a) { plain<1>(a); }
KERNEL __launch_bounds__(256) plain_bf16(const __grid_constant__ PlainArgs a) { plain<2>(a); }
