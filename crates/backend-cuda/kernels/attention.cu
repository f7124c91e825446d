// Attention over paged caches, and the choice of positions of sparse attention.
//
// A block has up to eight heads that read the same keys (a warp each) and up to SPLIT keys, 32 at a time through shared memory; parts
// are joined by `attend_join` in order. Which keys make a part depends on their rank in the row's own list alone.
#include "common.cuh"

#define SPLIT 128
#define TILE 32

struct AttendArgs {
  Mat q, q_rope, out;          // q_rope.p null: no second part
  const void* cache;
  float* partial;              // [tokens][heads][max_splits][2 + value_dim]
  const float* sinks;          // [heads] or null
  const u32* index_ids;        // [tokens, index_stride] or null: every position of the window
  const u32* index_counts;
  Paging paging;
  u32 index_stride, num_heads, heads_per_block, heads_per_key;
  u32 q_dim, q_rope_stride, q_rope_dim;
  u32 cache_width, cache_bf16;
  u32 key_first, key_step;     // column of the key of key head 0, and between two key heads
  u32 value_first, value_step, value_dim;
  u32 values_are_keys;         // values are the first columns of the keys
  u32 window;                  // 0: none
  u32 max_splits;
  float scale;
};

DEVICE void keys_of(const AttendArgs& a, u32 t, u32& first, u32& count) {
  u32 p = a.paging.positions[t];
  if (a.index_ids) { first = 0; count = a.index_counts[t]; return; }
  first = a.window && p + 1 > a.window ? p + 1 - a.window : 0;
  count = p + 1 - first;
}

// DPL: value columns a lane has.
template <int DPL> DEVICE void attend(const AttendArgs& a) {
  extern __shared__ float shared[];
  pdl_launch();
  pdl_wait();
  u32 t = blockIdx.z, split = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  u32 first, count;
  keys_of(a, t, first, count);
  u32 begin = split * SPLIT;
  if (begin >= count) return;
  u32 end = begin + SPLIT < count ? begin + SPLIT : count;
  u32 head = blockIdx.y * a.heads_per_block + warp, key_head = blockIdx.y * a.heads_per_block / a.heads_per_key;
  u32 key_dim = a.q_dim + a.q_rope_dim, stride = (key_dim + 3) / 4 * 4 + 4, value_stride = a.value_dim;
  float* q = shared;                                          // [heads_per_block][stride]
  float* keys = q + a.heads_per_block * stride;               // [TILE][stride]
  float* values = a.values_are_keys ? keys : keys + TILE * stride;  // [TILE][value_dim]
  if (a.values_are_keys) value_stride = stride;
  for (u32 i = threadIdx.x; i < a.heads_per_block * stride; i += blockDim.x) {
    u32 h = blockIdx.y * a.heads_per_block + i / stride, c = i % stride;
    float v = 0.f;
    if (c < a.q_dim) v = a.q.p[(u64)t * a.q.stride + h * a.q_dim + c];
    else if (c < key_dim) v = a.q_rope.p[(u64)t * a.q_rope.stride + h * a.q_rope_stride + c - a.q_dim];
    q[i] = v;
  }
  const u32* table = a.paging.block_table + (u64)a.paging.sequences[t] * a.paging.max_blocks;
  float m = -INFINITY, l = 0.f, acc[DPL];
#pragma unroll
  for (int i = 0; i < DPL; i++) acc[i] = 0.f;
  for (u32 base = begin; base < end; base += TILE) {
    __syncthreads();
    // A warp copies whole rows.
    for (u32 k = warp; k < TILE; k += blockDim.x / 32) {
      float* key = keys + k * stride;
      if (base + k < end) {
        u32 p = a.index_ids ? a.index_ids[(u64)t * a.index_stride + base + k] : first + base + k;
        u64 row = ((u64)table[p / a.paging.block_size] * a.paging.block_size + p % a.paging.block_size) * a.cache_width;
        u64 key_row = row + a.key_first + key_head * a.key_step, value_row = row + a.value_first + key_head * a.value_step;
        auto copy = [&](float* to, u64 from, u32 n, u32 padded) {
          if (a.cache_bf16) {
            const u16* p = (const u16*)a.cache + from;
            if (n % 2 == 0 && from % 2 == 0) {
#pragma unroll 9
              for (u32 c = 2 * lane; c < n; c += 64) { u32 v = *(const u32*)(p + c); to[c] = __uint_as_float(v << 16); to[c + 1] = __uint_as_float(v & 0xffff0000u); }
            } else for (u32 c = lane; c < n; c += 32) to[c] = bf16_to_f32(p[c]);
          } else {
            const float* p = (const float*)a.cache + from;
            for (u32 c = lane; c < n; c += 32) to[c] = p[c];
          }
          for (u32 c = n + lane; c < padded; c += 32) to[c] = 0.f;
        };
        copy(key, key_row, key_dim, stride);
        if (!a.values_are_keys) copy(values + k * value_stride, value_row, a.value_dim, a.value_dim);
      } else {
        for (u32 c = lane; c < stride; c += 32) key[c] = 0.f;
        if (!a.values_are_keys) for (u32 c = lane; c < a.value_dim; c += 32) values[k * value_stride + c] = 0.f;
      }
    }
    __syncthreads();
    if (warp < a.heads_per_block) {
      // A key a lane.
      const float4* k4 = (const float4*)(keys + lane * stride);
      const float4* q4 = (const float4*)(q + warp * stride);
      // Four chains, so that one product does not wait for the one before.
      float4 part = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 8
      for (u32 c = 0; c < stride / 4 - 1; c++) {
        float4 x = k4[c], y = q4[c];
        part.x = fmaf(x.x, y.x, part.x); part.y = fmaf(x.y, y.y, part.y); part.z = fmaf(x.z, y.z, part.z); part.w = fmaf(x.w, y.w, part.w);
      }
      float s = (part.x + part.y) + (part.z + part.w);
      s = base + lane < end ? s * a.scale : -INFINITY;
      float m_new = fmaxf(m, warp_max(s)), p = expf(s - m_new), old = expf(m - m_new);
      m = m_new;
      l = l * old + warp_sum(p);
#pragma unroll
      for (int i = 0; i < DPL; i++) acc[i] *= old;
#pragma unroll 4
      for (u32 k = 0; k < TILE; k++) {
        float w = __shfl_sync(0xffffffffu, p, k);
        const float* v = values + k * value_stride + lane;
#pragma unroll
        for (int i = 0; i < DPL; i++) if (lane + 32 * i < a.value_dim) acc[i] = fmaf(w, v[32 * i], acc[i]);
      }
    }
  }
  if (warp < a.heads_per_block) {
    float* out = a.partial + (((u64)t * a.num_heads + head) * a.max_splits + split) * (2 + a.value_dim);
    if (lane == 0) { out[0] = m; out[1] = l; }
#pragma unroll
    for (int i = 0; i < DPL; i++) if (lane + 32 * i < a.value_dim) out[2 + lane + 32 * i] = acc[i];
  }
}
KERNEL __launch_bounds__(256) attend2(const __grid_constant__ AttendArgs a) { attend<2>(a); }
KERNEL __launch_bounds__(256) attend4(const __grid_constant__ AttendArgs a) { attend<4>(a); }
KERNEL __launch_bounds__(256) attend8(const __grid_constant__ AttendArgs a) { attend<8>(a); }
KERNEL __launch_bounds__(256) attend16(const __grid_constant__ AttendArgs a) { attend<16>(a); }

