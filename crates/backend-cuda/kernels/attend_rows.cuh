// A row of attention over paged caches, in parts: by a step's rows whose keys are in the cache (attention.cu), or that make them (gqa.cu).
//
// A block has up to eight heads that read the same keys (a warp each) and one part of the keys, 32 at a time through shared memory; parts
// are joined in order. Which keys make a part depends on their rank in the row's own list alone.
#pragma once
#include "attend.cuh"

#define TILE 32

// 16 bytes to shared memory.
DEVICE void copy_async(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from));
}

// Heads of the rows of a step as their products gave them: what becomes of them on the way into attention, and behind it.
struct StepHeads {
  Mat k, v, table;                // a row each; table: of rotations
  const float *q_norm, *k_norm;   // weights of the heads' norms, or null
  const u32* slots;               // where the rows' keys and values go
  void* cache;
  u8* digits;                     // attention's result once more as digits, or null; heads then have whole 64 columns
  u32* arrived;                   // a counter a row and block of heads
  u32 rows, interleaved;
  float eps;
  u32 early;                      // no kernel of this step before this one writes to the cache: it is read while they work
};
// A head of up to 256 columns, by a warp: normed by `weight` (its columns of this lane) unless `weights` is null, then rotated, in shared memory.
DEVICE void step_head(float* to, const float* x, u32 dim, const float* weights, const float weight[8], const StepHeads& h, u32 row) {
  u32 lane = threadIdx.x % 32, c = lane * 8, half = h.table.cols / 2;
  const float* table = h.table.p + (u64)row * h.table.stride;
  float v[8], cosine[4], sine[4];
  load8(v, x, c, dim, is_wide(x, dim));
  // Asked for with the head: of up to 128 pairs.
#pragma unroll
  for (int k = 0; k < 4; k++) {
    u32 i = lane + 32 * k;
    cosine[k] = i < half ? table[i] : 0.f;
    sine[k] = i < half ? table[half + i] : 0.f;
  }
  if (weights) {
    float sum = 0.f;
#pragma unroll
    for (int k = 0; k < 8; k++) sum = fmaf(v[k], v[k], sum);
    float scale = rsqrtf(warp_sum(sum) / (float)dim + h.eps);
#pragma unroll
    for (int k = 0; k < 8; k++) v[k] = v[k] * scale * weight[k];
  }
  store8(to, v, c, dim, true);
  __syncwarp();
#pragma unroll
  for (int k = 0; k < 4; k++) {
    u32 i = lane + 32 * k;
    if (i >= half) break;
    u32 c0 = h.interleaved ? 2 * i : i, c1 = h.interleaved ? 2 * i + 1 : i + half;
    float2 y = rotated(to[c0], to[c1], cosine[k], sine[k]);
    to[c0] = y.x;
    to[c1] = y.y;
  }
  __syncwarp();
}
template <typename T> DEVICE T as_cached(float x) {
  if constexpr (sizeof(T) == 2) return f32_to_bf16(x);
  else return x;
}

// Joins the parts of a row's heads, by the block that is the last of `parts` to come here.
DEVICE void join_by_last(const AttendArgs& a, const StepHeads& h, u32 t, u32 count, u32 parts) {
  __shared__ u32 last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicInc(h.arrived + t * gridDim.y + blockIdx.y, parts - 1) == parts - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  u32 lane = threadIdx.x % 32, eights = a.value_dim / 8, all = a.heads_per_block * eights;
  for (u32 i = threadIdx.x - lane; i < all; i += blockDim.x) {
    bool mine = i + lane < all;
    u32 head = blockIdx.y * a.heads_per_block + (mine ? (i + lane) / eights : 0), c = (i + lane) % eights * 8;
    float v[8] = {};
    if (mine) {
      join8<8>(a, t, head, c, count, v);
      u64 at = (u64)t * a.out.stride + head * a.value_dim;
      store8(a.out.p + at, v, c, a.value_dim, is_wide(a.out.p + at, a.value_dim));
      if (a.out.twin) store8(a.out.twin + at, v, c, a.value_dim);
    }
    if (h.digits) digits8(v, mine ? h.digits + (((u64)t * a.num_heads + head) * (a.value_dim / 64) + c / 64) * DIGITS_BYTES : nullptr);
  }
}

