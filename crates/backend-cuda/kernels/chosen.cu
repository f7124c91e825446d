// The router, the choice and the chosen experts' first half as one kernel of clusters, each of which makes the choice for itself: a block has some experts' logits,
// which all of its cluster get through distributed shared memory. And their second half beside the shared expert's.
#ifndef NO_CHOSEN
#define NO_KERNELS
#include "decode.cu"
#endif

#define CLUSTER_ROWS 16   // most logits of a block
DEVICE u32 cluster_rank() { u32 r; asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r)); return r; }
DEVICE u32 cluster_size() { u32 r; asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(r)); return r; }
DEVICE void store_in_cluster(float* to, u32 rank, float x) {
  u32 at;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"((u32)__cvta_generic_to_shared(to)), "r"(rank));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(at), "f"(x) : "memory");
}
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

struct ChosenArgs {
  PairArgs first;         // the router, the choice, and the shared expert's first half, in the first blocks of the grid
  UpPair routed;
  u32 slices, beside_blocks, top_k, pad;
  u8* h_digits;
  u32* arrived;
};

// The row as digits or twins at `x`, and the logits of `count` experts from `first` on, whose weights (16 bit) lie at `weights` in shared memory: lane 0 of
// a warp has them in logits[row][warp].
template <int F> DEVICE void prepare_and_route(const RouterArgs& a, u32 count, const u8* weights, u8* x, float (*parts)[8], float* scratch, bool writes, bool wants, float weight[8]) {
  u32 cols = a.cols, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float v[ROW_STEPS][8], acc[CLUSTER_ROWS] = {};
#pragma unroll
  for (int i = 0; i < ROW_STEPS; i++) {
#pragma unroll
    for (int k = 0; k < 8; k++) v[i][k] = 0.f;
    if (i * ROW_COLUMNS < cols) load8(v[i], a.in.x.p, row_column(i), cols, true);
  }
  float scale = inverse_rms(v, ROW_STEPS, cols, a.in.eps, scratch);
#pragma unroll 1
  for (u32 c = threadIdx.x * 8; c / ROW_COLUMNS * ROW_COLUMNS < cols; c += ROW_COLUMNS) {
#pragma unroll
    for (int k = 0; k < 8; k++) v[0][k] = v[0][k] * scale * weight[k];
    load8(weight, a.in.weight, c + ROW_COLUMNS, cols, true);
    bool inside = c < (cols + 63) / 64 * 64;
    if (wants) {
      if constexpr (Is<F>::affine) {
        Digits8 d = digits_of(v[0]);
        if (inside) d.store(x + c / 64 * DIGITS_BYTES);
        if (inside && writes && a.in.out_digits) d.store(a.in.out_digits + c / 64 * DIGITS_BYTES);
      } else {
        if (inside) *(uint4*)(x + c * 2) = pack8(v[0]);
      }
    }
    if (writes && c < cols) {
      store8(a.in.out.p, v[0], c, cols, true);
      if (a.in.out.twin) *(uint4*)(a.in.out.twin + c) = pack8(v[0]);
    }
    if (c < cols) {
#pragma unroll
      for (int r = 0; r < CLUSTER_ROWS; r++) {
        if (r >= count) break;
        uint4 q = *(const uint4*)(weights + ((u64)r * cols + c) * 2);
        const u32 words[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
        for (int k = 0; k < 8; k++) {
          u32 w = words[k / 2];
          acc[r] = fmaf(__uint_as_float(k % 2 ? w & 0xffff0000u : w << 16), v[0][k], acc[r]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i + 1 < ROW_STEPS; i++)
#pragma unroll
      for (int k = 0; k < 8; k++) v[i][k] = v[i + 1][k];
  }
#pragma unroll
  for (int r = 0; r < CLUSTER_ROWS; r++) {
    if (r >= count) break;
    float y = warp_sum(acc[r]);
    if (lane == 0) parts[r][warp] = y;
  }
  __syncthreads();
}

template <int F> DEVICE void chosen_up(const ChosenArgs& a, u32 block, u32 blocks) {
  extern __shared__ __align__(128) u8 shared[];
  __shared__ float red[2][WARPS][2][16];
  __shared__ Choice choice;
  __shared__ float logits[256], parts[CLUSTER_ROWS][8], scratch[32];
  __shared__ __align__(8) u64 bar;
  const UpPair& pair = a.routed;
  const RouterArgs& router = a.first.router;
  const RouteArgs& route = a.first.route;
  u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  u32 S = a.slices, side = WARPS / S, team = warp / S, slice = warp % S, step = blocks * side;
  const Packed* w[2] = {&pair.gate, &pair.up};
  u32 row_tiles = (pair.gate.rows + 15) / 16, tiles = num_tiles(pair.gate), total = a.top_k * row_tiles;
  u32 first = slice_start(slice, S, tiles), count = slice_start(slice + 1, S, tiles) - first;
  u32 rank = cluster_rank(), size = cluster_size(), experts = router.rows, each = (experts + size - 1) / size;
  u32 first_row = rank * each < experts ? rank * each : experts, num_rows = first_row + each < experts ? each : experts - first_row;
  // The router's weights of this block, where the ring will be.
  u8* x = shared;
  u32 x_bytes = tiles * Form<F>::tile;
  u8* ring = shared + x_bytes;
  u32 bar_at = (u32)__cvta_generic_to_shared(&bar), bytes = num_rows * router.cols * 2;
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(bar_at) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar_at), "r"(bytes) : "memory");
    for (u32 r = 0; r < num_rows; r++)
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
          ::"r"((u32)__cvta_generic_to_shared(ring) + r * router.cols * 2), "l"(router.weights + (u64)(first_row + r) * router.cols * 2), "r"(router.cols * 2), "r"(bar_at) : "memory");
  }
  float weight[8];
  norm_weights(router.in, router.cols, weight);
  u32 e = threadIdx.x;
  bool mine = e < experts;
  float bias = mine && route.correction_bias ? route.correction_bias[e] : 0.f;
  __syncthreads();
  { u32 done = 0;
    while (!done)
      asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }" : "=r"(done) : "r"(bar_at), "r"(0u) : "memory"); }
  pdl_wait();
  prepare_and_route<F>(router, num_rows, ring, x, parts, scratch, block == 0, true, weight);
  {
    u32 peer = threadIdx.x / 16, r = threadIdx.x % 16;
    if (r < num_rows && peer < size) {
      float y = 0.f;
      for (u32 k = 0; k < 8; k++) y += parts[r][k];
      if (router.bias) y += router.bias[first_row + r];
      store_in_cluster(logits + first_row + r, peer, y);
      if (block < size && peer == rank) store(router.out, 0, first_row + r, y);
    }
  }
  cluster_arrive();
  Pipe<F, 2> pipe;
  pipe.start(ring);
  cluster_wait();
  choose(route, choice, mine ? logits[e] : 0.f, bias);
  u32 unit = block * side + team, ahead = unit;
  auto issue = [&] {
    if (pipe.left == 0 && ahead < total) {
      pipe.aim(w, choice.ids[ahead / row_tiles], ahead % row_tiles, first, count);
      ahead += step;
    }
    pipe.issue();
  };
#pragma unroll
  for (int i = 0; i < pipe.D; i++) issue();
  if (block == 0 && e < 32) {
    float chosen = chosen_weight(route, e < route.top_k ? choice.scores[e] : 0.f);
    if (e < route.top_k) { route.ids[e] = choice.ids[e]; route.weights.p[e] = chosen; }
    __threadfence();
  }
  if (block == 0) __syncthreads();
  pdl_launch();
  bool reports = a.h_digits && slice == 0;
  u32 first_unit = unit;
  for (u32 buffer = 0; unit < total; unit += step, buffer ^= 1) {
    u32 k = unit / row_tiles, row_tile = unit % row_tiles;
    float acc[pipe.SUMS] = {};
    pipe.unit(acc, x, first, count, pair.gate.cols, issue);
    pipe.put_sums(red[buffer][warp][0], acc);
    team_barrier(team, S);
    if (slice != 0) continue;
    float h = up_row<F>(pair, a.first.activation, red[buffer] + warp, S, choice.ids[k], row_tile);
    u32 row = row_tile * 16 + lane;
    if (lane < 16 && row < pair.gate.rows) store(pair.out, 0, k * pair.gate.rows + row, h);
  }
  if (reports) report_digits(pair, a.h_digits, a.arrived, first_unit, step, total, row_tiles);
}
template <int F, int G> DEVICE void chosen(const ChosenArgs& a) {
  if (blockIdx.x < a.beside_blocks) {
    pdl_launch();
    pair<G>(a.first, blockIdx.x, a.beside_blocks);
  } else chosen_up<F>(a, blockIdx.x - a.beside_blocks, gridDim.x - a.beside_blocks);
}

