// Attention over paged caches, and the choice of positions of sparse attention.
#include "attend_rows.cuh"

#define ATTEND(D) \
  KERNEL __launch_bounds__(256) attend##D##_bf16(const __grid_constant__ AttendArgs a) { attend<u16, D, false>(a, nullptr); } \
  KERNEL __launch_bounds__(256) attend##D##_f32(const __grid_constant__ AttendArgs a) { attend<float, D, false>(a, nullptr); }
ATTEND(1) ATTEND(2) ATTEND(4) ATTEND(8)

// ---- latent attention over rows in bfloat16, by tensor cores ----

#define MLA_HEADS 16  // heads of a block: the rows of a product
#define MLA_PIECES 5   // of 128 columns of a query, that a lane has in registers: 576 columns

DEVICE void ldmatrix4(u32 r[4], u32 at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}
DEVICE void ldmatrix4_transposed(u32 r[4], u32 at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}
DEVICE void ldmatrix2(u32 r[2], u32 at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(at) : "memory");
}
// x as the sum of two bfloat16: 16 bits of its significand.
DEVICE void split_bf16(float x, u16& high, u16& low) {
  high = f32_to_bf16(x);
  low = f32_to_bf16(x - bf16_to_f32(high));
}

// Values are the first columns of the keys, which all heads share; keys and queries have a multiple of 16 columns, values of 64. Queries and
// weights of keys are sums of two bfloat16, so that only the cached rows are rounded. Grid: (parts, or as many blocks as share them, heads / 16, tokens).
// Scores: a warp has eight of the 32 keys and half of the columns. Weights: a warp has two heads, a lane a key. Values: a warp has an eighth of the columns.
KERNEL __launch_bounds__(256, 2) attend_mla(const __grid_constant__ AttendArgs a) {
  extern __shared__ __align__(16) u8 mla_shared[];
  __shared__ u64 row_of[TILE];
  __shared__ float rescale[MLA_HEADS];
  constexpr u32 S = TILE + 1, P = TILE + 8;  // floats of a row of scores, elements of a row of weights
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
  u16* keys = q + 2 * MLA_HEADS * stride;     // [TILE][stride]
  float* scores = (float*)(keys + TILE * stride);  // [halves of the columns][MLA_HEADS][S]
  u16* weights = (u16*)(scores + 2 * MLA_HEADS * S);  // [high, low][MLA_HEADS][P]
  u32 q_at = (u32)__cvta_generic_to_shared(q), keys_at = (u32)__cvta_generic_to_shared(keys), weights_at = (u32)__cvta_generic_to_shared(weights);
  u32 columns = a.value_dim / 64;  // groups of eight columns that a warp has
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
    for (u32 base = begin; base < end; base += TILE) {
      __syncthreads();
      if (threadIdx.x < TILE && base + threadIdx.x < end) {
        u32 p = a.index_ids ? a.index_ids[(u64)t * a.index_stride + base + threadIdx.x] : first + base + threadIdx.x;
        row_of[threadIdx.x] = ((u64)table[p / a.paging.block_size] * a.paging.block_size + p % a.paging.block_size) * a.cache_width + a.key_first;
      }
      __syncthreads();
      for (u32 k = warp; k < TILE; k += 8) {
        bool valid = base + k < end;  // Others are zeros: their weight is zero, and zero times what lies there may be no number.
        const u16* from = (const u16*)a.cache + (valid ? row_of[k] : 0);
        for (u32 c = lane; c < pieces; c += 32)
          asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(keys_at + (k * stride + c * 8) * 2), "l"(from + c * 8), "r"(valid ? 16 : 0));
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
      asm volatile("cp.async.wait_all;" ::: "memory");
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
        float s = (scores[h * S + lane] + scores[(MLA_HEADS + h) * S + lane]) * a.scale;
        s = base + lane < end ? s : -INFINITY;
        float m_new = fmaxf(m[i], warp_max(s)), p = expf(s - m_new), old = expf(m[i] - m_new);
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

// ---- the same for the rows of a prompt ----
//
// A block has a row and 64 heads, so that a cached row is read for all of them, and keeps what it adds up in registers: no parts in memory. It goes
// through the keys twice: for scores, largest scores and weights of all parts (which lie in memory in between, in the second-level cache), then
// for values. Every number is made as `attend_mla` and `attend_join` make it. Up to 2048 keys (a part is one tile or two).
#define PROMPT_HEADS 64
#define PROMPT_KEY 576   // columns of a key
#define PROMPT_VALUE 512
#define PROMPT_STRIDE (PROMPT_KEY + 8)
#define PROMPT_VALUE_STRIDE (PROMPT_VALUE + 8)
#define PROMPT_PARTS 32
#define PROMPT_STEPS (PROMPT_KEY / 16 / 2)  // products of a half of the columns
#define WEIGHTS_STRIDE (TILE + 8)

struct PromptArgs {
  AttendArgs attend;
  u16* weights;          // [tokens][heads / 64][tiles][high, low][64][TILE]
  u32 num_tokens, max_tiles;  // at most so many tiles a row
};

// PAIR: a part is two tiles. `slots`: of the row's keys; `largest`, `sums`, `olds`: [parts][heads].
template <bool PAIR> DEVICE void prompt_row(const PromptArgs& args, u32 t, u32 count, u32 first, u8* shared) {
  const AttendArgs& a = args.attend;
  constexpr u32 T = PAIR ? 2 : 1, S = TILE + 1;
  u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, pair = lane % 4, head = blockIdx.y * PROMPT_HEADS;
  u32 tiles = (count + TILE - 1) / TILE, parts = (tiles + T - 1) / T;
  u16* keys = (u16*)shared;                                          // three tiles of keys; later four of values
  u16* weights = keys + 4 * TILE * PROMPT_VALUE_STRIDE;              // four tiles [high, low][heads][WEIGHTS_STRIDE]
  float* scores = (float*)weights;                                   // before: [halves of the columns][heads][S]
  float* largest = (float*)(weights + 4 * 2 * PROMPT_HEADS * WEIGHTS_STRIDE);
  float* sums = largest + PROMPT_PARTS * PROMPT_HEADS;
  float* olds = sums + PROMPT_PARTS * PROMPT_HEADS;
  u32* slots = (u32*)(olds + PROMPT_PARTS * PROMPT_HEADS);
  u32 keys_at = (u32)__cvta_generic_to_shared(keys), weights_at = (u32)__cvta_generic_to_shared(weights);
  const u32* table = a.paging.block_table + (u64)a.paging.sequences[t] * a.paging.max_blocks;
  for (u32 i = threadIdx.x; i < count; i += blockDim.x) {
    u32 p = a.index_ids ? a.index_ids[(u64)t * a.index_stride + i] : first + i;
    slots[i] = table[p / a.paging.block_size] * a.paging.block_size + p % a.paging.block_size;
  }
  __syncthreads();
  // Others than the row's keys are zeros: their weight is zero, and zero times what lies there may be no number.
  auto copy_rows = [&](u32 tile, u32 slot, u32 stride, u32 columns) {
    if (tile < tiles) {
      for (u32 k = warp; k < TILE; k += 8) {
        bool valid = tile * TILE + k < count;
        const u16* from = (const u16*)a.cache + (valid ? (u64)slots[tile * TILE + k] * a.cache_width + a.key_first : 0);
        for (u32 c = lane * 8; c < columns; c += 256)
          asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(keys_at + ((slot * TILE + k) * stride + c) * 2), "l"(from + c), "r"(valid ? 16 : 0));
      }
    }
  };
  auto copy_keys = [&](u32 tile) {
    copy_rows(tile, tile % 3, PROMPT_STRIDE, PROMPT_KEY);
    asm volatile("cp.async.commit_group;");
  };
  u16* memory = args.weights + ((u64)(t * gridDim.y + blockIdx.y) * args.max_tiles) * (2 * PROMPT_HEADS * TILE);
  {
    copy_keys(0);
    copy_keys(1);
    // A warp has the queries of 16 heads and half of the columns.
    u32 rows = warp % 4 * 16, half = warp / 4;
    u32 q[PROMPT_STEPS][2][4];
#pragma unroll
    for (int s = 0; s < PROMPT_STEPS; s++)
#pragma unroll
      for (int k = 0; k < 4; k++) {
        u32 h = head + rows + g + 8 * (k & 1), c = (half * PROMPT_STEPS + s) * 16 + 8 * (k >> 1) + 2 * pair;
        float2 x = *(const float2*)(c < PROMPT_VALUE ? a.q.p + (u64)t * a.q.stride + h * PROMPT_VALUE + c : a.q_rope.p + (u64)t * a.q_rope.stride + h * a.q_rope_stride + (c - PROMPT_VALUE));
        q[s][0][k] = pack_bf16(x.x, x.y);
        q[s][1][k] = pack_bf16(x.x - __uint_as_float(q[s][0][k] << 16), x.y - __uint_as_float(q[s][0][k] & 0xffff0000u));
      }
    float m[8], l[8], top[8];
#pragma unroll
    for (int i = 0; i < 8; i++) { m[i] = top[i] = -INFINITY; l[i] = 0.f; }
    for (u32 tile = 0; tile < tiles; tile++) {
      asm volatile("cp.async.wait_group 1;" ::: "memory");
      __syncthreads();
      copy_keys(tile + 2);
      u32 at = keys_at + ((tile % 3 * TILE + lane / 16 * 8 + lane % 8) * PROMPT_STRIDE + half * PROMPT_STEPS * 16 + lane / 8 % 2 * 8) * 2;
      float high[4][4] = {}, low[4][4] = {};
#pragma unroll
      for (int s = 0; s < PROMPT_STEPS; s++) {
        u32 b[2][4];
        ldmatrix4(b[0], at + s * 32);
        ldmatrix4(b[1], at + 16 * PROMPT_STRIDE * 2 + s * 32);
#pragma unroll
        for (int n = 0; n < 4; n++) {
          mma_bf16(high[n], q[s][0], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
          mma_bf16(low[n], q[s][1], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
        }
      }
      float* to = scores + (half * PROMPT_HEADS + rows + g) * S + 2 * pair;
#pragma unroll
      for (int n = 0; n < 4; n++)
#pragma unroll
        for (int k = 0; k < 4; k++) to[8 * (k >> 1) * S + n * 8 + (k & 1)] = high[n][k] + low[n][k];
      __syncthreads();
      // A warp has eight heads, a lane a key.
      u16* w = memory + (u64)tile * (2 * PROMPT_HEADS * TILE) + lane;
#pragma unroll
      for (int i = 0; i < 8; i++) {
        u32 h = 8 * warp + i;
        float s = (scores[h * S + lane] + scores[(PROMPT_HEADS + h) * S + lane]) * a.scale;
        s = tile * TILE + lane < count ? s : -INFINITY;
        if (tile % T == 0) { m[i] = -INFINITY; l[i] = 0.f; }
        float m_new = fmaxf(m[i], warp_max(s)), p = expf(s - m_new), old = expf(m[i] - m_new);
        m[i] = m_new;
        l[i] = l[i] * old + warp_sum(p);
        u16 high_part, low_part;
        split_bf16(p, high_part, low_part);
        w[h * TILE] = high_part;
        w[(PROMPT_HEADS + h) * TILE] = low_part;
        if (lane == 0) {
          largest[tile / T * PROMPT_HEADS + h] = m_new;
          sums[tile / T * PROMPT_HEADS + h] = l[i];
          if (PAIR) olds[tile / T * PROMPT_HEADS + h] = old;
        }
        if (tile % T == T - 1 || tile == tiles - 1) top[i] = fmaxf(top[i], m_new);
      }
    }
    // What each part counts: exp(its largest score - that of all).
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 8; i++)
      for (u32 s = lane; s < parts; s += 32) largest[s * PROMPT_HEADS + 8 * warp + i] = expf(largest[s * PROMPT_HEADS + 8 * warp + i] - top[i]);
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    __threadfence();
    __syncthreads();
    if (threadIdx.x < PROMPT_HEADS) {
      float l = 0.f;
#pragma unroll 4
      for (u32 s = 0; s < parts; s++) l = fmaf(sums[s * PROMPT_HEADS + threadIdx.x], largest[s * PROMPT_HEADS + threadIdx.x], l);
      sums[threadIdx.x] = l;
    }
  }
  // Values: a warp has 64 columns of all heads.
  float out[4][8][4] = {};
  auto copy_part = [&](u32 part) {
    if (part < parts) {
#pragma unroll
      for (u32 i = 0; i < T; i++) {
        u32 tile = part * T + i;
        copy_rows(tile, tile % 4, PROMPT_VALUE_STRIDE, PROMPT_VALUE);
        if (tile < tiles) {
          const u16* from = memory + (u64)tile * (2 * PROMPT_HEADS * TILE);
          for (u32 piece = threadIdx.x; piece < 2 * PROMPT_HEADS * TILE / 8; piece += 256)
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(weights_at + ((tile % 4 * 2 * PROMPT_HEADS + piece / 4) * WEIGHTS_STRIDE + piece % 4 * 8) * 2), "l"(from + piece * 8));
        }
      }
    }
    asm volatile("cp.async.commit_group;");
  };
  // A part is multiplied while the next is on its way.
  copy_part(0);
  for (u32 part = 0; part < parts; part++) {
    copy_part(part + 1);
    asm volatile("cp.async.wait_group 1;" ::: "memory");
    __syncthreads();
    bool both = PAIR && part * 2 + 1 < tiles;
#pragma unroll
    for (int two = 0; two < 2; two++) {
      u32 w[T][2][2][2][4];  // [tile][high, low][16 heads][16 keys]
#pragma unroll
      for (u32 i = 0; i < T; i++)
#pragma unroll
        for (int x = 0; x < 2; x++)
#pragma unroll
          for (int r = 0; r < 2; r++)
#pragma unroll
            for (int s = 0; s < 2; s++)
              ldmatrix4(w[i][x][r][s], weights_at + (((((part * T + i) % 4) * 2 + x) * PROMPT_HEADS + two * 32 + r * 16 + lane % 16) * WEIGHTS_STRIDE + s * 16 + lane / 16 * 8) * 2);
      float weight[2][2], old[2][2];
#pragma unroll
      for (int r = 0; r < 2; r++)
#pragma unroll
        for (int k = 0; k < 2; k++) {
          u32 h = part * PROMPT_HEADS + two * 32 + r * 16 + g + 8 * k;
          weight[r][k] = largest[h];
          old[r][k] = PAIR ? olds[h] : 0.f;
        }
#pragma unroll
      for (int n = 0; n < 8; n++) {
        float sum[2][4] = {};
#pragma unroll
        for (u32 i = 0; i < T; i++) {
          if (i == 1 && !both) break;
          u32 b[4];
          ldmatrix4_transposed(b, keys_at + (((part * T + i) % 4 * TILE + lane) * PROMPT_VALUE_STRIDE + warp * 64 + n * 8) * 2);
#pragma unroll
          for (int r = 0; r < 2; r++) {
            if (i == 1)
#pragma unroll
              for (int k = 0; k < 4; k++) sum[r][k] *= old[r][k >> 1];
#pragma unroll
            for (int s = 0; s < 2; s++) {
              mma_bf16(sum[r], w[i][0][r][s], b[2 * s], b[2 * s + 1]);
              mma_bf16(sum[r], w[i][1][r][s], b[2 * s], b[2 * s + 1]);
            }
          }
        }
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
          for (int k = 0; k < 4; k++) out[two * 2 + r][n][k] = fmaf(sum[r][k], weight[r][k >> 1], out[two * 2 + r][n][k]);
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int r = 0; r < 4; r++)
#pragma unroll
    for (int k = 0; k < 2; k++) {
      u32 h = r * 16 + g + 8 * k;
      float l = sums[h];
      u64 row = (u64)t * a.out.stride + (head + h) * PROMPT_VALUE + warp * 64 + 2 * pair;
#pragma unroll
      for (int n = 0; n < 8; n++) {
        float2 x = make_float2(out[r][n][2 * k] / l, out[r][n][2 * k + 1] / l);
        *(float2*)(a.out.p + row + n * 8) = x;
        if (a.out.twin) *(u32*)(a.out.twin + row + n * 8) = pack_bf16(x.x, x.y);
      }
    }
}
// Grid: (tokens, the longest rows first; heads / 64).
KERNEL __launch_bounds__(256, 1) attend_prompt(const __grid_constant__ PromptArgs args) {
  extern __shared__ __align__(16) u8 prompt_shared[];
  pdl_launch();
  pdl_wait();
  u32 t = args.num_tokens - 1 - blockIdx.x, first, count;
  keys_of(args.attend, t, first, count);
  if (split_of(count) == TILE) prompt_row<false>(args, t, count, first, prompt_shared);
  else prompt_row<true>(args, t, count, first, prompt_shared);
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
