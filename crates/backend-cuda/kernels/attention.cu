// Attention over paged caches, and the choice of positions of sparse attention.
#include "attend_rows.cuh"
#include "matrices.cuh"

#define ATTEND(D) \
  KERNEL __launch_bounds__(256) attend##D##_bf16(const __grid_constant__ AttendArgs a) { attend<u16, D, false>(a, nullptr); } \
  KERNEL __launch_bounds__(256) attend##D##_f32(const __grid_constant__ AttendArgs a) { attend<float, D, false>(a, nullptr); }
ATTEND(1) ATTEND(2) ATTEND(4) ATTEND(8)

// ---- latent attention over rows in bfloat16, by tensor cores ----

#define MLA_HEADS 16  // heads of a block: the rows of a product
#define MLA_PIECES 5   // of 128 columns of a query, that a lane has in registers: 576 columns

// Values are the first columns of the keys, which all heads share; keys and queries have a multiple of 16 columns, values of 64. Queries and
// weights of keys are sums of two bfloat16, so that only the cached rows are rounded. Grid: (parts, or as many blocks as share them, heads / 16, tokens).
// Scores: a warp has eight of the 32 keys and half of the columns. Weights: a warp has two heads, a lane a key. Values: a warp has an eighth of the columns.
KERNEL __launch_bounds__(256, 2) attend_mla(const __grid_constant__ AttendArgs a) {
  extern __shared__ __align__(16) u8 mla_shared[];
  __shared__ u64 row_of[2][TILE];
  __shared__ float rescale[MLA_HEADS];
  constexpr u32 S = TILE + 1, P = TILE + 8;  // floats of a row of scores, elements of a row of weights
  constexpr u32 MLA_REST = 2 * MLA_HEADS * S * 4 + 2 * MLA_HEADS * P * 2;
  pdl_launch();
  u32 t = blockIdx.z, warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, pair = lane % 4;
  u32 first, count;
  // What the host wrote does not wait for the operation before.
  const u32* table = a.paging.block_table + (u64)a.paging.sequences[t] * a.paging.max_blocks;
  if (!a.index_ids) keys_of(a, t, first, count);
  pdl_wait();
  if (a.index_ids) keys_of(a, t, first, count);
  u32 keys_of_part = split_of(count), head = blockIdx.y * MLA_HEADS, key_dim = a.q_dim + a.q_rope_dim, stride = key_dim + 8, pieces = key_dim / 8;
  u16* q = (u16*)mla_shared;                      // [high, low][MLA_HEADS][stride]
  u16* keys = q + 2 * MLA_HEADS * stride;     // [buffers][TILE][stride]
  // With memory for two tiles of keys, the next ones are on their way while these are multiplied.
  u32 given, buffers;
  asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(given));
  buffers = given < MLA_REST + (2 * MLA_HEADS + 2 * TILE) * stride * 2 ? 1 : 2;
  float* scores = (float*)(keys + buffers * TILE * stride);  // [halves of the columns][MLA_HEADS][S]
  u16* weights = (u16*)(scores + 2 * MLA_HEADS * S);  // [high, low][MLA_HEADS][P]
  u32 q_at = (u32)__cvta_generic_to_shared(q), all_keys_at = (u32)__cvta_generic_to_shared(keys), weights_at = (u32)__cvta_generic_to_shared(weights);
  u32 columns = a.value_dim / 64;  // groups of eight columns that a warp has
  float scale = a.scale * LOG2_E;
  for (u32 split = blockIdx.x; split * keys_of_part < count; split += gridDim.x) {
    // The queries of a warp's two heads, asked for before anything that their use does not wait for.
    float4 x[2][MLA_PIECES];
    if (split == blockIdx.x) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        u32 h = head + warp + 8 * i;
        const float* from = a.q.p + (u64)t * a.q.stride + h * a.q_dim;
        const float* rope = a.q_rope_dim ? a.q_rope.p + (u64)t * a.q_rope.stride + h * a.q_rope_stride : from;
#pragma unroll
        for (int k = 0; k < MLA_PIECES; k++) {
          u32 c = lane * 4 + k * 128;
          if (c < key_dim) x[i][k] = *(const float4*)(c < a.q_dim ? from + c : rope + (c - a.q_dim));
        }
      }
    }
    u32 begin = split * keys_of_part, end = begin + keys_of_part < count ? begin + keys_of_part : count;
    float m[2] = {-INFINITY, -INFINITY}, l[2] = {0.f, 0.f};
    float acc[8][4] = {};
    // Where the keys of up to 64 positions lie, and their way into a buffer of 32.
    auto find = [&](u32 base, u32 many) {
      u32 k = base - begin + threadIdx.x;
      if (threadIdx.x < many && base + threadIdx.x < end) {
        u32 p = a.index_ids ? a.index_ids[(u64)t * a.index_stride + base + threadIdx.x] : first + base + threadIdx.x;
        row_of[k / TILE % 2][k % TILE] = ((u64)table[p / a.paging.block_size] * a.paging.block_size + p % a.paging.block_size) * a.cache_width + a.key_first;
      }
      __syncthreads();
    };
    auto ask = [&](u32 base) {
      u32 buffer = (base - begin) / TILE % buffers, which = (base - begin) / TILE % 2;
      for (u32 k = warp; k < TILE; k += 8) {
        bool valid = base + k < end;  // Others are zeros: their weight is zero, and zero times what lies there may be no number.
        const u16* from = (const u16*)a.cache + (valid ? row_of[which][k] : 0);
        for (u32 c = lane; c < pieces; c += 32)
          asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(all_keys_at + ((buffer * TILE + k) * stride + c * 8) * 2), "l"(from + c * 8), "r"(valid ? 16 : 0));
      }
      asm volatile("cp.async.commit_group;" ::: "memory");
    };
    for (u32 base = begin; base < end; base += TILE) {
      u32 keys_at = all_keys_at + (base - begin) / TILE % buffers * TILE * stride * 2;
      __syncthreads();
      if (buffers == 1) {
        find(base, TILE);
        ask(base);
      } else if (base == begin) {
        find(base, 2 * TILE);
        ask(base);
        if (base + TILE < end) ask(base + TILE);
      } else if (base + TILE < end) {
        find(base + TILE, TILE);
        ask(base + TILE);
      }
      if (base == begin && split == blockIdx.x) {
        auto put = [&](u32 h, u32 c, float4 x) {
          u32 high[2] = {pack_bf16(x.x, x.y), pack_bf16(x.z, x.w)};
          auto rest = [](float v, u32 bits) { return v - __uint_as_float(bits); };
          *(uint2*)(q + h * stride + c) = make_uint2(high[0], high[1]);
          *(uint2*)(q + (MLA_HEADS + h) * stride + c) = make_uint2(
              pack_bf16(rest(x.x, high[0] << 16), rest(x.y, high[0] & 0xffff0000u)), pack_bf16(rest(x.z, high[1] << 16), rest(x.w, high[1] & 0xffff0000u)));
        };
#pragma unroll
        for (int i = 0; i < 2; i++) {
          u32 h = warp + 8 * i;
#pragma unroll
          for (int k = 0; k < MLA_PIECES; k++) {
            u32 c = lane * 4 + k * 128;
            if (c < key_dim) put(h, c, x[i][k]);
          }
          const float* from = a.q.p + (u64)t * a.q.stride + (head + h) * a.q_dim;
          const float* rope = a.q_rope_dim ? a.q_rope.p + (u64)t * a.q_rope.stride + (head + h) * a.q_rope_stride : from;
          for (u32 c = lane * 4 + MLA_PIECES * 128; c < key_dim; c += 128) put(h, c, *(const float4*)(c < a.q_dim ? from + c : rope + (c - a.q_dim)));
        }
      }
      if (buffers == 2 && base + TILE < end) asm volatile("cp.async.wait_group 1;" ::: "memory");
      else asm volatile("cp.async.wait_all;" ::: "memory");
      __syncthreads();
      {
        u32 steps = key_dim / 16, half = warp / 4, from = half ? steps / 2 : 0, to = half ? steps : steps / 2;
        u32 a_at = q_at + (lane % 16 * stride + lane / 16 * 8) * 2, b_at = keys_at + ((warp % 4 * 8 + lane % 8) * stride + lane / 8 % 2 * 8) * 2;
        float high[4] = {}, low[4] = {};
#pragma unroll 3
        for (u32 s = from; s < to; s++) {
          u32 x[4], y[4], b[2];
          ldmatrix4(x, a_at + s * 32);
          ldmatrix4(y, a_at + MLA_HEADS * stride * 2 + s * 32);
          ldmatrix2(b, b_at + s * 32);
          mma_bf16(high, x, b[0], b[1]);
          mma_bf16(low, y, b[0], b[1]);
        }
        float* to_scores = scores + half * MLA_HEADS * S + warp % 4 * 8 + 2 * pair;
#pragma unroll
        for (int k = 0; k < 4; k++) to_scores[(g + 8 * (k >> 1)) * S + (k & 1)] = high[k] + low[k];
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < 2; i++) {
        u32 h = 2 * warp + i;
        float s = scores[h * S + lane] + scores[(MLA_HEADS + h) * S + lane];
        s = base + lane < end ? s : -INFINITY;
        // Counted from the tile's own largest score first, so that a weight's bits do not depend on other tiles.
        float from = ceilf(warp_max(s) * scale), m_new = fmaxf(m[i], from), old = power_of_two(m[i] - m_new);
        float p = exp2_of(fmaf(s, scale, -from)) * power_of_two(from - m_new);
        m[i] = m_new;
        l[i] = l[i] * old + warp_sum(p);
        split_bf16(p, weights[h * P + lane], weights[(MLA_HEADS + h) * P + lane]);
        if (lane == 0) rescale[h] = old;
      }
      __syncthreads();
      float old[2] = {rescale[g], rescale[g + 8]};
      u32 w[2][2][4];  // [high, low][16 keys]
#pragma unroll
      for (int part = 0; part < 2; part++)
#pragma unroll
        for (int s = 0; s < 2; s++) ldmatrix4(w[part][s], weights_at + ((part * MLA_HEADS + lane % 16) * P + s * 16 + lane / 16 * 8) * 2);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        if (i >= columns) break;
        u32 b[4];  // 32 keys of eight columns
        ldmatrix4_transposed(b, keys_at + (lane * stride + (warp * columns + i) * 8) * 2);
#pragma unroll
        for (int k = 0; k < 4; k++) acc[i][k] *= old[k >> 1];
#pragma unroll
        for (int s = 0; s < 2; s++) {
          mma_bf16(acc[i], w[0][s], b[2 * s], b[2 * s + 1]);
          mma_bf16(acc[i], w[1][s], b[2 * s], b[2 * s + 1]);
        }
      }
    }
    auto part_of = [&](u32 h) { return a.partial + (((u64)t * a.num_heads + head + h) * a.max_splits + split) * (PART_HEADER + a.value_dim); };
    if (lane < 2) {
      float* out = part_of(2 * warp + lane);
      out[0] = lane ? m[1] : m[0];
      out[1] = lane ? l[1] : l[0];
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (i >= columns) break;
      u32 c = PART_HEADER + (warp * columns + i) * 8 + 2 * pair;
      *(float2*)(part_of(g) + c) = make_float2(acc[i][0], acc[i][1]);
      *(float2*)(part_of(g + 8) + c) = make_float2(acc[i][2], acc[i][3]);
    }
  }
}

