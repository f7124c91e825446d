// One row of activations: the step of one sequence. Bound by reading weights, and by what stands between two reads:
//
// - Grids are as large as what is resident, three blocks a multiprocessor (two: 2.41 ms a step, one: 3.24, three: 2.09; four with
//   smaller rings: 2.41; 12 layers of GLM-5.2-77 in affine-4, H200). A warp goes from row tile to row tile with its ring full.
// - What comes before a product (norm, rotation, the joining of attention's parts) is done by every block for
//   itself; what comes after (activation, weighted sum, residual, digits) by whoever has the sums. A layer is nine kernels.
// - Every kernel lets the one behind it start at once: its blocks ask for their weights, which do not depend on anything, while the last blocks
//   before them still work (117 us a layer of GLM-5.2-77 in q3a4 without, 106 with; H200, cuda-decode-layer).
// - High and low digits of the row are two columns of one tensor-core product.
//
// Results are those of the kernels in matmul.cu, rows.cu and attention.cu bit for bit: the same sums in the same order.
#include "attend.cuh"
#include "pipe.cuh"
#include "route.cuh"

// ---- what comes before ----

// Makes the row in shared memory, in the form that F wants. Returns where it lies. Blocks work alone; one of them also writes the norm.
// Rows start at 16 bytes and have whole eights. The loop is not unrolled, which halves the code of a kernel and takes no longer.
template <int F> DEVICE const u8* prepare(const RowInput& in, u32 cols, u8* shared, float* scratch, bool writes, float weight[8]) {
  if (in.kind == 0) return Is<F>::affine ? in.digits : (const u8*)in.x.twin;
  float v[ROW_STEPS][8];
#pragma unroll
  for (int i = 0; i < ROW_STEPS; i++) {
#pragma unroll
    for (int k = 0; k < 8; k++) v[i][k] = 0.f;
    if (i * ROW_COLUMNS < cols) load8(v[i], in.x.p, row_column(i), cols, true);
  }
  float scale = in.kind == 2 ? inverse_rms(v, ROW_STEPS, cols, in.eps, scratch) : 1.f;
  u32 whole = (cols + 63) / 64 * 64;
#pragma unroll 1
  for (u32 c = threadIdx.x * 8; c / ROW_COLUMNS * ROW_COLUMNS < cols; c += ROW_COLUMNS) {
    if (in.kind == 2) {
#pragma unroll
      for (int k = 0; k < 8; k++) v[0][k] = v[0][k] * scale * weight[k];
      load8(weight, in.weight, c + ROW_COLUMNS, cols, true);
    }
    bool inside = c < whole;
    if constexpr (Is<F>::affine) {
      Digits8 d = digits_of(v[0]);
      if (inside) d.store(shared + c / 64 * DIGITS_BYTES);
      if (inside && writes && in.out_digits) d.store(in.out_digits + c / 64 * DIGITS_BYTES);
    } else {
      if (inside) *(uint4*)(shared + c * 2) = pack8(v[0]);
      if (writes && in.out_digits) digits8(v[0], inside ? in.out_digits + c / 64 * DIGITS_BYTES : nullptr);
    }
    if (writes && c < cols) {
      if (in.out.p) store8(in.out.p, v[0], c, cols, true);
      if (in.out.twin) *(uint4*)(in.out.twin + c) = pack8(v[0]);
    }
#pragma unroll
    for (int i = 0; i + 1 < ROW_STEPS; i++)
#pragma unroll
      for (int k = 0; k < 8; k++) v[i][k] = v[i + 1][k];
  }
  __syncthreads();
  return shared;
}

// The first of a norm's weights that a thread multiplies with, and the others into the second-level cache: they do not wait for the operation before.
DEVICE void norm_weights(const RowInput& in, u32 cols, float weight[8]) {
  if (in.kind != 2) return;
  load8(weight, in.weight, row_column(0), cols, true);
  for (u32 c = ROW_COLUMNS + threadIdx.x * 32; c < cols; c += blockDim.x * 32) asm volatile("prefetch.global.L2 [%0];" ::"l"(in.weight + c));
}