// Joins the parts of a head. Grid (heads, tokens).
KERNEL attend_join(const __grid_constant__ AttendArgs a) {
  pdl_launch();
  pdl_wait();
  u32 t = blockIdx.y, head = blockIdx.x, first, count;
  keys_of(a, t, first, count);
  u32 splits = (count + SPLIT - 1) / SPLIT, width = 2 + a.value_dim;
  const float* part = a.partial + ((u64)t * a.num_heads + head) * a.max_splits * width;
  float m = a.sinks ? a.sinks[head] : -INFINITY;
  for (u32 s = 0; s < splits; s++) m = fmaxf(m, part[s * width]);
  float l = a.sinks ? expf(a.sinks[head] - m) : 0.f;
  for (u32 s = 0; s < splits; s++) l += part[s * width + 1] * expf(part[s * width] - m);
  for (u32 c = threadIdx.x; c < a.value_dim; c += blockDim.x) {
    float x = 0.f;
    for (u32 s = 0; s < splits; s++) x = fmaf(part[s * width + 2 + c], expf(part[s * width] - m), x);
    store(a.out, t, head * a.value_dim + c, x / l);
  }
}

struct IndexScoreArgs {
  Mat q, weights, scores;
  const void* cache;
  Paging paging;
  u32 num_heads, head_dim, cache_bf16, pad;
  float scale;
  u32 pad2;
};
// A warp has a key, a lane a head (and every 32nd after it). Grid (tiles of 64 keys, tokens).
KERNEL __launch_bounds__(256) index_score(const __grid_constant__ IndexScoreArgs a) {
  extern __shared__ float index_shared[];
  pdl_launch();
  pdl_wait();
  u32 t = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  u32 count = a.paging.positions[t] + 1, base = blockIdx.x * 64;
  if (base >= count) return;
  u32 stride = a.head_dim + 1;
  float* q = index_shared;                        // [heads][head_dim + 1]
  float* keys = q + a.num_heads * stride;         // [8][head_dim]
  for (u32 i = threadIdx.x; i < a.num_heads * a.head_dim; i += blockDim.x)
    q[i / a.head_dim * stride + i % a.head_dim] = a.q.p[(u64)t * a.q.stride + i];
  __syncthreads();
  const u32* table = a.paging.block_table + (u64)a.paging.sequences[t] * a.paging.max_blocks;
  float* key = keys + warp * a.head_dim;
  for (u32 j = base + warp; j < base + 64 && j < count; j += 8) {
    u64 row = ((u64)table[j / a.paging.block_size] * a.paging.block_size + j % a.paging.block_size) * a.head_dim;
    __syncwarp();
    for (u32 c = lane; c < a.head_dim; c += 32) key[c] = a.cache_bf16 ? bf16_to_f32(((const u16*)a.cache)[row + c]) : ((const float*)a.cache)[row + c];
    __syncwarp();
    float score = 0.f;
    for (u32 h = lane; h < a.num_heads; h += 32) {
      float s = 0.f;
      const float* qh = q + h * stride;
      for (u32 c = 0; c < a.head_dim; c++) s = fmaf(qh[c], key[c], s);
      score += a.weights.p[(u64)t * a.weights.stride + h] * fmaxf(s * a.scale, 0.f);
    }
    score = warp_sum(score);
    if (lane == 0) a.scores.p[(u64)t * a.scores.stride + j] = score;
  }
}

