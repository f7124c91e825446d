// The router's choice: by one warp a row, or by a block.
#pragma once
#include "common.cuh"

struct RouteArgs {
  Mat logits, weights;
  const float* correction_bias;
  u32* ids;
  u32 ids_stride, scoring, n_group, topk_group, norm_topk_prob, top_k;
  float factor;
  u32 pad;
};
// Order of f32::total_cmp for numbers without NaN: -0 before +0; 0 for what was taken already.
DEVICE u32 ordered(float x) { u32 b = __float_as_uint(x); return b ^ ((b >> 31) ? 0xffffffffu : 0x80000000u); }
#define TAKEN __uint_as_float(0xffffffffu)

// The first of the largest values of one lane's share.
DEVICE void best_of_lane(const float* values, u32 n, u32 lane, u32& key, u32& at) {
  key = 0; at = 0xffffffffu;
  for (u32 e = lane; e < n; e += 32) {
    u32 k = ordered(values[e]);
    if (at == 0xffffffffu || k > key) { key = k; at = e; }
  }
}
// The first of the largest of all lanes.
DEVICE u32 best_of_warp(u32 key, u32 at) {
  u32 best = __reduce_max_sync(0xffffffffu, at == 0xffffffffu ? 0 : key);
  return __reduce_min_sync(0xffffffffu, at != 0xffffffffu && key == best ? at : 0xffffffffu);
}

// The weight of choice `lane` whose score is `score`, by a warp; sums in the order of choice.
DEVICE float chosen_weight(const RouteArgs& a, float score) {
  bool active = threadIdx.x % 32 < a.top_k;
  if (a.scoring == 2) {
    float max = warp_max(active ? score : -INFINITY);
    score = active ? expf(score - max) : 0.f;
    float sum = 0.f;
    for (u32 k = 0; k < a.top_k; k++) sum += __shfl_sync(0xffffffffu, score, k);
    score /= sum;
  }
  if (a.norm_topk_prob) {
    float sum = 0.f;
    for (u32 k = 0; k < a.top_k; k++) sum += __shfl_sync(0xffffffffu, active ? score : 0.f, k);
    score /= sum + 1e-20f;
  }
  return score * a.factor;
}

// Lane k < top_k gets the id and weight of choice k. `shared` holds 2 n + 2 n_group floats.
DEVICE void route_row(const RouteArgs& a, u32 t, float* shared, u32& my_id, float& my_weight) {
  u32 n = a.logits.cols, lane = threadIdx.x % 32;
  float *scores = shared, *choice = shared + n, *groups = shared + 2 * n;
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
  u32 key, at;
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
      best_of_lane(groups, a.n_group, lane, key, at);
      u32 g = best_of_warp(key, at);
      __syncwarp();
      if (lane == 0) { groups[g] = -INFINITY; groups[a.n_group + g] = 1.f; }
      __syncwarp();
    }
    for (u32 e = lane; e < n; e += 32) if (groups[a.n_group + e / size] != 1.f) choice[e] = -INFINITY;
    __syncwarp();
  }
  float mine = 0.f;
  my_id = 0;
  best_of_lane(choice, n, lane, key, at);
  for (u32 k = 0; k < a.top_k; k++) {
    u32 e = best_of_warp(key, at);
    if (lane == k) { mine = scores[e]; my_id = e; }
    if (e == at) {  // this lane's: its next best
      choice[e] = TAKEN;
      best_of_lane(choice, n, lane, key, at);
    }
  }
  my_weight = chosen_weight(a, mine);
}

// The choice of one row by a whole block of 256 threads: a thread an expert, its place the number of experts before it. Five times as fast as
// one warp that looks for the best expert again and again, which matters where every block chooses for itself.
struct Choice {
  __align__(16) u32 keys[256];
  float values[256], scores[32];  // scores of the chosen
  u32 ids[32];
};
// `logit` and `bias` of expert threadIdx.x. Without groups of experts.
DEVICE void choose(const RouteArgs& a, Choice& to, float logit, float bias) {
  u32 e = threadIdx.x, n = a.logits.cols, lane = e % 32;
  float score = logit;
  if (a.scoring == 0) score = sigmoid(logit);
  if (a.scoring == 1) {
    // Sums in the order of `route_row`.
    to.values[e] = e < n ? logit : -INFINITY;
    __syncthreads();
    float max = -INFINITY, sum = 0.f;
    for (u32 i = lane; i < n; i += 32) max = fmaxf(max, to.values[i]);
    max = warp_max(max);
    for (u32 i = lane; i < n; i += 32) sum += expf(to.values[i] - max);
    score = expf(logit - max) / warp_sum(sum);
  }
  u32 key = e < n ? ordered(score + bias) : 0, place = 0;
  to.keys[e] = key;
  __syncthreads();
  if (e < n) {
#pragma unroll 1
    for (u32 f = 0; f < n; f += 4) {
      uint4 k = *(const uint4*)(to.keys + f);
      place += (k.x > key || (k.x == key && f < e)) + (k.y > key || (k.y == key && f + 1 < e));
      place += (k.z > key || (k.z == key && f + 2 < e)) + (k.w > key || (k.w == key && f + 3 < e));
    }
    if (place < a.top_k) { to.ids[place] = e; to.scores[place] = score; }
  }
  __syncthreads();
}