// Row `row` of a unit of R row tiles: its slices in order.
template <int R> DEVICE float sum_slices(const float red[][R][16], u32 slices, u32 row) {
  float sum = 0.f;
#pragma unroll
  for (u32 s = 0; s < WARPS; s++) sum += s < slices ? red[s][row / 16][row % 16] : 0.f;
  return sum;
}

// ---- out = x W for several weights of one format ----

struct LineArgs {
  Part part[4];
  u32 first_unit[5];   // of each part, in TALL row tiles
  u32 num_parts, slices, pad;
  RowInput in;
  Mat residual;        // the result is added to it too (p null: none)
};
// A warp has a slice of TALL neighbouring row tiles at a time.
template <int F, int TALL, int TILES = 0, int SLOTS = 0> DEVICE void line(const LineArgs& a, u32 block, u32 blocks) {
  extern __shared__ __align__(16) u8 shared[];
  __shared__ float red[2][WARPS][TALL][16];
  __shared__ float scratch[32];
  u32 warp = warp_index(), lane = threadIdx.x % 32;
  u32 S = a.slices, side = WARPS / S, team = warp / S, slice = warp % S, step = blocks * side, total = a.first_unit[a.num_parts];
  u32 cols = a.part[0].w.cols, tiles = num_tiles(a.part[0].w);
  u32 first = slice_start(slice, S, tiles), count = slice_start(slice + 1, S, tiles) - first;
  Pipe<F, TALL, TILES, SLOTS> pipe;
  pipe.start(shared);
  auto part_of = [&](u32 u) {
    u32 k = 0;
    while (k + 1 < a.num_parts && u >= a.first_unit[k + 1]) k++;
    return k;
  };
  u32 unit = block * side + team, ahead = unit;
  auto issue = [&] {
    if (pipe.left == 0 && ahead < total) {
      u32 k = part_of(ahead);
      pipe.aim(a.part[k].w, 0, (ahead - a.first_unit[k]) * TALL, first, count);
      ahead += step;
    }
    pipe.issue();
  };
#pragma unroll
  for (int i = 0; i < pipe.D; i++) issue();
  float weight[8];
  norm_weights(a.in, cols, weight);
  pdl_wait();
  const u8* x = prepare<F>(a.in, cols, shared + WARPS * pipe.RING, scratch, block == 0, weight);
  for (u32 buffer = 0; unit < total; unit += step, buffer ^= 1) {
    const Part& part = a.part[part_of(unit)];
    u32 row = (unit - a.first_unit[part_of(unit)]) * (16 * TALL) + lane;
    bool writes = slice == 0 && lane < 16 * TALL && row < part.w.rows;
    float old = writes && a.residual.p ? a.residual.p[row] : 0.f;
    float acc[pipe.SUMS] = {};
    pipe.unit(acc, x, first, count, cols, issue);
    pipe.put_sums(red[buffer][warp][0], acc);
    team_barrier(team, S);
    if (writes) {
      float y = finish<F>(part.w, 0, row, sum_slices<TALL>(red[buffer] + warp, S, lane));
      store(part.out, 0, row, y);
      if (a.residual.p) a.residual.p[row] = old + y;
    }
  }
}

// ---- a product a head ----