// T: type of the cached rows, kept in shared memory as they are. DPL: pairs of value columns a lane has. STEP: the rows of the step make their queries,
// keys and values themselves; heads have at most 256 columns and whole vectors of the cache, which holds keys and values, without an index set.
template <typename T, int DPL, bool STEP> DEVICE void attend(const AttendArgs& a, const StepHeads* step) {
  extern __shared__ __align__(16) u8 shared[];
  constexpr bool BF16 = sizeof(T) == 2;
  constexpr u32 PER = 16 / sizeof(T);                         // elements of 16 bytes
  pdl_launch();
  if constexpr (!STEP) pdl_wait();
  u32 t = blockIdx.z, split = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  u32 first, count;
  keys_of(a, t, first, count);
  u32 keys_of_part = split_of(count), begin = split * keys_of_part;
  if (begin >= count) return;
  u32 end = begin + keys_of_part < count ? begin + keys_of_part : count;
  u32 head = blockIdx.y * a.heads_per_block + warp, key_head = blockIdx.y * a.heads_per_block / a.heads_per_key;
  // Rows are padded to whole 16 bytes and then by 16 more, so that the keys of eight lanes lie in different banks.
  u32 key_dim = a.q_dim + a.q_rope_dim, padded = (key_dim + PER - 1) / PER * PER, stride = padded + PER;
  u32 value_stride = a.values_are_keys ? stride : (a.value_dim + PER - 1) / PER * PER;
  float* q = (float*)shared;                                  // [heads_per_block][padded]
  T* keys = (T*)(q + a.heads_per_block * padded);             // [TILE][stride]
  T* values = a.values_are_keys ? keys : keys + TILE * stride;  // [TILE][value_stride]
  float* own = (float*)(values + TILE * value_stride);        // STEP: [warps][padded], a key before it is rounded
  const u32* table = a.paging.block_table + (u64)a.paging.sequences[t] * a.paging.max_blocks;
  u32 key_column = a.key_first + key_head * a.key_step, value_column = a.value_first + key_head * a.value_step;
  auto row_at = [&](u32 p) { return ((u64)table[p / a.paging.block_size] * a.paging.block_size + p % a.paging.block_size) * a.cache_width; };
  bool wide = a.cache_width % PER == 0 && key_column % PER == 0 && key_dim % PER == 0 && value_column % PER == 0 && a.value_dim % PER == 0;
  __shared__ u64 row_of[TILE];
  __shared__ u32 made[TILE];  // STEP: the row of the step that has the key, plus one
  // Asks for the keys and values from `base` on that lie in the cache.
  auto ask = [&](u32 base) {
    if (threadIdx.x < TILE) {
      u32 n = base + threadIdx.x;
      if (n < end) row_of[threadIdx.x] = row_at(a.index_ids ? a.index_ids[(u64)t * a.index_stride + n] : first + n);
      if constexpr (STEP) made[threadIdx.x] = 0;
    }
    if constexpr (STEP) {
      u32 row = threadIdx.x;
      bool mine = row < step->rows && a.paging.sequences[row] == a.paging.sequences[t];
      u32 k = mine ? a.paging.positions[row] - first - base : TILE;
      __syncthreads();
      if (k < TILE && base + k < end) made[k] = row + 1;
    }
    __syncthreads();
    auto copy = [&](T* to, u32 to_stride, u32 column, u32 n) {
      if (wide) {
        for (u32 k = warp; k < TILE && base + k < end; k += warps) {
          if (STEP && made[k]) continue;
          for (u32 c = lane * PER; c < n; c += 32 * PER) copy_async(to + k * to_stride + c, (const T*)a.cache + row_of[k] + column + c);
        }
      } else {
        for (u32 i = threadIdx.x; i < TILE * to_stride; i += blockDim.x) {
          u32 k = i / to_stride, c = i % to_stride;
          to[i] = base + k < end && c < n ? ((const T*)a.cache)[row_of[k] + column + c] : (T)0;
        }
      }
    };
    copy(keys, stride, key_column, key_dim);
    if (!a.values_are_keys) copy(values, value_stride, value_column, a.value_dim);
  };
  float weight[8];
  if constexpr (STEP) {
    // Weights of norms, and keys of earlier steps, do not wait for the operation before.
    const float* weights = warp < a.heads_per_block ? step->q_norm : step->k_norm;
    if (weights) load8(weight, weights, lane * 8, a.q_dim, is_wide(weights, a.q_dim));
    if (step->early) ask(begin);
    pdl_wait();
    if (warp < a.heads_per_block) step_head(q + warp * padded, a.q.p + (u64)t * a.q.stride + head * a.q_dim, a.q_dim, step->q_norm, weight, *step, t);
  }
  // Queries: a warp copies its head's, without waiting for them yet.
  if (!STEP && warp < a.heads_per_block) {
    const float* from = a.q.p + (u64)t * a.q.stride + head * a.q_dim;
    const float* rope = a.q_rope_dim ? a.q_rope.p + (u64)t * a.q_rope.stride + head * a.q_rope_stride : from;
    float* to = q + warp * padded;
    bool whole = a.q_dim % 4 == 0 && key_dim % 4 == 0 && padded == key_dim && (u64)from % 16 == 0 && (u64)rope % 16 == 0;
    if (whole) {
      for (u32 c = lane * 4; c < a.q_dim; c += 128) copy_async(to + c, from + c);
      for (u32 c = lane * 4; c < a.q_rope_dim; c += 128) copy_async(to + a.q_dim + c, rope + c);
    } else {
      for (u32 c = lane; c < padded; c += 32) to[c] = c < a.q_dim ? from[c] : c < key_dim ? rope[c - a.q_dim] : 0.f;
    }
  }
  float m = -INFINITY, l = 0.f, scale = a.scale * LOG2_E;
  float2 acc[DPL];
#pragma unroll
  for (int i = 0; i < DPL; i++) acc[i] = make_float2(0.f, 0.f);
  for (u32 base = begin; base < end; base += TILE) {
    if (!STEP || !step->early || base != begin) {
      __syncthreads();
      ask(base);
    }
    if constexpr (STEP) {
      // Keys of the step's own rows, by the last warps, which have no queries to make. One block puts a row's into the cache.
      u32 n = 0;
      for (u32 rest = __ballot_sync(0xffffffffu, made[lane] != 0); rest; rest &= rest - 1, n++) {
        if (n % warps != warps - 1 - warp) continue;
        u32 k = __ffs(rest) - 1, row = made[k] - 1;
        float *key = own + warp * padded, value[8];
        const float* from = step->v.p + (u64)row * step->v.stride + key_head * a.value_dim;
#pragma unroll
        for (int i = 0; i < 8; i++) value[i] = lane + 32 * i < a.q_dim ? from[lane + 32 * i] : 0.f;
        if (step->k_norm && warp < a.heads_per_block) load8(weight, step->k_norm, lane * 8, a.q_dim, is_wide(step->k_norm, a.q_dim));
        step_head(key, step->k.p + (u64)row * step->k.stride + key_head * a.q_dim, a.q_dim, step->k_norm, weight, *step, row);
        bool stores = row == t && blockIdx.y * a.heads_per_block % a.heads_per_key == 0;
        T* slot = (T*)step->cache + (u64)step->slots[row] * a.cache_width;
#pragma unroll
        for (int i = 0; i < 8; i++) {
          u32 c = lane + 32 * i;
          if (c >= a.q_dim) break;
          T x = as_cached<T>(key[c]), y = as_cached<T>(value[i]);
          keys[k * stride + c] = x;
          values[k * value_stride + c] = y;
          if (stores) { slot[key_column + c] = x; slot[value_column + c] = y; }
        }
        __syncwarp();
      }
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
    if (warp < a.heads_per_block) {
      // A key a lane. Four chains, so that one product does not wait for the one before.
      const uint4* k4 = (const uint4*)(keys + lane * stride);
      const float4* q4 = (const float4*)(q + warp * padded);
      float4 part = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 4
      for (u32 c = 0; c < padded / PER; c++) {
        uint4 k = k4[c];
        if constexpr (BF16) {
          float4 lo = q4[2 * c], hi = q4[2 * c + 1];
          part.x = fmaf(__uint_as_float(k.x << 16), lo.x, part.x); part.y = fmaf(__uint_as_float(k.x & 0xffff0000u), lo.y, part.y);
          part.z = fmaf(__uint_as_float(k.y << 16), lo.z, part.z); part.w = fmaf(__uint_as_float(k.y & 0xffff0000u), lo.w, part.w);
          part.x = fmaf(__uint_as_float(k.z << 16), hi.x, part.x); part.y = fmaf(__uint_as_float(k.z & 0xffff0000u), hi.y, part.y);
          part.z = fmaf(__uint_as_float(k.w << 16), hi.z, part.z); part.w = fmaf(__uint_as_float(k.w & 0xffff0000u), hi.w, part.w);
        } else {
          float4 y = q4[c];
          part.x = fmaf(__uint_as_float(k.x), y.x, part.x); part.y = fmaf(__uint_as_float(k.y), y.y, part.y);
          part.z = fmaf(__uint_as_float(k.z), y.z, part.z); part.w = fmaf(__uint_as_float(k.w), y.w, part.w);
        }
      }
      float s = (part.x + part.y) + (part.z + part.w);
      s = base + lane < end ? s : -INFINITY;
      float m_new = fmaxf(m, ceilf(warp_max(s) * scale)), p = exp2_of(fmaf(s, scale, -m_new)), old = power_of_two(m - m_new);
      m = m_new;
      l = l * old + warp_sum(p);
#pragma unroll
      for (int i = 0; i < DPL; i++) { acc[i].x *= old; acc[i].y *= old; }
      u32 here = end - base < TILE ? end - base : TILE;
#pragma unroll 4
      for (u32 k = 0; k < here; k++) {
        float w = __shfl_sync(0xffffffffu, p, k);
        const T* v = values + k * value_stride + 2 * lane;
#pragma unroll
        for (int i = 0; i < DPL; i++)
          if (2 * lane + 64 * i < a.value_dim) {
            if constexpr (BF16) {
              u32 pair = *(const u32*)(v + 64 * i);
              acc[i].x = fmaf(w, __uint_as_float(pair << 16), acc[i].x);
              acc[i].y = fmaf(w, __uint_as_float(pair & 0xffff0000u), acc[i].y);
            } else {
              float2 pair = *(const float2*)(v + 64 * i);
              acc[i].x = fmaf(w, pair.x, acc[i].x);
              acc[i].y = fmaf(w, pair.y, acc[i].y);
            }
          }
      }
    }
  }
  if (warp < a.heads_per_block) {
    float* out = a.partial + (((u64)t * a.num_heads + head) * a.max_splits + split) * (PART_HEADER + a.value_dim);
    if (lane == 0) { out[0] = m; out[1] = l; }
#pragma unroll
    for (int i = 0; i < DPL; i++)
      if (2 * lane + 64 * i < a.value_dim) {
        out[PART_HEADER + 2 * lane + 64 * i] = acc[i].x;
        if (2 * lane + 64 * i + 1 < a.value_dim) out[PART_HEADER + 1 + 2 * lane + 64 * i] = acc[i].y;
      }
  }
  if constexpr (STEP) join_by_last(a, *step, t, count, (count + keys_of_part - 1) / keys_of_part);
}
