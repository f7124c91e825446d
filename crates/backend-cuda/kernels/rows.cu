// Operations on rows of activations: norms, rotations, copies, cache stores, choices. None reads more than a few
// kilobytes a row; what counts is that they start and end quickly.
#include "common.cuh"

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

struct RmsNormArgs { Mat x, delta, out; const float* weight; float eps; u32 pad; };
// One block a row. The row stays in registers: up to 32 values a thread.
KERNEL rms_norm(const __grid_constant__ RmsNormArgs a) {
  __shared__ float scratch[32];
  pdl_launch();
  u32 row = blockIdx.x, cols = a.x.cols;
  float* x = a.x.p + (u64)row * a.x.stride;
  const float* delta = a.delta.p ? a.delta.p + (u64)row * a.delta.stride : nullptr;
  float sum = 0.f;
  if (cols <= blockDim.x * 8) {
    float v[8], weight[8];
    // Weights do not wait for the operation before.
#pragma unroll
    for (int i = 0; i < 8; i++) { u32 c = threadIdx.x + i * blockDim.x; weight[i] = c < cols ? a.weight[c] : 0.f; }
    pdl_wait();
#pragma unroll
    for (int i = 0; i < 8; i++) {
      u32 c = threadIdx.x + i * blockDim.x;
      v[i] = 0.f;
      if (c < cols) {
        v[i] = x[c];
        if (delta) { v[i] += delta[c]; }
      }
    }
#pragma unroll
    for (int i = 0; i < 8; i++) sum += v[i] * v[i];
    float scale = rsqrtf(block_sum(sum, scratch) / (float)cols + a.eps);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      u32 c = threadIdx.x + i * blockDim.x;
      if (c < cols) {
        if (delta) x[c] = v[i];
        store(a.out, row, c, v[i] * scale * weight[i]);
      }
    }
    return;
  }
  pdl_wait();
  for (u32 c = threadIdx.x; c < cols; c += blockDim.x) {
    float v = x[c];
    if (delta) { v += delta[c]; x[c] = v; }
    sum += v * v;
  }
  float scale = rsqrtf(block_sum(sum, scratch) / (float)cols + a.eps);
  for (u32 c = threadIdx.x; c < cols; c += blockDim.x) store(a.out, row, c, x[c] * scale * a.weight[c]);
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
  u32 head = at / half, i = at % half;
  const float* table = a.table.p + (u64)t * a.table.stride;
  u32 first = a.interleaved ? 2 * i : i, second = a.interleaved ? 2 * i + 1 : i + half;
  u32 c0 = head * a.head_stride + first, c1 = head * a.head_stride + second;
  float* x = a.x.p + (u64)t * a.x.stride;
  float x0 = x[c0], x1 = x[c1], c = table[i], s = table[half + i];
  store(a.x, t, c0, x0 * c - x1 * s);
  store(a.x, t, c1, x1 * c + x0 * s);
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
      if (a.is_bf16) ((u16*)a.cache)[row + first + c] = f32_to_bf16(x[c]);
      else ((float*)a.cache)[row + first + c] = x[c];
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