// The experts' second half beside the shared expert's, whose blocks come first and say a row tile is there.
struct SumArgs {
  DownArgs down;
  LineArgs beside;
  u32* ready;        // a flag a row tile of 16
  u32 beside_blocks, pad;
};
template <int G> DEVICE void beside_line(const SumArgs& s, u32 block, u32 blocks) {
  extern __shared__ __align__(16) u8 shared[];
  __shared__ float red[2][WARPS][1][16], scratch[32];
  const LineArgs& a = s.beside;
  u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  u32 S = a.slices, side = WARPS / S, team = warp / S, slice = warp % S, step = blocks * side, total = a.first_unit[1];
  const Part& part = a.part[0];
  u32 cols = part.w.cols, tiles = num_tiles(part.w);
  u32 first = slice_start(slice, S, tiles), count = slice_start(slice + 1, S, tiles) - first;
  Pipe<G, 1> pipe;
  pipe.start(shared);
  u32 unit = block * side + team, ahead = unit;
  auto issue = [&] {
    if (pipe.left == 0 && ahead < total) {
      pipe.aim(part.w, 0, ahead, first, count);
      ahead += step;
    }
    pipe.issue();
  };
#pragma unroll
  for (int i = 0; i < pipe.D; i++) issue();
  float weight[8];
  pdl_wait();
  const u8* x = prepare<G>(a.in, cols, shared + WARPS * pipe.RING, scratch, false, weight);
  for (u32 buffer = 0; unit < total; unit += step, buffer ^= 1) {
    u32 row = unit * 16 + lane;
    bool writes = slice == 0 && lane < 16 && row < part.w.rows;
    float acc[pipe.SUMS] = {};
    pipe.unit(acc, x, first, count, cols, issue);
    pipe.put_sums(red[buffer][warp][0], acc);
    team_barrier(team, S);
    if (writes) { store(part.out, 0, row, finish<G>(part.w, 0, row, sum_slices<1>(red[buffer] + warp, S, lane))); __threadfence(); }
    __syncwarp();
    if (slice == 0 && lane == 0) *(volatile u32*)(s.ready + unit) = 1;
  }
}
template <int F> DEVICE void sum_down(const SumArgs& s, u32 block, u32 blocks) {
  const DownArgs& a = s.down;
  extern __shared__ __align__(16) u8 shared[];
  __shared__ u32 ids[32];
  __shared__ float weights[32];
  Pipe<F, 1> pipe;
  float* results = (float*)(shared + WARPS * pipe.RING);
  u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  u32 S = a.slices, side = WARPS / S, team = warp / S, slice = warp % S;
  u32 row_tiles = (a.w.rows + 15) / 16, tiles = num_tiles(a.w);
  u32 first = slice_start(slice, S, tiles), count = slice_start(slice + 1, S, tiles) - first;
  pipe.start(shared);
  if (threadIdx.x < a.top_k) {
    ids[threadIdx.x] = *(volatile const u32*)(a.ids + threadIdx.x);
    weights[threadIdx.x] = *(volatile const float*)(a.weights.p + threadIdx.x);
  }
  __syncthreads();
  u32 ahead_tile = block, ahead_k = team;
  auto issue = [&] {
    if (pipe.left == 0) {
      if (ahead_k >= a.top_k) { ahead_k = team; ahead_tile += blocks; }
      if (ahead_tile < row_tiles && ahead_k < a.top_k) {
        pipe.aim(a.w, ids[ahead_k], ahead_tile, first, count);
        ahead_k += side;
      }
    }
    pipe.issue();
  };
#pragma unroll
  for (int i = 0; i < pipe.D; i++) issue();
  pdl_wait();
  u32 turn = 0;
  for (u32 row_tile = block; row_tile < row_tiles; row_tile += blocks, turn++) {
    float* here = results + (turn & 1) * a.top_k * S * 16;
    u32 row = row_tile * 16 + lane;
    bool writes = warp == turn % WARPS && lane < 16 && row < a.w.rows;
    float old = writes && a.residual.p ? a.residual.p[row] : 0.f;
    for (u32 k = team; k < a.top_k; k += side) {
      float acc[pipe.SUMS] = {};
      pipe.unit(acc, a.x + k * a.part_bytes, first, count, a.w.cols, issue);
      pipe.put_sums(here + (k * S + slice) * 16, acc);
    }
    __syncthreads();
    if (warp == turn % WARPS) {
      float sum = 0.f;
      if (a.plus.p) {
        while (*(volatile u32*)(s.ready + row_tile) == 0) ;
        __threadfence();
        if (writes) sum = *(volatile float*)(a.plus.p + row);
        __syncwarp();
        if (lane == 0) s.ready[row_tile] = 0;
      }
      if (writes) {
#pragma unroll 4
        for (u32 k = 0; k < a.top_k; k++) {
          float y = 0.f;
#pragma unroll
          for (u32 t = 0; t < WARPS; t++) y += t < S ? here[(k * S + t) * 16 + lane] : 0.f;
          sum = fmaf(weights[k], finish<F>(a.w, ids[k], row, y), sum);
        }
        store(a.out, 0, row, sum);
        if (a.residual.p) a.residual.p[row] = old + sum;
      }
    }
  }
}
template <int F, int G> DEVICE void sum(const SumArgs& a) {
  pdl_launch();
  if (blockIdx.x < a.beside_blocks) beside_line<G>(a, blockIdx.x, a.beside_blocks);
  else sum_down<F>(a, blockIdx.x - a.beside_blocks, gridDim.x - a.beside_blocks);
}

#ifndef NO_CHOSEN
#ifndef CHOSEN_BLOCKS
#define CHOSEN_BLOCKS 3
#endif
#define CHOSEN(NAME, F, OTHER, G) \
  KERNEL __launch_bounds__(256, CHOSEN_BLOCKS) chosen_##NAME##_##OTHER(const __grid_constant__ ChosenArgs a) { chosen<F, G>(a); } \
  KERNEL __launch_bounds__(256, 3) sum_##NAME##_##OTHER(const __grid_constant__ SumArgs a) { sum<F, G>(a); }
CHOSEN(affine4, AFFINE4, affine4, AFFINE4)
CHOSEN(affine3, AFFINE3, affine4, AFFINE4)
#endif