struct HeadsArgs {
  Packed w;
  Mat out;              // [heads * rows]
  u8* out_digits;       // the result once more as digits, or null; a block then has whole 64 rows
  const float* x;       // inputs of the heads
  u32 x_head_stride, slices, joins, has_latent;
  AttendArgs attend;    // joins: the input is attention's result
  Latent latent;        // has_latent: blocks of one more row of the grid
};
// Grid (blocks of 8 / slices row tiles, heads and one more with a latent).
template <int F> DEVICE void heads(const HeadsArgs& a) {
  extern __shared__ __align__(16) u8 shared[];
  __shared__ float red[WARPS][1][16], results[WARPS * 16], scratch[32];
  pdl_launch();
  u32 warp = warp_index(), lane = threadIdx.x % 32, head = blockIdx.y;
  if (head == gridDim.y - a.has_latent) {
    pdl_wait();
    latent_row(a.latent, 0, scratch);
    return;
  }
  u32 S = a.slices, side = WARPS / S, slice = warp % S, row_tile = blockIdx.x * side + warp / S;
  u32 cols = a.w.cols, tiles = num_tiles(a.w), row_tiles = (a.w.rows + 15) / 16;
  bool active = row_tile < row_tiles;
  u32 first = slice_start(slice, S, tiles), count = active ? slice_start(slice + 1, S, tiles) - first : 0;
  Pipe<F, 1> pipe;
  pipe.start(shared);
  pipe.aim(a.w, head, active ? row_tile : 0, first, count);
#pragma unroll
  for (int i = 0; i < pipe.D; i++) pipe.issue();
  u32 first_key, keys = 0;
  if (a.joins && !a.attend.index_ids) keys_of(a.attend, 0, first_key, keys);
  pdl_wait();
  if (a.joins && a.attend.index_ids) keys_of(a.attend, 0, first_key, keys);
  u8* x = shared + WARPS * pipe.RING;
  u32 c = row_column(0);
  if (warp * 256 < cols) {
    float v[8];
    if (a.joins) {
      if (c < cols) join8(a.attend, 0, head, c, keys, v);
      else
#pragma unroll
        for (int k = 0; k < 8; k++) v[k] = 0.f;
    } else load8(v, a.x + head * a.x_head_stride, c, cols, is_wide(a.x + head * a.x_head_stride, cols));
    bool inside = c < tiles * 64;
    if constexpr (Is<F>::affine) digits8(v, inside ? x + c / 64 * DIGITS_BYTES : nullptr);
    else if (inside) *(uint4*)(x + c * 2) = pack8(v);
  }
  __syncthreads();
  float acc[pipe.SUMS] = {};
  pipe.unit(acc, x, first, count, cols, [&] { pipe.issue(); });
  pipe.put_sums(red[warp][0], acc);
  __syncthreads();
  u32 rows = side * 16, i = threadIdx.x, row = blockIdx.x * rows + i;
  if (i < rows) {
    float y = 0.f;
    if (row < a.w.rows) {
      y = finish<F>(a.w, head, row, sum_slices<1>(red + i / 16 * S, S, i % 16));
      store(a.out, 0, head * a.w.rows + row, y);
    }
    results[i] = y;
  }
  if (!a.out_digits) return;
  __syncthreads();
  if (warp == 0) {
    float v[8];
#pragma unroll
    for (int k = 0; k < 8; k++) v[k] = lane * 8 < rows ? results[(lane * 8 + k) % (WARPS * 16)] : 0.f;
    u32 column = blockIdx.x * rows + lane * 8;
    digits8(v, lane * 8 < rows && column < a.w.rows ? a.out_digits + (head * a.w.rows + column) / 64 * DIGITS_BYTES : nullptr);
  }
}

// ---- the router ----

