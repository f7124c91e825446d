// Latent attention for the rows of a prompt on Hopper: two blocks a row, the tensor cores' own instruction (wgmma), each key read once.
//
// The two blocks of a cluster have a row and 64 heads. Each has half of a key's columns for scores, whose queries stay in registers (one warpgroup
// has their high, one their low parts), and half of the values' columns. Scores of 64 keys are added through shared memory, then with those
// of the other block through its shared memory; every warp makes the weights of its 16 heads from them, in the registers from which they are
// multiplied. Sums of a part of the keys are added to the row's own as `join8` does: the largest score is a whole power of two
// (attend.cuh), so the row has the bits that `attend_mla` and `attend_join` give it, though nobody knows the largest score of all yet.
//
// Only on GPUs with wgmma (sm_90a), for the shapes of GLM and DeepSeek-V3, and up to 4096 keys (a part is 32 keys or 64); others have `attend_mla`.
#include "attend.cuh"
#include "barriers.cuh"
#include "wgmma.cuh"

struct PromptArgs {
  AttendArgs attend;
  u32 num_tokens, pad;
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

#define HEADS 64
#define KEY 576     // columns of a key
#define VALUE 512
#define HALF 288    // columns of a block's scores
#define TILE 64     // keys
#define STEPS 18    // products of a block's scores
#define PIECE 8192  // bytes of 64 columns of a tile: [key][128 bytes, swizzled]
#define STAGE (5 * PIECE)
#define STAGES 4
// Shared memory: stages of keys; what the other warpgroup adds to scores; the block's scores; those of the other block, for two tiles.
#define GIVEN (STAGES * STAGE)
#define OWN (GIVEN + 16384)
#define OTHER (OWN + 16384)
#define SHARED_BYTES (OTHER + 32768)
#define MULTIPLIERS 256
#define THREADS (MULTIPLIERS + 128)

DEVICE u32 cluster_address(u32 at, u32 rank) {
  u32 there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(rank));
  return there;
}
DEVICE void cluster_sync() { asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory"); }
// Stores into the other block's shared memory, and counts the bytes at a barrier there.
DEVICE void send(u32 to, const float v[4], u32 bar) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1,%2,%3,%4}, [%5];"
      ::"r"(to), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "r"(bar) : "memory");
}
// Waits for what the other block sent as well.
DEVICE void barrier_wait_cluster(u32 bar, u32 parity) {
  u32 done = 0;
  while (!done)
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }" : "=r"(done) : "r"(bar), "r"(parity) : "memory");
}
DEVICE void store4(u32 at, const float v[4]) { asm volatile("st.shared.v4.f32 [%0], {%1,%2,%3,%4};" ::"r"(at), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]) : "memory"); }
DEVICE float4 load4(u32 at) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(at) : "memory");
  return v;
}

// A row: which keys it has, and where in its cluster the block is.
struct PromptRow { u32 t, head, first, count, tiles, rank; };

// The warps that copy: keys of a tile into stages that all who multiply have left. A warp has 16 keys, eight lanes one.
DEVICE void copy_keys(const AttendArgs& a, const PromptRow& row, u32 stages, u32 bar) {
  u32 warp = threadIdx.x / 32 - MULTIPLIERS / 32, lane = threadIdx.x % 32;
  const u32* table = a.paging.block_table + (u64)a.paging.sequences[row.t] * a.paging.max_blocks;
  auto position = [&](u32 tile) {
    u32 i = tile * TILE + warp * 16 + lane % 16;
    if (i >= row.count) return 0xffffffffu;
    return a.index_ids ? a.index_ids[(u64)row.t * a.index_stride + i] : row.first + i;
  };
  auto slot_of = [&](u32 p) { return p == 0xffffffffu ? p : table[p / a.paging.block_size] * a.paging.block_size + p % a.paging.block_size; };
  auto arrive = [&](u32 tile) {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    warp_arrives(bar + 8 * (tile % STAGES));
  };
  // Places of the next tile's keys are asked for while those of this one are used.
  u32 slots = slot_of(position(0)), next = position(1);
  const u16* cache = (const u16*)a.cache + a.key_first + row.rank * 256 + lane % 8 * 8;
  for (u32 tile = 0; tile < row.tiles; tile++) {
    u32 now = slots, stage = stages + tile % STAGES * STAGE;
    slots = slot_of(next);
    next = position(tile + 2);
    barrier_wait(bar + 8 * (STAGES + tile % STAGES), ~(tile / STAGES) & 1);
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
      u32 key = i * 4 + lane / 8, slot = __shfl_sync(0xffffffffu, now, key);
      // Others than the row's keys are zeros: their weight is zero, and zero times what lies there may be no number.
      u32 bytes = slot == 0xffffffffu ? 0 : 16;
      const u16* from = cache + (bytes ? (u64)slot * a.cache_width : 0);
      u32 to = stage + (warp * 16 + key) * 128 + ((lane % 8) ^ (key & 7)) * 16;
#pragma unroll
      for (u32 b = 0; b < 5; b++)
        if (b < 4 || row.rank || lane % 8 < 4)
          asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to + b * PIECE), "l"(from + b * 64), "r"(bytes));
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
    if (tile) {
      asm volatile("cp.async.wait_group 1;" ::: "memory");
      arrive(tile - 1);
    }
  }
  asm volatile("cp.async.wait_group 0;" ::: "memory");
  arrive(row.tiles - 1);
}