struct IndexTopkArgs { Mat scores; const u32* positions; u32* ids; u32* counts; u32 ids_stride, k; };
DEVICE u32 ordered_score(float x) { u32 b = __float_as_uint(x == 0.f ? 0.f : x); return b ^ ((b >> 31) ? 0xffffffffu : 0x80000000u); }
// The k largest by radix selection, eight bits at a time, then one ordered pass that collects them. One block of 1024 a row.
KERNEL __launch_bounds__(1024) index_topk(const __grid_constant__ IndexTopkArgs a) {
  __shared__ u32 histogram[256];
  __shared__ u32 warp_counts[2][32];
  __shared__ u32 prefix, remaining, taken, ties;
  pdl_launch();
  pdl_wait();
  u32 t = blockIdx.x, n = a.positions[t] + 1, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const float* scores = a.scores.p + (u64)t * a.scores.stride;
  u32* ids = a.ids + (u64)t * a.ids_stride;
  u32 k = n < a.k ? n : a.k;
  if (threadIdx.x == 0) { a.counts[t] = k; prefix = 0; remaining = k; taken = 0; ties = 0; }
  __syncthreads();
  if (n <= a.k) {
    for (u32 i = threadIdx.x; i < n; i += blockDim.x) ids[i] = i;
    return;
  }
  for (int shift = 24; shift >= 0; shift -= 8) {
    if (threadIdx.x < 256) histogram[threadIdx.x] = 0;
    __syncthreads();
    u32 mask = shift == 24 ? 0 : 0xffffffffu << (shift + 8);
    for (u32 i = threadIdx.x; i < n; i += blockDim.x) {
      u32 key = ordered_score(scores[i]);
      if ((key & mask) == prefix) atomicAdd(&histogram[key >> shift & 255], 1);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      u32 left = remaining, bin = 255;
      while (histogram[bin] < left) left -= histogram[bin--];
      prefix |= bin << shift;
      remaining = left;  // of those equal to the prefix so far
    }
    __syncthreads();
  }
  // `prefix` is the k-th largest key; `remaining` of its equals belong to the set, the earliest.
  u32 threshold = prefix, equals = remaining;
  for (u32 base = 0; base < n; base += blockDim.x) {
    u32 i = base + threadIdx.x, key = i < n ? ordered_score(scores[i]) : 0;
    bool tie = i < n && key == threshold, above = i < n && key > threshold;
    u32 tie_mask = __ballot_sync(0xffffffffu, tie);
    if (lane == 0) warp_counts[0][warp] = __popc(tie_mask);
    __syncthreads();
    u32 before = ties;
    for (u32 w = 0; w < warp; w++) before += warp_counts[0][w];
    before += __popc(tie_mask & ((1u << lane) - 1));
    bool take = above || (tie && before < equals);
    u32 take_mask = __ballot_sync(0xffffffffu, take);
    if (lane == 0) warp_counts[1][warp] = __popc(take_mask);
    __syncthreads();
    u32 at = taken;
    for (u32 w = 0; w < warp; w++) at += warp_counts[1][w];
    at += __popc(take_mask & ((1u << lane) - 1));
    if (take) ids[at] = i;
    __syncthreads();
    if (threadIdx.x == 0)
      for (u32 w = 0; w < blockDim.x / 32; w++) { ties += warp_counts[0][w]; taken += warp_counts[1][w]; }
    __syncthreads();
  }
}