struct RouterArgs { const u8* weights; const float* bias; Mat out; RowInput in; u32 rows, cols; };
// As `plain` of matmul.cu with eight warps a row, which needs more than 2048 - 256 columns; the norm's threads have the columns that their part
// of the product wants. KIND 0 f32, 1 f16, 2 bf16. A block a row.
template <int KIND> DEVICE void router(const RouterArgs& a) {
  __shared__ float parts[8], scratch[32];
  u32 row = blockIdx.x, cols = a.cols, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  u64 first = (u64)row * cols;
  float weight[8];
  norm_weights(a.in, cols, weight);
  uint4 q[ROW_STEPS][KIND == 0 ? 2 : 1];
#pragma unroll
  for (int i = 0; i < ROW_STEPS; i++) {
    u32 c = row_column(i);
    if (c >= cols) continue;
    if constexpr (KIND == 0) { q[i][0] = *(const uint4*)((const float*)a.weights + first + c); q[i][1] = *(const uint4*)((const float*)a.weights + first + c + 4); }
    else q[i][0] = *(const uint4*)((const u16*)a.weights + first + c);
  }
  pdl_wait();
  float v[ROW_STEPS][8];
#pragma unroll
  for (int i = 0; i < ROW_STEPS; i++) load8(v[i], a.in.x.p, row_column(i), cols, true);
  float scale = inverse_rms(v, ROW_STEPS, cols, a.in.eps, scratch), acc = 0.f;
#pragma unroll 1
  for (u32 c = threadIdx.x * 8; c / ROW_COLUMNS * ROW_COLUMNS < cols; c += ROW_COLUMNS) {
#pragma unroll
    for (int k = 0; k < 8; k++) v[0][k] = v[0][k] * scale * weight[k];
    load8(weight, a.in.weight, c + ROW_COLUMNS, cols, true);
    if (row == 0) {
      if (c < cols) {
        store8(a.in.out.p, v[0], c, cols, true);
        if (a.in.out.twin) *(uint4*)(a.in.out.twin + c) = pack8(v[0]);
      }
      if (a.in.out_digits) digits8(v[0], c < (cols + 63) / 64 * 64 ? a.in.out_digits + c / 64 * DIGITS_BYTES : nullptr);
    }
    if (c < cols) {
      if constexpr (KIND == 0) {
        const u32 words[8] = {q[0][0].x, q[0][0].y, q[0][0].z, q[0][0].w, q[0][1].x, q[0][1].y, q[0][1].z, q[0][1].w};
#pragma unroll
        for (int k = 0; k < 8; k++) acc = fmaf(__uint_as_float(words[k]), v[0][k], acc);
      } else {
        const u32 words[4] = {q[0][0].x, q[0][0].y, q[0][0].z, q[0][0].w};
#pragma unroll
        for (int k = 0; k < 8; k++) {
          u16 bits = (u16)(words[k / 2] >> (16 * (k % 2)));
          acc = fmaf(KIND == 2 ? bf16_to_f32(bits) : f16_to_f32(bits), v[0][k], acc);
        }
      }
    }
#pragma unroll
    for (int i = 0; i + 1 < ROW_STEPS; i++) {
#pragma unroll
      for (int k = 0; k < 8; k++) v[i][k] = v[i + 1][k];
      q[i][0] = q[i + 1][0];
      if constexpr (KIND == 0) q[i][1] = q[i + 1][1];
    }
  }
  float y = warp_sum(acc);
  if (lane == 0) parts[warp] = y;
  __syncthreads();
  if (threadIdx.x == 0) {
    y = 0.f;
    for (u32 k = 0; k < 8; k++) y += parts[k];
    if (a.bias) y += a.bias[row];
    store(a.out, 0, row, y);
  }
}

// ---- experts ----

// Gate and up of one group of matrices: h = f(x gate, x up).
struct UpPair { Packed gate, up; Mat out; const u8* x; };
// Of a unit's slices, by its first warp, half a warp a matrix: lanes below 16 get h of the row tile's row `lane`.
template <int F> DEVICE float up_row(const UpPair& pair, const Activation& activation, const float red[][2][16], u32 slices, u32 matrix, u32 row_tile) {
  u32 lane = threadIdx.x % 32, row = row_tile * 16 + lane % 16;
  float sum = sum_slices<2>(red, slices, lane);
  if (row < pair.gate.rows) sum = finish<F>(lane < 16 ? pair.gate : pair.up, matrix, row, sum);
  return activate(activation, sum, __shfl_down_sync(0xffffffffu, sum, 16));
}