// Joins the parts of a head, which has at most 512 columns. Grid (heads, tokens), 64 threads.
struct JoinArgs {
  AttendArgs attend;
  u8* digits;  // the joined heads once more as digits, a part a head, or null; value_dim is then a multiple of 256
};
KERNEL attend_join(const __grid_constant__ JoinArgs args) {
  const AttendArgs& a = args.attend;
  pdl_launch();
  pdl_wait();
  u32 t = blockIdx.y, head = blockIdx.x, c = threadIdx.x * 8;
  if (c >= a.value_dim) return;
  float v[8];
  u32 first, count;
  keys_of(a, t, first, count);
  join8(a, t, head, c, count, v);
  u64 at = (u64)t * a.out.stride + head * a.value_dim;
  store8(a.out.p + at, v, c, a.value_dim, is_wide(a.out.p + at, a.value_dim));
  if (a.out.twin) store8(a.out.twin + at, v, c, a.value_dim);
  if (args.digits) digits8(v, args.digits + (((u64)t * a.num_heads + head) * (a.value_dim / 64) + c / 64) * DIGITS_BYTES);
}

struct IndexScoreArgs {
  Mat q, weights, scores;
  const void* cache;
  Paging paging;
  u32 num_heads, head_dim, cache_bf16;
  u32 block_tokens;  // index_score*_bf16: rows of a block
  float scale;
  u32 num_tokens;
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

// ---- the same by tensor cores, for keys of 128 columns in bfloat16 and heads by 32 ----

#define INDEX_DIM 128
#define INDEX_HEADS 32    // of a step
#define INDEX_STRIDE 160  // columns between two heads: the eight lanes that read at a time find different banks
#define INDEX_PART (INDEX_HEADS * INDEX_STRIDE)

// A row of keys of a lane: eight columns of every 32, so that products 2 c and 2 c + 1 have four each.
template <int KT> DEVICE void index_keys(u32 keys[KT][8][4], const IndexScoreArgs& a, u32 sequence, u32 base, u32 count) {
  const u32* table = a.paging.block_table + (u64)sequence * a.paging.max_blocks;
  u32 warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, pair = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < KT; i++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      u32 j = base + (warp * KT + i) * 16 + g + 8 * r;
      const uint4* from = (const uint4*)((const u16*)a.cache + (j < count ? ((u64)table[j / a.paging.block_size] * a.paging.block_size + j % a.paging.block_size) * INDEX_DIM : 0)) + pair;
#pragma unroll
      for (int c = 0; c < 4; c++) {
        uint4 v = j < count ? from[4 * c] : make_uint4(0, 0, 0, 0);
        keys[i][2 * c][r] = v.x; keys[i][2 * c][2 + r] = v.y; keys[i][2 * c + 1][r] = v.z; keys[i][2 * c + 1][2 + r] = v.w;
      }
    }
}
// A thread's 16 columns of 32 heads' queries as sums of three bfloat16, which are the numbers themselves: nothing is rounded before it is added up.
DEVICE void index_split(u16* to, const float4 x[4]) {
  u32 head = threadIdx.x / 8, column = threadIdx.x % 8 * 16;
  u32 part[3][8];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float v[4] = {x[i].x, x[i].y, x[i].z, x[i].w};
#pragma unroll
    for (int k = 0; k < 2; k++) {
      float lo = v[2 * k], hi = v[2 * k + 1];
#pragma unroll
      for (int p = 0; p < 3; p++) {
        u32 bits = pack_bf16(lo, hi);
        part[p][2 * i + k] = bits;
        lo -= __uint_as_float(bits << 16);
        hi -= __uint_as_float(bits & 0xffff0000u);
      }
    }
  }
