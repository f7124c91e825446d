// Latent attention for the rows of a prompt on Hopper: two blocks a row, the tensor cores' own instruction (wgmma), each key read once.
//
// The two blocks of a cluster have a row and 64 heads: each has half of a key's columns for scores, and half of the values' columns. One warpgroup multiplies the
// high parts of the queries, the other their low parts. Each adds both for half of a tile's keys, sends the sums to the other block, which has those of the other
// columns, and makes their weights; the two exchange weights, in the registers from which they are multiplied with values. Sums of a part of the
// keys are added to the row's own as `join8` does: what scores are counted from is a whole power of two (attend.cuh), so the row has the bits that
// `attend_mla` and `attend_join` give it, though nobody knows the largest score of all yet.
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
#define STAGES 3
// Shared memory: stages of keys (before, the row's queries behind the first one); then what a thread leaves for that of the other warpgroup with the same heads:
// parts of scores, weights, and what is known about them; scores of the other block, for two tiles.
#define GIVEN (STAGES * STAGE)
#define WEIGHTS (GIVEN + 16384)
#define ABOUT (WEIGHTS + 16384)
#define OTHER (ABOUT + 4096)
#define SHARED_BYTES (OTHER + 32768)
#define QUERY_STRIDE 296  // floats between two heads' queries, for different banks
#define MULTIPLIERS 256
#define THREADS (MULTIPLIERS + 128)

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
DEVICE void load4(float v[4], u32 at) { asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3]) : "r"(at) : "memory"); }
DEVICE void store4(u32 at, const u32 v[4]) { asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(at), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]) : "memory"); }
DEVICE void load4(u32 v[4], u32 at) { asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(at) : "memory"); }

// A row: which keys it has, and where in its cluster the block is.
struct PromptRow { u32 t, head, first, count, tiles, rank; };

// Stages behind the first one hold queries until all warps that multiply have read theirs.
DEVICE void queries_read() { asm volatile("bar.sync 15, %0;" ::"n"(THREADS) : "memory"); }
DEVICE void multipliers_sync() { asm volatile("bar.sync 14, %0;" ::"n"(MULTIPLIERS) : "memory"); }

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
    if (tile == 1) queries_read();
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
  if (row.tiles == 1) queries_read();
}

// What a warp that multiplies knows.
struct Multiplier {
  u32 q[STEPS][4];       // queries of 16 heads, the block's columns: the high or the low parts
  u32 stages, bar;       // shared memory
  u32 mine, other;       // this thread's places there (from GIVEN on), and in the other block
  u32 scores_bar, other_bar;
  u32 wg, warp, lane;
};

// The row's queries of the block's columns, through shared memory: all of them are on their way at once.
DEVICE void load_queries(Multiplier& m, const AttendArgs& a, const PromptRow& row) {
  u32 g = m.lane / 4, pair = m.lane % 4, at = m.stages + STAGE;
#pragma unroll
  for (u32 i = 0; i < HEADS * HALF / 4 / MULTIPLIERS; i++) {
    u32 piece = i * MULTIPLIERS + threadIdx.x, h = piece / (HALF / 4), local = piece % (HALF / 4) * 4, c = row.rank * HALF + local;
    const float* from = c < VALUE ? a.q.p + (u64)row.t * a.q.stride + (row.head + h) * VALUE + c : a.q_rope.p + (u64)row.t * a.q_rope.stride + (row.head + h) * a.q_rope_stride + (c - VALUE);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at + (h * QUERY_STRIDE + local) * 4), "l"(from));
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
  multipliers_sync();
#pragma unroll
  for (u32 s = 0; s < STEPS; s++)
#pragma unroll
    for (u32 k = 0; k < 4; k++) {
      float x, y;
      u32 h = m.warp * 16 + g + 8 * (k & 1), c = s * 16 + 8 * (k >> 1) + 2 * pair;
      asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(x), "=f"(y) : "r"(at + (h * QUERY_STRIDE + c) * 4) : "memory");
      u32 high = pack_bf16(x, y);
      m.q[s][k] = m.wg ? pack_bf16(x - __uint_as_float(high << 16), y - __uint_as_float(high & 0xffff0000u)) : high;
    }
  queries_read();
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

// The barrier of two warps with the same heads, one of each warpgroup.
DEVICE void partners_sync(const Multiplier& m) { asm volatile("bar.sync %0, 64;" ::"r"(1 + m.warp) : "memory"); }