// The router, a block a row, beside a dense pair; either may be alone.
struct PairArgs {
  RouterArgs router;      // its input is the pair's too, where it has rows
  RouteArgs route;        // the choice, by the router's last block; of no experts: somebody else makes it
  u32* arrived;           // a counter
  UpPair pair;
  RowInput in;
  u32 router_kind, slices;
  Activation activation;
};
template <int F> DEVICE void pair(const PairArgs& a, u32 block, u32 blocks) {
  extern __shared__ __align__(16) u8 shared[];
  __shared__ float red[2][WARPS][2][16], scratch[32];
  const UpPair& pair = a.pair;
  u32 warp = warp_index(), lane = threadIdx.x % 32;
  u32 S = a.slices, side = WARPS / S, team = warp / S, slice = warp % S, step = blocks * side;
  const Packed* w[2] = {&pair.gate, &pair.up};
  u32 cols = pair.gate.cols, total = (pair.gate.rows + 15) / 16, tiles = num_tiles(pair.gate);
  u32 first = slice_start(slice, S, tiles), count = slice_start(slice + 1, S, tiles) - first;
  Pipe<F, 2> pipe;
  pipe.start(shared);
  u32 unit = block * side + team, ahead = unit;
  auto issue = [&] {
    if (pipe.left == 0 && ahead < total) {
      pipe.aim(w, 0, ahead, first, count);
      ahead += step;
    }
    pipe.issue();
  };
#pragma unroll
  for (int i = 0; i < pipe.D; i++) issue();
  float weight[8];
  norm_weights(a.in, cols, weight);
  pdl_wait();
  const u8* x = prepare<F>(a.in, cols, shared + WARPS * pipe.RING, scratch, false, weight);
  for (u32 buffer = 0; unit < total; unit += step, buffer ^= 1) {
    float acc[pipe.SUMS] = {};
    pipe.unit(acc, x, first, count, cols, issue);
    pipe.put_sums(red[buffer][warp][0], acc);
    team_barrier(team, S);
    if (slice != 0) continue;
    float h = up_row<F>(pair, a.activation, red[buffer] + warp, S, 0, unit);
    if (lane < 16 && unit * 16 + lane < pair.gate.rows) store(pair.out, 0, unit * 16 + lane, h);
  }
}
// The choice, by the block whose logit is the last one; the pair's blocks take longer than both.
DEVICE void choose_last(const PairArgs& a) {
  __shared__ Choice choice;
  __shared__ u32 last;
  const RouteArgs& route = a.route;
  u32 e = threadIdx.x;
  bool mine = e < route.logits.cols;
  float bias = mine && route.correction_bias ? route.correction_bias[e] : 0.f;
  if (e == 0) {
    __threadfence();
    last = atomicInc(a.arrived, a.router.rows - 1) == a.router.rows - 1;
    __threadfence();
  }
  __syncthreads();
  if (!last) return;
  choose(route, choice, mine ? *(volatile const float*)(route.logits.p + e) : 0.f, bias);
  if (e >= 32) return;
  float weight = chosen_weight(route, e < route.top_k ? choice.scores[e] : 0.f);
  if (e < route.top_k) { route.ids[e] = choice.ids[e]; route.weights.p[e] = weight; }
}
template <int F> DEVICE void router_pair(const PairArgs& a) {
  pdl_launch();
  if (blockIdx.x >= a.router.rows) return pair<F>(a, blockIdx.x - a.router.rows, gridDim.x - a.router.rows);
  if (a.router_kind == 0) router<0>(a.router);
  else if (a.router_kind == 1) router<1>(a.router);
  else router<2>(a.router);
  if (a.route.top_k) choose_last(a);
}