// What a warp that multiplies knows.
struct Multiplier {
  u32 q[STEPS][4];       // queries of 16 heads, half of their columns: the high or the low parts
  u32 stages, bar;       // shared memory
  u32 sums, other;       // this thread's places there, and the other block's for its sums
  u32 sums_bar, other_bar;
  u32 wg, warp, lane;
};

// The queries of a lane: of the heads g and g + 8 of its warp's.
DEVICE void load_queries(Multiplier& m, const AttendArgs& a, const PromptRow& row) {
  u32 g = m.lane / 4, pair = m.lane % 4;
#pragma unroll
  for (u32 s = 0; s < STEPS; s++)
#pragma unroll
    for (u32 k = 0; k < 4; k++) {
      u32 h = row.head + m.warp * 16 + g + 8 * (k & 1), c = row.rank * HALF + s * 16 + 8 * (k >> 1) + 2 * pair;
      const float* from = c < VALUE ? a.q.p + (u64)row.t * a.q.stride + h * VALUE + c : a.q_rope.p + (u64)row.t * a.q_rope.stride + h * a.q_rope_stride + (c - VALUE);
      float2 x = *(const float2*)from;
      u32 high = pack_bf16(x.x, x.y);
      m.q[s][k] = m.wg ? pack_bf16(x.x - __uint_as_float(high << 16), x.y - __uint_as_float(high & 0xffff0000u)) : high;
    }
}

// Starts a tile's scores: 64 heads, the keys of a stage.
DEVICE void start_scores(float d[32], const Multiplier& m, u32 tile, u32 rank) {
  barrier_wait(m.bar + 8 * (tile % STAGES), tile / STAGES & 1);
  // The second block's columns start in the middle of a piece.
  u32 at = m.stages + tile % STAGES * STAGE;
  u64 lower = descriptor(at + (rank ? 64 : 0)), upper = descriptor(at + (rank ? PIECE - 64 : 0));
  wgmma_fence();
#pragma unroll
  for (int s = 0; s < STEPS; s++) wgmma_bf16<false>(d, m.q[s], (s & 2 ? upper : lower) + (s / 4 * (PIECE / 16) + s % 4 * 2), s > 0);
  wgmma_commit();
}

// Adds high and low parts, each warpgroup for half of the keys, and gives the sums to the warps of both blocks that have the same heads.
DEVICE void send_scores(const float d[32], const Multiplier& m, u32 tile) {
  u32 mine = m.wg * 16;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float v[4];
#pragma unroll
    for (int k = 0; k < 4; k++) v[k] = m.wg ? d[4 * i + k] : d[16 + 4 * i + k];
    store4(m.sums - (OWN - GIVEN) + m.wg * 8192 + i * 2048, v);
  }
  asm volatile("bar.sync %0, 64;" ::"r"(1 + m.warp) : "memory");
  u32 bar = m.sums_bar + tile % 2 * 32, other_bar = m.other_bar + tile % 2 * 32, other = m.other + tile % 2 * 16384;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float4 x = load4(m.sums - (OWN - GIVEN) + (1 - m.wg) * 8192 + i * 2048);
    float v[4];
    const float y[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int k = 0; k < 4; k++) v[k] = (m.wg ? d[16 + 4 * i + k] : d[4 * i + k]) + y[k];
    store4(m.sums + (mine / 4 + i) * 2048, v);
    send(other + (mine / 4 + i) * 2048, v, other_bar);
  }
  __syncwarp();
  if (m.lane == 0) asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(2048) : "memory");
}
// All scores of a lane: 64 keys, two heads.
DEVICE void receive_scores(float s[32], const Multiplier& m, u32 tile) {
  barrier_wait_cluster(m.sums_bar + tile % 2 * 32, tile / 2 & 1);
#pragma unroll
  for (int i = 0; i < 8; i++) {
    float4 x = load4(m.sums + i * 2048), y = load4(m.sums + (OTHER - OWN) + tile % 2 * 16384 + i * 2048);
    s[4 * i] = x.x + y.x; s[4 * i + 1] = x.y + y.y; s[4 * i + 2] = x.z + y.z; s[4 * i + 3] = x.w + y.w;
  }
}