// Adds high and low parts, each warpgroup for its half of the keys, and gives the sums to the other block.
DEVICE void send_scores(float sums[16], const float d[32], const Multiplier& m, u32 tile) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float v[4];
#pragma unroll
    for (int k = 0; k < 4; k++) v[k] = m.wg ? d[4 * i + k] : d[16 + 4 * i + k];
    store4(m.mine + m.wg * 8192 + i * 2048, v);
  }
  partners_sync(m);
  u32 bar = tile % 2 * 64, other = m.other + tile % 2 * 16384;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float x[4];
    load4(x, m.mine + (1 - m.wg) * 8192 + i * 2048);
#pragma unroll
    for (int k = 0; k < 4; k++) sums[4 * i + k] = (m.wg ? d[16 + 4 * i + k] : d[4 * i + k]) + x[k];
    send(other + i * 2048, sums + 4 * i, m.other_bar + bar);
  }
  if (m.lane == 0) asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(m.scores_bar + bar), "r"(2048) : "memory");
}
// The scores of a lane: 32 keys, two heads.
DEVICE void receive_scores(float sums[16], const Multiplier& m, u32 tile) {
  barrier_wait_cluster(m.scores_bar + tile % 2 * 64, tile / 2 & 1);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float x[4];
    load4(x, m.mine + (OTHER - GIVEN) + tile % 2 * 16384 + m.wg * 8192 + i * 2048);
#pragma unroll
    for (int k = 0; k < 4; k++) sums[4 * i + k] += x[k];
  }
}

// A row's state in a lane, for its two heads.
struct Running { float from[2], sum[2], old[2]; };  // what scores are counted from; the sum of weights; what sums so far count for behind the next tile

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
// Scores of 32 keys become weights, as attend_mla makes them, each the sum of two bfloat16: w[high, low][16 keys]; about: what they are counted from, and their sums.
DEVICE void weights_of(u32 w[2][2][4], float about[4], float s[16], float scale) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float x = -INFINITY;
#pragma unroll
    for (int n = 0; n < 4; n++) x = fmaxf(x, fmaxf(s[4 * n + 2 * r], s[4 * n + 2 * r + 1]));
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
    about[r] = fmaxf(ceilf(x * scale), -1e30f);  // without a key: no infinity, which would make no number
#pragma unroll
    for (int n = 0; n < 4; n++)
#pragma unroll
      for (int e = 0; e < 2; e++) s[4 * n + 2 * r + e] = exp2_of(fmaf(s[4 * n + 2 * r + e], scale, -about[r]));
    about[2 + r] = sum_of(s, r);
  }
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int k = 0; k < 4; k++) {
      float x = s[8 * i + 2 * k], y = s[8 * i + 2 * k + 1];
      u32 high = pack_bf16(x, y);
      w[0][i][k] = high;
      w[1][i][k] = pack_bf16(x - __uint_as_float(high << 16), y - __uint_as_float(high & 0xffff0000u));
    }
}
// Both warpgroups' weights of a tile, counted from the largest score so far: w[half][high, low][16 keys].
template <bool PAIR> DEVICE void join_weights(u32 w[2][2][2][4], const u32 mine[2][2][4], const float about_mine[4], Running& run, const Multiplier& m) {
#pragma unroll
  for (int i = 0; i < 4; i++) store4(m.mine + (WEIGHTS - GIVEN) + m.wg * 8192 + i * 2048, mine[i / 2][i % 2]);
  store4(m.mine + (ABOUT - GIVEN) + m.wg * 2048, about_mine);
  partners_sync(m);
  u32 theirs[2][2][4];
  float about_theirs[4];
#pragma unroll
  for (int i = 0; i < 4; i++) load4(theirs[i / 2][i % 2], m.mine + (WEIGHTS - GIVEN) + (1 - m.wg) * 8192 + i * 2048);
  load4(about_theirs, m.mine + (ABOUT - GIVEN) + (1 - m.wg) * 2048);
  u32 factor[2][2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float from[2], sum[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      bool own = m.wg == h;
      from[h] = own ? about_mine[r] : about_theirs[r];
      sum[h] = own ? about_mine[2 + r] : about_theirs[2 + r];
    }
    float now = fmaxf(run.from[r], fmaxf(from[0], from[1]));
    run.old[r] = power_of_two(run.from[r] - now);
    run.from[r] = now;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float count = power_of_two(from[h] - now);
      sum[h] *= count;
      factor[h][r] = pack_bf16(count, count);
    }
    run.sum[r] *= run.old[r];
    run.sum[r] = PAIR ? run.sum[r] + (sum[0] + sum[1]) : run.sum[r] + sum[0] + sum[1];
  }