// The chosen experts' gate and up, beside the second product of the shared expert.
struct UpArgs {
  UpPair routed;
  u32 shared_blocks;      // the first blocks of the grid: a product of a row, or none
  u32 slices;
  const u32* ids;         // of the chosen experts
  u32 top_k, pad;
  Activation activation;
  u8* h_digits;           // h as digits, a part an expert, or null
  u32* arrived;           // a counter for 64 rows of h
  LineArgs shared;
};
template <int F> DEVICE void up(const UpArgs& a, u32 block, u32 blocks) {
  extern __shared__ __align__(16) u8 shared[];
  __shared__ float red[2][WARPS][2][16];
  __shared__ u32 ids[32];
  const UpPair& pair = a.routed;
  u32 warp = warp_index(), lane = threadIdx.x % 32;
  u32 S = a.slices, side = WARPS / S, team = warp / S, slice = warp % S, step = blocks * side;
  const Packed* w[2] = {&pair.gate, &pair.up};
  u32 row_tiles = (pair.gate.rows + 15) / 16, tiles = num_tiles(pair.gate), total = a.top_k * row_tiles;
  u32 first = slice_start(slice, S, tiles), count = slice_start(slice + 1, S, tiles) - first;
  Pipe<F, 2> pipe;
  pipe.start(shared);
  u32 unit = block * side + team, ahead = unit;
  auto issue = [&] {
    if (pipe.left == 0 && ahead < total) {
      pipe.aim(w, ids[ahead / row_tiles], ahead % row_tiles, first, count);
      ahead += step;
    }
    pipe.issue();
  };
  pdl_wait();
  // Not before: what starts then reads the choice, which is there.
  pdl_launch();
  if (threadIdx.x < a.top_k) ids[threadIdx.x] = a.ids[threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < pipe.D; i++) issue();
  bool reports = a.h_digits && slice == 0;
  u32 first_unit = unit;
  for (u32 buffer = 0; unit < total; unit += step, buffer ^= 1) {
    u32 k = unit / row_tiles, row_tile = unit % row_tiles;
    float acc[pipe.SUMS] = {};
    pipe.unit(acc, pair.x, first, count, pair.gate.cols, issue);
    pipe.put_sums(red[buffer][warp][0], acc);
    team_barrier(team, S);
    if (slice != 0) continue;
    float h = up_row<F>(pair, a.activation, red[buffer] + warp, S, ids[k], row_tile);
    u32 row = row_tile * 16 + lane;
    if (lane < 16 && row < pair.gate.rows) store(pair.out, 0, k * pair.gate.rows + row, h);
  }
  // The last of the four row tiles of 64 rows makes their digits. All of a warp's are reported together: each wait for what was written
  // to arrive takes as long as some tiles, for which all warps of the block waited (6 of 41 us of the kernel).
  if (reports) {
    __threadfence();
    __syncwarp();
    for (u32 u = first_unit + lane * step; __any_sync(0xffffffffu, u < total); u += 32 * step) {
      u32 k = u / row_tiles, row_tile = u % row_tiles, tile = k * (pair.gate.rows / 64) + row_tile / 4;
      u32 done = __ballot_sync(0xffffffffu, u < total && atomicInc(a.arrived + (u < total ? tile : 0), 3) == 3);
      if (done) __threadfence();
      while (done) {
        // Four at a time, eight lanes each.
        u32 rest = done;
        for (u32 i = 0; i < lane / 8; i++) rest &= rest - 1;
        u32 from = __shfl_sync(0xffffffffu, tile, __ffs(rest) - 1);
        bool any = rest != 0;
        float v[8];
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = any ? ((volatile const float*)pair.out.p)[from * 64 + lane % 8 * 8 + i] : 0.f;
        digits8(v, any ? a.h_digits + (u64)from * DIGITS_BYTES : nullptr);
        for (int i = 0; i < 4 && done; i++) done &= done - 1;
      }
    }
  }
}
template <int F, int G> DEVICE void experts_up(const UpArgs& a) {
  if (blockIdx.x < a.shared_blocks) line<G, 1>(a.shared, blockIdx.x, a.shared_blocks);
  else up<F>(a, blockIdx.x - a.shared_blocks, gridDim.x - a.shared_blocks);
}