// A row's state in a lane, for its two heads.
struct Running { float from[2], sum[2]; };  // what scores are counted from; the sum of weights

// The sum of 32 keys' weights, of row `r`, in the order of warp_sum with a key a lane.
DEVICE float sum_of(const float* p, int r) {
  float x[2];
#pragma unroll
  for (int e = 0; e < 2; e++) {
    x[e] = (p[2 * r + e] + p[8 + 2 * r + e]) + (p[4 + 2 * r + e] + p[12 + 2 * r + e]);
    x[e] += __shfl_xor_sync(0xffffffffu, x[e], 2);
    x[e] += __shfl_xor_sync(0xffffffffu, x[e], 1);
  }
  return x[0] + x[1];
}
// Scores of a tile become weights, as attend_mla makes them; [0] and [1] of the results: parts of 32 keys, or (PAIR) [0]: of the tile.
template <bool PAIR> DEVICE void weights_of(float s[32], float scale, Running& run, float counts[2][2], float olds[2][2]) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float from[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float x = -INFINITY;
#pragma unroll
      for (int n = 0; n < 4; n++) x = fmaxf(x, fmaxf(s[16 * i + 4 * n + 2 * r], s[16 * i + 4 * n + 2 * r + 1]));
      x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
      x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
      from[i] = ceilf(x * scale);
    }
    // No keys there, or (PAIR) counted on from the first half.
    if (PAIR || from[1] == -INFINITY) from[1] = fmaxf(from[0], from[1]);
    float old = PAIR ? power_of_two(from[0] - from[1]) : 1.f, part[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
      for (int n = 0; n < 4; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float& x = s[16 * i + 4 * n + 2 * r + e];
          x = exp2_of(fmaf(x, scale, -from[i]));
          if (PAIR && i == 0) x *= old;
        }
      part[i] = sum_of(s + 16 * i, r);
    }
    if (PAIR) { part[0] += part[1]; from[0] = from[1]; }
#pragma unroll
    for (int i = 0; i < (PAIR ? 1 : 2); i++) {
      float now = fmaxf(run.from[r], from[i]), rescale = power_of_two(run.from[r] - now), count = power_of_two(from[i] - now);
      run.from[r] = now;
      run.sum[r] = fmaf(part[i], count, run.sum[r] * rescale);
      counts[i][r] = count;
      olds[i][r] = rescale;
    }
  }
}
// Weights as sums of two bfloat16: w[high, low][16 keys].
DEVICE void split_weights(u32 w[2][4][4], const float s[32]) {
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int k = 0; k < 4; k++) {
      float x = s[8 * i + 2 * k], y = s[8 * i + 2 * k + 1];
      u32 high = pack_bf16(x, y);
      w[0][i][k] = high;
      w[1][i][k] = pack_bf16(x - __uint_as_float(high << 16), y - __uint_as_float(high & 0xffff0000u));
    }
}
// The products of a tile's weights with 128 columns of its values, in turn: of 64 columns and a part (32 keys, or PAIR: all).
template <bool PAIR> struct Values {
  static constexpr int TURNS = PAIR ? 2 : 4;
  // Starts turn i.
  static METHOD void start(float d[32], const u32 w[2][4][4], u64 values, int i) {
    int c = PAIR ? i : i / 2, first = PAIR ? 0 : i % 2 * 2;
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < (PAIR ? 4 : 2); k++) {
      u64 at = values + (c * (PIECE / 16) + (first + k) * 128);
      wgmma_bf16<true>(d, w[0][first + k], at, k > 0);
      wgmma_bf16<true>(d, w[1][first + k], at, 1);
    }
    wgmma_commit();
  }
  // out = out * old + count * sums of turn i.
  static METHOD void add(float out[2][32], const float d[32], const float counts[2][2], const float olds[2][2], int i) {
    int c = PAIR ? i : i / 2, part = PAIR ? 0 : i % 2;
#pragma unroll
    for (int k = 0; k < 32; k++) out[c][k] = fmaf(d[k], counts[part][k >> 1 & 1], out[c][k] * olds[part][k >> 1 & 1]);
  }
};