#pragma unroll
  for (int p = 0; p < 3; p++) {
    uint4* at = (uint4*)(to + p * INDEX_PART + head * INDEX_STRIDE + column);
    at[0] = make_uint4(part[p][0], part[p][1], part[p][2], part[p][3]);
    at[1] = make_uint4(part[p][4], part[p][5], part[p][6], part[p][7]);
  }
}
// sums[key][head] of a warp's keys and 32 heads.
template <int KT> DEVICE void index_products(float sums[KT][4][4], const u32 keys[KT][8][4], const u16* q) {
  u32 g = threadIdx.x % 32 / 4, pair = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < KT; i++)
#pragma unroll
    for (int n = 0; n < 4; n++)
#pragma unroll
      for (int k = 0; k < 4; k++) sums[i][n][k] = 0.f;
#pragma unroll
  for (int c = 0; c < 4; c++)
#pragma unroll
    for (int p = 0; p < 3; p++)
#pragma unroll
      for (int n = 0; n < 4; n++) {
        uint4 b = *(const uint4*)(q + p * INDEX_PART + (8 * n + g) * INDEX_STRIDE + 32 * c + 8 * pair);
#pragma unroll
        for (int i = 0; i < KT; i++) {
          mma_bf16(sums[i][n], keys[i][2 * c], b.x, b.y);
          mma_bf16(sums[i][n], keys[i][2 * c + 1], b.z, b.w);
        }
      }
}
// A warp has 16 KT keys in registers and goes through the block's rows, 32 heads at a time: the next ones are on their way while these are multiplied.
// Grid: (tiles of 128 KT keys, groups of `block_tokens` rows).
template <int KT> DEVICE void index_score_tiles(const IndexScoreArgs& a) {
  extern __shared__ __align__(16) u8 index_tiles[];
  u16* q = (u16*)index_tiles;  // two steps of [part][head][INDEX_STRIDE]
  pdl_launch();
  pdl_wait();
  u32 warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, pair = threadIdx.x % 4, base = blockIdx.x * 128 * KT;
  u32 groups = a.num_heads / INDEX_HEADS, end = (blockIdx.y + 1) * a.block_tokens;
  if (end > a.num_tokens) end = a.num_tokens;
  // The next row that has keys here.
  auto following = [&](u32 t) {
    while (t < end && a.paging.positions[t] < base) t++;
    return t;
  };
  float4 x[4];
  auto load = [&](u32 t, u32 group) {
    const float4* from = (const float4*)(a.q.p + (u64)t * a.q.stride + group * (INDEX_HEADS * INDEX_DIM) + threadIdx.x * 16);
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = from[i];
  };
  u32 t = following(blockIdx.y * a.block_tokens), group = 0, step = 0, sequence = 0xffffffffu, known = 0;
  if (t >= end) return;
  load(t, 0);
  index_split(q, x);
  __syncthreads();
  u32 keys[KT][8][4];
  float score[KT][2] = {};
  while (t < end) {
    u32 count = a.paging.positions[t] + 1, now = a.paging.sequences[t], next = group + 1 < groups ? t : following(t + 1), next_group = group + 1 < groups ? group + 1 : 0;
    if (next < end) load(next, next_group);
    // Rows of a prompt see more and more keys of one sequence: all that the block's last row sees.
    if (now != sequence || known < count) {
      known = count;
      for (u32 later = t + 1; later < end && a.paging.sequences[later] == now; later++)
        if (a.paging.positions[later] >= known) known = a.paging.positions[later] + 1;
      index_keys<KT>(keys, a, now, base, known);
      sequence = now;
    }
    float sums[KT][4][4];
    index_products<KT>(sums, keys, q + step % 2 * (3 * INDEX_PART));
    const float* weights = a.weights.p + (u64)t * a.weights.stride + group * INDEX_HEADS + 2 * pair;
#pragma unroll
    for (int n = 0; n < 4; n++)
#pragma unroll
      for (int k = 0; k < 4; k++)
#pragma unroll
        for (int i = 0; i < KT; i++) score[i][k >> 1] = fmaf(weights[8 * n + (k & 1)], fmaxf(sums[i][n][k] * a.scale, 0.f), score[i][k >> 1]);
    if (next_group == 0)
#pragma unroll
      for (int i = 0; i < KT; i++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
          float s = score[i][r];
          s += __shfl_xor_sync(0xffffffffu, s, 1);
          s += __shfl_xor_sync(0xffffffffu, s, 2);
          u32 j = base + (warp * KT + i) * 16 + g + 8 * r;
          if (pair == 0 && j < count) a.scores.p[(u64)t * a.scores.stride + j] = s;
          score[i][r] = 0.f;
        }
    step++;
    if (next < end) index_split(q + step % 2 * (3 * INDEX_PART), x);
    __syncthreads();
    t = next;
    group = next_group;
  }
}
KERNEL __launch_bounds__(256) index_score1_bf16(const __grid_constant__ IndexScoreArgs a) { index_score_tiles<1>(a); }
KERNEL __launch_bounds__(256, 2) index_score2_bf16(const __grid_constant__ IndexScoreArgs a) { index_score_tiles<2>(a); }