struct ArgmaxArgs { Mat logits; u32* out; u32 out_stride, pad; };
// Larger keys are better: NaN above everything, both zeros equal; 0 is below every number.
DEVICE u32 argmax_key(float x) {
  if (x != x) return 0xffffffffu;
  u32 b = __float_as_uint(x == 0.f ? 0.f : x);
  return b ^ ((b >> 31) ? 0xffffffffu : 0x80000000u);
}
KERNEL argmax(const __grid_constant__ ArgmaxArgs a) {
  __shared__ u32 best[32], where[32];
  pdl_launch();
  pdl_wait();
  const float* x = a.logits.p + (u64)blockIdx.x * a.logits.stride;
  u32 key = 0, at = 0xffffffffu;
  auto take = [&](u32 other, u32 column) {
    if (other > key || (other == key && column < at)) { key = other; at = column; }
  };
  for (u32 c = threadIdx.x; c < a.logits.cols; c += blockDim.x) take(argmax_key(x[c]), c);
  for (int d = 16; d > 0; d >>= 1) {
    u32 other = __shfl_xor_sync(0xffffffffu, key, d), column = __shfl_xor_sync(0xffffffffu, at, d);
    take(other, column);
  }
  if ((threadIdx.x & 31) == 0) { best[threadIdx.x >> 5] = key; where[threadIdx.x >> 5] = at; }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (u32 i = 1; i < blockDim.x / 32; i++) take(best[i], where[i]);
    a.out[(u64)blockIdx.x * a.out_stride] = at;
  }
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
struct RouteArgs {
  Mat logits, weights;
  const float* correction_bias;
  u32* ids;
  u32 ids_stride, scoring, n_group, topk_group, norm_topk_prob, top_k;
  float factor;
  u32 pad;
};
// Order of f32::total_cmp for numbers without NaN: -0 before +0.
DEVICE u32 ordered(float x) { u32 b = __float_as_uint(x); return b ^ ((b >> 31) ? 0xffffffffu : 0x80000000u); }
DEVICE u32 best_of(const float* values, u32 n, u32 lane) {
  u32 key = 0, at = 0xffffffffu;
  for (u32 e = lane; e < n; e += 32) {
    u32 k = ordered(values[e]);
    if (at == 0xffffffffu || k > key) { key = k; at = e; }
  }
  for (int d = 16; d > 0; d >>= 1) {
    u32 ok = __shfl_xor_sync(0xffffffffu, key, d), oa = __shfl_xor_sync(0xffffffffu, at, d);
    if (oa != 0xffffffffu && (at == 0xffffffffu || ok > key || (ok == key && oa < at))) { key = ok; at = oa; }
  }
  return at;
}
KERNEL route(const __grid_constant__ RouteArgs a) {
  extern __shared__ float shared[];
  pdl_launch();
  u32 n = a.logits.cols, lane = threadIdx.x, t = blockIdx.x;
  float *scores = shared, *choice = shared + n, *groups = shared + 2 * n;
  pdl_wait();
  const float* logits = a.logits.p + (u64)t * a.logits.stride;
  if (a.scoring == 0) {
    for (u32 e = lane; e < n; e += 32) scores[e] = sigmoid(logits[e]);
  } else if (a.scoring == 1) {
    float max = -INFINITY, sum = 0.f;
    for (u32 e = lane; e < n; e += 32) max = fmaxf(max, logits[e]);
    max = warp_max(max);
    for (u32 e = lane; e < n; e += 32) { float x = expf(logits[e] - max); scores[e] = x; sum += x; }
    sum = warp_sum(sum);
    for (u32 e = lane; e < n; e += 32) scores[e] /= sum;
  } else {
    for (u32 e = lane; e < n; e += 32) scores[e] = logits[e];
  }
  for (u32 e = lane; e < n; e += 32) choice[e] = scores[e] + (a.correction_bias ? a.correction_bias[e] : 0.f);
  __syncwarp();
  if (a.n_group > 1) {
    u32 size = n / a.n_group;
    for (u32 g = lane; g < a.n_group; g += 32) {
      groups[a.n_group + g] = 0.f;  // becomes 1 where the group is kept
      float first = -INFINITY, second = -INFINITY;
      for (u32 e = 0; e < size; e++) {
        float x = choice[g * size + e];
        if (x > first) { second = first; first = x; } else if (x > second) second = x;
      }
      groups[g] = size > 1 ? first + second : first;
    }
    __syncwarp();
    for (u32 k = 0; k < a.topk_group; k++) {
      u32 g = best_of(groups, a.n_group, lane);
      __syncwarp();
      if (lane == 0) { groups[g] = -INFINITY; groups[a.n_group + g] = 1.f; }
      __syncwarp();
    }
    for (u32 e = lane; e < n; e += 32) if (groups[a.n_group + e / size] != 1.f) choice[e] = -INFINITY;
    __syncwarp();
  }
  float mine = 0.f;
  u32 my_id = 0;
  for (u32 k = 0; k < a.top_k; k++) {
    u32 e = best_of(choice, n, lane);
    float w = scores[e];
    __syncwarp();
    if (lane == 0) choice[e] = __uint_as_float(0xffffffffu);  // below everything in `ordered`
    __syncwarp();
    if (k < 32) { if (lane == k) { mine = w; my_id = e; } }
  }
  // Weights of the chosen, at most 32 of them, one a lane; sums in the order of choice.
  bool active = lane < a.top_k;
  if (a.scoring == 2) {
    float max = warp_max(active ? mine : -INFINITY);
    mine = active ? expf(mine - max) : 0.f;
    float sum = 0.f;
    for (u32 k = 0; k < a.top_k; k++) sum += __shfl_sync(0xffffffffu, mine, k);
    mine /= sum;
  }
  if (a.norm_topk_prob) {
    float sum = 0.f;
    for (u32 k = 0; k < a.top_k; k++) sum += __shfl_sync(0xffffffffu, active ? mine : 0.f, k);
    mine /= sum + 1e-20f;
  }
  if (active) {
    a.ids[(u64)t * a.ids_stride + lane] = my_id;
    a.weights.p[(u64)t * a.weights.stride + lane] = mine * a.factor;
  }
}
