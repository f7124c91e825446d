// What attention and the product behind it share.
#pragma once
#include "row.cuh"

#define PART_HEADER 4

struct AttendArgs {
  Mat q, q_rope, out;          // q_rope.p null: no second part
  const void* cache;
  float* partial;              // [tokens][heads][max_splits][PART_HEADER + value_dim]: what scores are counted from, sum of weights, weighted values
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

// Keys of one part of an attention row: a function of how many keys the row has, so that its bits do not depend on the batch.
// Short parts fill the device with a short context; long ones keep their joining small.
DEVICE u32 split_of(u32 count) { return count <= 1024 ? 32 : count <= 4096 ? 64 : 256; }

DEVICE void keys_of(const AttendArgs& a, u32 t, u32& first, u32& count) {
  u32 p = a.paging.positions[t];
  if (a.index_ids) { first = 0; count = a.index_counts[t]; return; }
  first = a.window && p + 1 > a.window ? p + 1 - a.window : 0;
  count = p + 1 - first;
}

// Scores are exponents of two, and what they are counted from, the largest of a part, is rounded up to a whole number: to count from another one multiplies
// by a power of two, which rounds nothing. So it does not matter to the bits when a sum learns of a larger score.
#define LOG2_E 1.4426950408889634f
DEVICE float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// 2^d for a whole number d <= 0, or minus infinity.
DEVICE float power_of_two(float d) { return d > -126.f ? __uint_as_float(__float_as_uint(d + 12583039.f /* 3 * 2^22 + 127 */) << 23) : 0.f; }

// Columns c .. c + 8 of the joined parts of a head. `first` and `count` are those of keys_of. Parts are read N at a time, none waiting for another.
template <int N = 4> DEVICE void join8(const AttendArgs& a, u32 t, u32 head, u32 c, u32 count, float out[8]) {
  u32 split = split_of(count), splits = (count + split - 1) / split, width = PART_HEADER + a.value_dim;
  const float* part = a.partial + ((u64)t * a.num_heads + head) * a.max_splits * width;
  float sink = a.sinks ? a.sinks[head] * LOG2_E : -INFINITY, m = ceilf(sink), v[N][8], score[N], weights[N];
  bool wide = a.value_dim % 8 == 0;
  auto load = [&](u32 s) {
#pragma unroll
    for (int i = 0; i < N; i++) {
      const float* p = part + (s + i < splits ? s + i : 0) * width;
      score[i] = p[0];
      weights[i] = p[1];
      load8(v[i], p + PART_HEADER, c, a.value_dim, wide);
    }
  };
  load(0);
  for (u32 s = 0; s < splits; s += 8) {
    float x[8];
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = part[(s + i < splits ? s + i : 0) * width];
#pragma unroll
    for (int i = 0; i < 8; i++) m = fmaxf(m, x[i]);
  }
  float l = a.sinks ? exp2_of(sink - m) : 0.f;
#pragma unroll
  for (int k = 0; k < 8; k++) out[k] = 0.f;
#pragma unroll 1
  for (u32 s = 0; s < splits; s += N) {
    if (s) load(s);
#pragma unroll
    for (int i = 0; i < N; i++) {
      if (s + i >= splits) continue;
      float weight = power_of_two(score[i] - m);
      l = fmaf(weights[i], weight, l);
#pragma unroll
      for (int k = 0; k < 8; k++) out[k] = fmaf(v[i][k], weight, out[k]);
    }
  }
#pragma unroll
  for (int k = 0; k < 8; k++) out[k] /= l;
}