struct IndexTopkArgs { Mat scores; const u32* positions; u32* ids; u32* counts; u32 ids_stride, k; };
DEVICE u32 ordered_score(float x) { u32 b = __float_as_uint(x == 0.f ? 0.f : x); return b ^ ((b >> 31) ? 0xffffffffu : 0x80000000u); }
// The k largest by radix selection, eight bits at a time, then one ordered pass that collects them. One block of 1024 a row: a warp has neighbouring
// positions, in registers for rows of up to 1024 * TOPK_HELD (read again and again from the cache otherwise), so that the ordered pass needs one
// sum over warps, not one a thousand positions.
#define TOPK_HELD 16
template <bool HELD> DEVICE void topk_row(const float* scores, u32 n, u32 k, u32* ids) {
  __shared__ u32 histogram[4][256];
  __shared__ u32 above_of[32], equal_of[32];
  __shared__ u32 prefix, remaining;
  u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, per = (n + 1023) / 1024, first = warp * per * 32 + lane;
  u32 held[HELD ? TOPK_HELD : 1];
  auto read = [&](u32 r) { return first + 32 * r < n ? ordered_score(scores[first + 32 * r]) : 0u; };
  // Calls f(number of the position in this lane, its key) in order; all lanes together.
  auto each = [&](auto f) {
    if constexpr (HELD) {
#pragma unroll
      for (u32 r = 0; r < TOPK_HELD; r++)
        if (r < per) f(r, held[r]);
    } else {
      for (u32 r = 0; r < per; r++) f(r, read(r));
    }
  };
  if constexpr (HELD) {
#pragma unroll
    for (u32 r = 0; r < TOPK_HELD; r++) held[r] = r < per ? read(r) : 0;
  }
  (&histogram[0][0])[threadIdx.x] = 0;
  if (threadIdx.x == 0) { prefix = 0; remaining = k; }
  __syncthreads();
#pragma unroll
  for (int digit = 3; digit >= 0; digit--) {
    int shift = 8 * digit;
    u32 mask = digit == 3 ? 0 : 0xffffffffu << (shift + 8), known = prefix;
    each([&](u32 r, u32 key) {
      if (first + 32 * r < n && (key & mask) == known) atomicAdd(&histogram[digit][key >> shift & 255], 1);
    });
    __syncthreads();
    if (warp == 0) {
      // A lane has eight bins, the last lane the smallest keys: what lies above a bin, and the bin that reaches k.
      u32 bins[8], sum = 0;
#pragma unroll
      for (int i = 0; i < 8; i++) sum += bins[i] = histogram[digit][255 - lane * 8 - i];
      u32 before = sum;
#pragma unroll
      for (int d = 1; d < 32; d <<= 1) {
        u32 x = __shfl_up_sync(0xffffffffu, before, d);
        if (lane >= d) before += x;
      }
      before -= sum;
      u32 left = remaining;
      __syncwarp();
#pragma unroll
      for (int i = 0; i < 8; i++) {
        if (before < left && before + bins[i] >= left) {
          prefix = known | (255 - lane * 8 - i) << shift;
          remaining = left - before;  // of those equal to the prefix so far
        }
        before += bins[i];
      }
    }
    __syncthreads();
  }
  // `prefix` is the k-th largest key; `remaining` of its equals belong to the set, the earliest.
  u32 threshold = prefix, equals = remaining, above = 0, equal = 0;
  each([&](u32 r, u32 key) {
    bool inside = first + 32 * r < n;
    above += __popc(__ballot_sync(0xffffffffu, inside && key > threshold));
    equal += __popc(__ballot_sync(0xffffffffu, inside && key == threshold));
  });
  if (lane == 0) { above_of[warp] = above; equal_of[warp] = equal; }
  __syncthreads();
  // What the warps before have.
  u32 above_before = __reduce_add_sync(0xffffffffu, lane < warp ? above_of[lane] : 0), equal_before = __reduce_add_sync(0xffffffffu, lane < warp ? equal_of[lane] : 0);
  each([&](u32 r, u32 key) {
    bool inside = first + 32 * r < n, is_above = inside && key > threshold, is_equal = inside && key == threshold;
    u32 above_mask = __ballot_sync(0xffffffffu, is_above), equal_mask = __ballot_sync(0xffffffffu, is_equal), mine = (1u << lane) - 1;
    u32 equals_before = equal_before + __popc(equal_mask & mine);
    u32 at = above_before + __popc(above_mask & mine) + (equals_before < equals ? equals_before : equals);
    if (is_above || (is_equal && equals_before < equals)) ids[at] = first + 32 * r;
    above_before += __popc(above_mask);
    equal_before += __popc(equal_mask);
  });
}
// FEW: scores in registers, which leaves a multiprocessor one block; rows of a prompt are many, and two blocks wait for each other's reads.
template <bool FEW> DEVICE void topk(const IndexTopkArgs& a) {
  pdl_launch();
  u32 t = blockIdx.x, n = a.positions[t] + 1;
  pdl_wait();
  const float* scores = a.scores.p + (u64)t * a.scores.stride;
  u32* ids = a.ids + (u64)t * a.ids_stride;
  u32 k = n < a.k ? n : a.k;
  if (threadIdx.x == 0) a.counts[t] = k;
  if (n <= a.k) {
    for (u32 i = threadIdx.x; i < n; i += blockDim.x) ids[i] = i;
  } else if (FEW && n <= 1024 * TOPK_HELD) {
    topk_row<FEW>(scores, n, k, ids);
  } else {
    topk_row<false>(scores, n, k, ids);
  }
}
KERNEL __launch_bounds__(1024) index_topk_few(const __grid_constant__ IndexTopkArgs a) { topk<true>(a); }
KERNEL __launch_bounds__(1024, 2) index_topk(const __grid_constant__ IndexTopkArgs a) { topk<false>(a); }