template <bool PAIR> DEVICE void multiply(Multiplier& m, const AttendArgs& a, const PromptRow& row) {
  u32 g = m.lane / 4, pair = m.lane % 4;
  load_queries(m, a, row);
  float scale = a.scale * LOG2_E, out[2][32] = {}, counts[2][2], olds[2][2];
  Running run = {{-INFINITY, -INFINITY}, {0.f, 0.f}};
  u32 w[2][4][4];
  typedef Values<PAIR> V;
  float d[32];
  start_scores(d, m, 0, row.rank);
  wgmma_wait<0>(d);
  send_scores(d, m, 0);
  for (u32 tile = 0; tile < row.tiles; tile++) {
    u64 values = descriptor(m.stages + tile % STAGES * STAGE + m.wg * 2 * PIECE);
    float s[32];
    receive_scores(s, m, tile);
    if (tile + 1 < row.tiles) {
      start_scores(d, m, tile + 1, row.rank);
      weights_of<PAIR>(s, scale, run, counts, olds);
      split_weights(w, s);
      wgmma_wait<0>(d);
      send_scores(d, m, tile + 1);
    } else {
#pragma unroll
      for (int i = 0; i < 32; i++)
        if (tile * TILE + i / 4 * 8 + 2 * pair + (i & 1) >= row.count) s[i] = -INFINITY;
      weights_of<PAIR>(s, scale, run, counts, olds);
      split_weights(w, s);
    }
#pragma unroll
    for (int i = 0; i < V::TURNS; i++) {
      V::start(d, w, values, i);
      wgmma_wait<0>(d);
      V::add(out, d, counts, olds, i);
    }
    warp_arrives(m.bar + 8 * (STAGES + tile % STAGES));
  }
#pragma unroll
  for (int r = 0; r < 2; r++) {
    u64 at = (u64)row.t * a.out.stride + (row.head + m.warp * 16 + g + 8 * r) * VALUE + row.rank * 256 + m.wg * 128 + 2 * pair;
#pragma unroll
    for (int c = 0; c < 2; c++)
#pragma unroll
      for (int n = 0; n < 8; n++) {
        float2 x = make_float2(out[c][4 * n + 2 * r] / run.sum[r], out[c][4 * n + 2 * r + 1] / run.sum[r]);
        *(float2*)(a.out.p + at + c * 64 + n * 8) = x;
        if (a.out.twin) *(u32*)(a.out.twin + at + c * 64 + n * 8) = pack_bf16(x.x, x.y);
      }
  }
}

// Grid: (two blocks for each token, the longest rows first; heads / 64).
KERNEL __cluster_dims__(2, 1, 1) __launch_bounds__(THREADS, 1) attend_prompt(const __grid_constant__ PromptArgs args) {
  extern __shared__ __align__(1024) u8 shared[];
  __shared__ __align__(8) u64 bars[2 * STAGES + 8];
  pdl_launch();
  const AttendArgs& a = args.attend;
  u32 stages = (u32)__cvta_generic_to_shared(shared), bar = (u32)__cvta_generic_to_shared(bars), sums_bar = bar + 16 * STAGES;
  u32 warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  if (threadIdx.x == 0) {
#pragma unroll
    for (int s = 0; s < STAGES; s++) {
      barrier_init(bar + 8 * s, 4 * WARP_ARRIVALS);
      barrier_init(bar + 8 * (STAGES + s), 8 * WARP_ARRIVALS);
    }
#pragma unroll
    for (int i = 0; i < 8; i++) barrier_init(sums_bar + 8 * i, 2);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  cluster_sync();
  pdl_wait();
  PromptRow row;
  row.t = args.num_tokens - 1 - blockIdx.x / 2;
  row.rank = blockIdx.x % 2;
  row.head = blockIdx.y * HEADS;
  keys_of(a, row.t, row.first, row.count);
  row.tiles = (row.count + TILE - 1) / TILE;
  if (warp >= MULTIPLIERS / 32) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    copy_keys(a, row, stages, bar);
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
  Multiplier m;
  m.stages = stages; m.bar = bar; m.wg = warp / 4; m.warp = warp % 4; m.lane = threadIdx.x % 32;
  m.sums = stages + OWN + threadIdx.x % 128 * 16;
  m.other = cluster_address(stages + OTHER + threadIdx.x % 128 * 16, 1 - row.rank);
  m.sums_bar = sums_bar + 8 * m.warp;
  m.other_bar = cluster_address(m.sums_bar, 1 - row.rank);
  if (split_of(row.count) == 32) multiply<false>(m, a, row);
  else multiply<true>(m, a, row);
}
#endif