// out = plus + sum over the experts of weight * (h W).
struct DownArgs {
  Packed w;
  Mat out, weights, plus, residual;
  const u32* ids;
  const u8* x;           // h in the form of the format, a part an expert
  u64 part_bytes;
  u32 slices, top_k;
};
template <int F> DEVICE void experts_down(const DownArgs& a) {
  extern __shared__ __align__(16) u8 shared[];
  __shared__ u32 ids[32];
  __shared__ float weights[32];
  Pipe<F, 1> pipe;
  float* results = (float*)(shared + WARPS * pipe.RING);  // [2][top_k][slices][16]
  u32 warp = warp_index(), lane = threadIdx.x % 32;
  u32 S = a.slices, side = WARPS / S, team = warp / S, slice = warp % S;
  u32 row_tiles = (a.w.rows + 15) / 16, tiles = num_tiles(a.w);
  u32 first = slice_start(slice, S, tiles), count = slice_start(slice + 1, S, tiles) - first;
  pdl_launch();
  pipe.start(shared);
  // The choice is older than the kernel before, which lets this one start only when it has read it: weights are asked for while that one ends.
  if (threadIdx.x < a.top_k) {
    ids[threadIdx.x] = *(volatile const u32*)(a.ids + threadIdx.x);
    weights[threadIdx.x] = *(volatile const float*)(a.weights.p + threadIdx.x);
  }
  __syncthreads();
  u32 ahead_tile = blockIdx.x, ahead_k = team;
  auto issue = [&] {
    if (pipe.left == 0) {
      if (ahead_k >= a.top_k) { ahead_k = team; ahead_tile += gridDim.x; }
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
  for (u32 row_tile = blockIdx.x; row_tile < row_tiles; row_tile += gridDim.x, turn++) {
    float* here = results + (turn & 1) * a.top_k * S * 16;
    u32 row = row_tile * 16 + lane;
    // Another warp each time, so that no one falls behind.
    bool writes = warp == turn % WARPS && lane < 16 && row < a.w.rows;
    float sum = writes && a.plus.p ? a.plus.p[row] : 0.f, old = writes && a.residual.p ? a.residual.p[row] : 0.f;
    for (u32 k = team; k < a.top_k; k += side) {
      float acc[pipe.SUMS] = {};
      pipe.unit(acc, a.x + k * a.part_bytes, first, count, a.w.cols, issue);
      pipe.put_sums(here + (k * S + slice) * 16, acc);
    }
    __syncthreads();
    if (writes) {
#pragma unroll 4
      for (u32 k = 0; k < a.top_k; k++) {
        float y = 0.f;
#pragma unroll
        for (u32 s = 0; s < WARPS; s++) y += s < S ? here[(k * S + s) * 16 + lane] : 0.f;
        sum = fmaf(weights[k], finish<F>(a.w, ids[k], row, y), sum);
      }
      store(a.out, 0, row, sum);
      if (a.residual.p) a.residual.p[row] = old + sum;
    }
  }
}

#ifndef NO_KERNELS  // programs under bench/ want the arguments alone
#define KERNELS(NAME, F) \
  KERNEL __launch_bounds__(256, 3) line_##NAME(const __grid_constant__ LineArgs a) { pdl_launch(); line<F, 1>(a, blockIdx.x, gridDim.x); } \
  KERNEL __launch_bounds__(256, 3) heads_##NAME(const __grid_constant__ HeadsArgs a) { heads<F>(a); } \
  KERNEL __launch_bounds__(256, 2) pair_##NAME(const __grid_constant__ PairArgs a) { router_pair<F>(a); } \
  KERNEL __launch_bounds__(256, 3) up_##NAME##_##NAME(const __grid_constant__ UpArgs a) { experts_up<F, F>(a); } \
  KERNEL __launch_bounds__(256, 3) experts_down_##NAME(const __grid_constant__ DownArgs a) { experts_down<F>(a); }
// A product whose blocks would not fill the device: one a multiprocessor, with a ring that has all of its memory and two row tiles a warp. Kernels start
// while the one before works, so that blocks go where there is room: three on one multiprocessor and one on another, where several fit.
KERNEL __launch_bounds__(256, 1) deep_affine4(const __grid_constant__ LineArgs a) { pdl_launch(); line<AFFINE4, 2, 3, 4>(a, blockIdx.x, gridDim.x); }
KERNELS(affine2, AFFINE2)
KERNELS(affine3, AFFINE3)
KERNELS(affine4, AFFINE4)
KERNELS(affine5, AFFINE5)
KERNELS(affine6, AFFINE6)
KERNELS(affine8, AFFINE8)
KERNELS(nvfp4, NVFP4)
KERNELS(mxfp4, MXFP4)
KERNELS(mxfp8, MXFP8)
KERNELS(fp8, FP8)
// Routed experts with fewer bits than the shared one, as demolished models have them.
#define MIXED(NAME, F, OTHER, G) KERNEL __launch_bounds__(256, 3) up_##NAME##_##OTHER(const __grid_constant__ UpArgs a) { experts_up<F, G>(a); }
MIXED(affine2, AFFINE2, affine4, AFFINE4)
MIXED(affine3, AFFINE3, affine4, AFFINE4)
MIXED(affine3, AFFINE3, affine6, AFFINE6)
MIXED(affine4, AFFINE4, affine6, AFFINE6)
MIXED(affine4, AFFINE4, affine8, AFFINE8)
MIXED(nvfp4, NVFP4, fp8, FP8)
#endif