#pragma unroll
  for (int h = 0; h < 2; h++)
#pragma unroll
    for (int p = 0; p < 2; p++)
#pragma unroll
      for (int i = 0; i < 2; i++)
#pragma unroll
        for (int k = 0; k < 4; k++) w[h][p][i][k] = fma_bf16x2(m.wg == h ? mine[p][i][k] : theirs[p][i][k], factor[h][k & 1], 0x80008000u);
}
// The products of a tile's weights with 128 columns of its values, in turn: of 64 columns and a part (32 keys, or PAIR: all).
template <bool PAIR> struct Values {
  static constexpr int TURNS = PAIR ? 2 : 4;
  // Starts turn i.
  static METHOD void start(float d[32], const u32 w[2][2][2][4], u64 values, int i) {
    int c = PAIR ? i : i / 2, first = PAIR ? 0 : i % 2 * 2;
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < (PAIR ? 4 : 2); k++) {
      u64 at = values + (c * (PIECE / 16) + (first + k) * 128);
      wgmma_bf16<true>(d, w[(first + k) / 2][0][k % 2], at, k > 0);
      wgmma_bf16<true>(d, w[(first + k) / 2][1][k % 2], at, 1);
    }
    wgmma_commit();
  }
  // Adds the sums of turn i to those so far.
  static METHOD void add(float out[2][32], const float d[32], const float old[2], int i) {
    int c = PAIR ? i : i / 2;
#pragma unroll
    for (int k = 0; k < 32; k++) out[c][k] = PAIR || i % 2 == 0 ? fmaf(out[c][k], old[k >> 1 & 1], d[k]) : out[c][k] + d[k];
  }
};

template <bool PAIR> DEVICE void multiply(Multiplier& m, const AttendArgs& a, const PromptRow& row) {
  u32 g = m.lane / 4, pair = m.lane % 4;
  load_queries(m, a, row);
  float scale = a.scale * LOG2_E, out[2][32] = {}, d[32], sums[16];
  Running run = {{-INFINITY, -INFINITY}, {0.f, 0.f}, {0.f, 0.f}};
  typedef Values<PAIR> V;
  start_scores(d, m, 0, row.rank);
  wgmma_wait<0>(d);
  send_scores(sums, d, m, 0);
  for (u32 tile = 0; tile < row.tiles; tile++) {
    u64 values = descriptor(m.stages + tile % STAGES * STAGE + m.wg * 2 * PIECE);
    u32 mine[2][2][4], w[2][2][2][4];
    float about[4];
    receive_scores(sums, m, tile);
    bool more = tile + 1 < row.tiles;
    if (more) start_scores(d, m, tile + 1, row.rank);
    else
#pragma unroll
      for (int i = 0; i < 16; i++)
        if (tile * TILE + m.wg * 32 + i / 4 * 8 + 2 * pair + (i & 1) >= row.count) sums[i] = -INFINITY;
    weights_of(mine, about, sums, scale);
    join_weights<PAIR>(w, mine, about, run, m);
    if (more) {
      wgmma_wait<0>(d);
      send_scores(sums, d, m, tile + 1);
    }
#pragma unroll
    for (int i = 0; i < V::TURNS; i++) {
      V::start(d, w, values, i);
      wgmma_wait<0>(d);
      V::add(out, d, run.old, i);
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
  __shared__ __align__(8) u64 bars[2 * STAGES + 16];
  pdl_launch();
  const AttendArgs& a = args.attend;
  u32 stages = (u32)__cvta_generic_to_shared(shared), bar = (u32)__cvta_generic_to_shared(bars), scores_bar = bar + 16 * STAGES;
  u32 warp = warp_index();
  if (threadIdx.x == 0) {
#pragma unroll
    for (int s = 0; s < STAGES; s++) {
      barrier_init(bar + 8 * s, 4 * WARP_ARRIVALS);
      barrier_init(bar + 8 * (STAGES + s), 8 * WARP_ARRIVALS);
    }
#pragma unroll
    for (int i = 0; i < 16; i++) barrier_init(scores_bar + 8 * i, 1);
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
  m.mine = stages + GIVEN + threadIdx.x % 128 * 16;
  m.other = cluster_address(stages + OTHER + threadIdx.x * 16 + m.wg * (8192 - 2048), 1 - row.rank);
  m.scores_bar = scores_bar + 8 * warp;
  m.other_bar = cluster_address(m.scores_bar, 1 - row.rank);
  if (split_of(row.count) == 32) multiply<false>(m, a, row);
  else multiply<true>(m, a, row);
}
#endif
