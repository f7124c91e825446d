// One row of activations: the step of one sequence. Bound by reading weights, and by what stands between two reads:
//
// - Grids are as large as what is resident, three blocks a multiprocessor (two: 2.41 ms a step, one: 3.24, three: 2.09; four with
//   smaller rings: 2.41; 12 layers of GLM-5.2-77 in affine-4, H200). A warp goes from row tile to row tile with its ring full.
// - What comes before a product (norm, rotation, the joining of attention's parts, the router's choice) is done by every block for
//   itself; what comes after (activation, weighted sum, residual, digits) by whoever has the sums. A layer is ten kernels.
// - High and low digits of the row are two columns of one tensor-core product.
//
// Results are those of the kernels in matmul.cu, rows.cu and attention.cu bit for bit: the same sums in the same order.
#include "attend.cuh"
#include "pipe.cuh"
#include "route.cuh"

// ---- what comes before ----

// Where the row of a product comes from.
struct RowInput {
  Mat x;              // floats; the twin is read where it is taken as it lies
  const u8* digits;   // the same for affine formats
  u32 kind;           // 0: as it lies (twin or digits), 1: from its floats, 2: from their norm
  float eps;
  const float* weight;
  Mat out;            // where the norm goes too, as floats and twin; null where it does not. Not over x: other blocks may still read it
  u8* out_digits;     // and as digits, or null
};

// Makes the row in shared memory, in the form that F wants. Returns where it lies. Blocks work alone; one of them also writes the norm.
template <int F> DEVICE const u8* prepare(const RowInput& in, u32 cols, u8* shared, float* scratch, bool writes) {
  if (in.kind == 0) return Is<F>::affine ? in.digits : (const u8*)in.x.twin;
  float v[ROW_STEPS][8];
  bool wide = is_wide(in.x.p, cols);
#pragma unroll
  for (int i = 0; i < ROW_STEPS; i++) {
#pragma unroll
    for (int k = 0; k < 8; k++) v[i][k] = 0.f;
    if (i * ROW_COLUMNS < cols) load8(v[i], in.x.p, row_column(i), cols, wide);
  }
  float scale = in.kind == 2 ? inverse_rms(v, ROW_STEPS, cols, in.eps, scratch) : 1.f;
#pragma unroll
  for (int i = 0; i < ROW_STEPS; i++) {
    u32 c = row_column(i);
    if (i * ROW_COLUMNS >= cols) break;
    if (in.kind == 2) {
      float weight[8];
      load8(weight, in.weight, c, cols, is_wide(in.weight, cols));
#pragma unroll
      for (int k = 0; k < 8; k++) v[i][k] = v[i][k] * scale * weight[k];
    }
    bool inside = c < (cols + 63) / 64 * 64;
    if constexpr (Is<F>::affine) digits8(v[i], inside ? shared + c / 64 * DIGITS_BYTES : nullptr);
    else if (inside) *(uint4*)(shared + c * 2) = pack8(v[i]);
    if (writes) {
      if (in.out.p) store8(in.out.p, v[i], c, cols, is_wide(in.out.p, cols));
      if (in.out.twin) store8(in.out.twin, v[i], c, cols);
      if (in.out_digits) digits8(v[i], inside ? in.out_digits + c / 64 * DIGITS_BYTES : nullptr);
    }
  }
  __syncthreads();
  return shared;
}

// Weights of a norm into the second-level cache: they do not wait for the operation before.
DEVICE void prefetch_row(const float* p, u32 cols) {
  if (!p) return;
  for (u32 c = threadIdx.x * 32; c < cols; c += blockDim.x * 32) asm volatile("prefetch.global.L2 [%0];" ::"l"(p + c));
}

// The sums of rows g and g + 8 of a lane into [16].
DEVICE void put_one(float* red, const float acc[4], u32 lane) {
  if (lane % 4 == 0) { red[lane / 4] = acc[0]; red[lane / 4 + 8] = acc[2]; }
}
// Row `lane` of a unit: its slices in order.
DEVICE float sum_slices(const float red[][16], u32 slices, u32 row) {
  float sum = 0.f;
  for (u32 s = 0; s < slices; s++) sum += red[s][row];
  return sum;
}

// ---- out = x W for several weights of one format ----

struct LineArgs {
  Part part[4];
  u32 first_unit[5];   // of each part, in row tiles
  u32 num_parts, slices, pad;
  RowInput in;
  Mat residual;        // the result is added to it too (p null: none)
};
template <int F> DEVICE void line(const LineArgs& a) {
  extern __shared__ __align__(16) u8 shared[];
  __shared__ float red[2][WARPS][16];
  __shared__ float scratch[32];
  u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  u32 S = a.slices, side = WARPS / S, team = warp / S, slice = warp % S, step = gridDim.x * side, total = a.first_unit[a.num_parts];
  u32 cols = a.part[0].w.cols, tiles = num_tiles(a.part[0].w);
  u32 first = slice_start(slice, S, tiles), count = slice_start(slice + 1, S, tiles) - first;
  Pipe<F, 1> pipe;
  pipe.start(shared);
  auto part_of = [&](u32 u) {
    u32 k = 0;
    while (k + 1 < a.num_parts && u >= a.first_unit[k + 1]) k++;
    return k;
  };
  u32 unit = blockIdx.x * side + team, ahead = unit;
  auto issue = [&] {
    if (pipe.left == 0 && ahead < total) {
      u32 k = part_of(ahead);
      const Packed* w[1] = {&a.part[k].w};
      pipe.aim(w, 0, ahead - a.first_unit[k], first, count);
      ahead += step;
    }
    pipe.issue();
  };
#pragma unroll
  for (int i = 0; i < pipe.D; i++) issue();
  if (a.in.kind == 2) prefetch_row(a.in.weight, cols);
  pdl_wait();
  const u8* x = prepare<F>(a.in, cols, shared + WARPS * pipe.RING, scratch, blockIdx.x == 0);
  for (u32 buffer = 0; unit < total; unit += step, buffer ^= 1) {
    const Part& part = a.part[part_of(unit)];
    u32 row_tile = unit - a.first_unit[part_of(unit)];
    float acc[1][4] = {};
    pipe.unit(acc, x, first, count, cols, issue);
    put_one(red[buffer][warp], acc[0], lane);
    team_barrier(team, S);
    u32 row = row_tile * 16 + lane;
    if (slice == 0 && lane < 16 && row < part.w.rows) {
      float y = finish<F>(part.w, 0, row, sum_slices(red[buffer] + warp, S, lane));
      store(part.out, 0, row, y);
      if (a.residual.p) a.residual.p[row] += y;
    }
    if (unit + step >= total) pdl_launch();
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
  __shared__ float red[WARPS][16], results[WARPS * 16], scratch[32];
  pdl_launch();
  u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, head = blockIdx.y;
  if (head == gridDim.y - a.has_latent) {
    prefetch_row(a.latent.weight, a.latent.latent.cols);
    pdl_wait();
    latent_row(a.latent, 0, scratch);
    return;
  }
  u32 S = a.slices, side = WARPS / S, slice = warp % S, row_tile = blockIdx.x * side + warp / S;
  u32 cols = a.w.cols, tiles = num_tiles(a.w), row_tiles = (a.w.rows + 15) / 16;
  bool active = row_tile < row_tiles;
  u32 first = slice_start(slice, S, tiles), count = active ? slice_start(slice + 1, S, tiles) - first : 0;
  const Packed* w[1] = {&a.w};
  Pipe<F, 1> pipe;
  pipe.start(shared);
  pipe.aim(w, head, active ? row_tile : 0, first, count);
#pragma unroll
  for (int i = 0; i < pipe.D; i++) pipe.issue();
  pdl_wait();
  u8* x = shared + WARPS * pipe.RING;
  u32 c = row_column(0);
  if (warp * 256 < cols) {
    float v[8];
    if (a.joins) {
      if (c < cols) join8(a.attend, 0, head, c, v);
      else
#pragma unroll
        for (int k = 0; k < 8; k++) v[k] = 0.f;
    } else load8(v, a.x + head * a.x_head_stride, c, cols, is_wide(a.x + head * a.x_head_stride, cols));
    bool inside = c < tiles * 64;
    if constexpr (Is<F>::affine) digits8(v, inside ? x + c / 64 * DIGITS_BYTES : nullptr);
    else if (inside) *(uint4*)(x + c * 2) = pack8(v);
  }
  __syncthreads();
  float acc[1][4] = {};
  pipe.unit(acc, x, first, count, cols, [&] { pipe.issue(); });
  put_one(red[warp], acc[0], lane);
  __syncthreads();
  u32 i = threadIdx.x, row = blockIdx.x * side * 16 + i;
  if (i < side * 16) {
    float y = 0.f;
    if (row < a.w.rows) {
      y = finish<F>(a.w, head, row, sum_slices(red + i / 16 * S, S, i % 16));
      store(a.out, 0, head * a.w.rows + row, y);
    }
    results[i] = y;
  }
  if (!a.out_digits) return;
  __syncthreads();
  if (warp == 0) {
    float v[8];
#pragma unroll
    for (int k = 0; k < 8; k++) v[k] = lane * 8 < side * 16 ? results[(lane * 8 + k) % (WARPS * 16)] : 0.f;
    u32 column = head * a.w.rows + blockIdx.x * side * 16 + lane * 8;
    digits8(v, lane * 8 < side * 16 && blockIdx.x * side * 16 + lane * 8 < a.w.rows ? a.out_digits + column / 64 * DIGITS_BYTES : nullptr);
  }
}

// ---- the router ----

struct RouterArgs { const u8* weights; const float* bias; Mat out; RowInput in; u32 rows, cols; };
// As `plain` of matmul.cu with eight warps a row, which needs more than 2048 - 256 columns; the norm's threads have the columns that their part
// of the product wants. KIND 0 f32, 1 f16, 2 bf16. Grid: rows.
template <int KIND> DEVICE void router(const RouterArgs& a) {
  __shared__ float parts[8], scratch[32];
  pdl_launch();
  u32 row = blockIdx.x, cols = a.cols, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  u64 first = (u64)row * cols;
  prefetch_row(a.in.weight, cols);
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
#pragma unroll
  for (int i = 0; i < ROW_STEPS; i++) {
    u32 c = row_column(i);
    if (i * ROW_COLUMNS >= cols) break;
    float weight[8], e[8];
    load8(weight, a.in.weight, c, cols, true);
#pragma unroll
    for (int k = 0; k < 8; k++) v[i][k] = v[i][k] * scale * weight[k];
    if (blockIdx.x == 0) {
      store8(a.in.out.p, v[i], c, cols, true);
      if (a.in.out.twin) store8(a.in.out.twin, v[i], c, cols);
      if (a.in.out_digits) digits8(v[i], c < (cols + 63) / 64 * 64 ? a.in.out_digits + c / 64 * DIGITS_BYTES : nullptr);
    }
    if (c >= cols) continue;
    if constexpr (KIND == 0) {
      const u32 words[8] = {q[i][0].x, q[i][0].y, q[i][0].z, q[i][0].w, q[i][1].x, q[i][1].y, q[i][1].z, q[i][1].w};
#pragma unroll
      for (int k = 0; k < 8; k++) e[k] = __uint_as_float(words[k]);
    } else {
      const u32 words[4] = {q[i][0].x, q[i][0].y, q[i][0].z, q[i][0].w};
#pragma unroll
      for (int k = 0; k < 8; k++) {
        u16 bits = (u16)(words[k / 2] >> (16 * (k % 2)));
        e[k] = KIND == 2 ? bf16_to_f32(bits) : f16_to_f32(bits);
      }
    }
#pragma unroll
    for (int k = 0; k < 8; k++) acc = fmaf(e[k], v[i][k], acc);
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
KERNEL __launch_bounds__(256) router_f32(const __grid_constant__ RouterArgs a) { router<0>(a); }
KERNEL __launch_bounds__(256) router_f16(const __grid_constant__ RouterArgs a) { router<1>(a); }
KERNEL __launch_bounds__(256) router_bf16(const __grid_constant__ RouterArgs a) { router<2>(a); }

// ---- experts ----

// Gate and up of one group of matrices: h = f(x gate, x up).
struct UpPair { Packed gate, up; Mat out; const u8* x; };
struct UpArgs {
  UpPair routed, shared;  // shared: another format, or none (shared_blocks 0)
  u32 shared_blocks;      // the first blocks of the grid
  u32 slices, chooses, pad;
  RouteArgs route;        // chooses: made by every block for itself, and written by one; otherwise read
  Activation activation;
  u8* h_digits;           // routed h as digits, a part an expert, or null
  u32* arrived;           // a counter for 64 rows of h
};
template <int F, bool ROUTED> DEVICE void up(const UpArgs& a, const UpPair& pair, u32 block, u32 blocks, u8* shared) {
  __shared__ float red[2][WARPS][2][16];
  __shared__ u32 ids[32];
  u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  u32 S = a.slices, side = WARPS / S, team = warp / S, slice = warp % S, step = blocks * side;
  const Packed* w[2] = {&pair.gate, &pair.up};
  u32 row_tiles = (pair.gate.rows + 15) / 16, tiles = num_tiles(pair.gate), total = (ROUTED ? a.route.top_k : 1) * row_tiles;
  u32 first = slice_start(slice, S, tiles), count = slice_start(slice + 1, S, tiles) - first;
  Pipe<F, 2> pipe;
  pipe.start(shared);
  u32 unit = block * side + team, ahead = unit;
  auto issue = [&] {
    if (pipe.left == 0 && ahead < total) {
      pipe.aim(w, ROUTED ? ids[ahead / row_tiles] : 0, ahead % row_tiles, first, count);
      ahead += step;
    }
    pipe.issue();
  };
  if constexpr (ROUTED) {
    pdl_wait();
    if (a.chooses) {
      if (warp == 0) {
        u32 id;
        float weight;
        route_row(a.route, 0, (float*)shared, id, weight);
        if (lane < a.route.top_k) {
          ids[lane] = id;
          if (block == 0) { a.route.ids[lane] = id; a.route.weights.p[lane] = weight; }
        }
      }
#if __CUDA_ARCH__ >= 900
      // The scores lay where bulk copies will write.
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
    } else if (threadIdx.x < a.route.top_k) ids[threadIdx.x] = a.route.ids[threadIdx.x];
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < pipe.D; i++) issue();
  if constexpr (!ROUTED) pdl_wait();
  // The last of the four row tiles of 64 rows makes their digits. A row tile is reported one unit late, when its values have long
  // arrived: waiting for them there and then held up the whole team.
  auto report = [&](u32 done) {
    u32 k = done / row_tiles, row_tile = done % row_tiles, tile = k * (pair.gate.rows / 64) + row_tile / 4, last = 0;
    __threadfence();
    __syncwarp();
    if (lane == 0) last = atomicInc(a.arrived + tile, 3) == 3;
    if (!__shfl_sync(0xffffffffu, last, 0)) return;
    __threadfence();
    float v[8];
    const float* h = pair.out.p + k * pair.gate.rows + row_tile / 4 * 64 + lane % 8 * 8;
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = *(volatile const float*)(h + i);
    digits8(v, lane < 8 ? a.h_digits + (u64)tile * DIGITS_BYTES : nullptr);
  };
  bool reports = ROUTED && a.h_digits && slice == 0;
  u32 unreported = 0xffffffffu;
  for (u32 buffer = 0; unit < total; unit += step, buffer ^= 1) {
    u32 k = ROUTED ? unit / row_tiles : 0, row_tile = unit % row_tiles, matrix = ROUTED ? ids[k] : 0;
    float acc[2][4] = {};
    pipe.unit(acc, pair.x, first, count, pair.gate.cols, issue);
    put_one(red[buffer][warp][0], acc[0], lane);
    put_one(red[buffer][warp][1], acc[1], lane);
    team_barrier(team, S);
    if (slice != 0) continue;
    u32 row = row_tile * 16 + lane;
    if (lane < 16 && row < pair.gate.rows) {
      float gate = 0.f, up = 0.f;
      for (u32 s = 0; s < S; s++) { gate += red[buffer][warp + s][0][lane]; up += red[buffer][warp + s][1][lane]; }
      gate = finish<F>(pair.gate, matrix, row, gate);
      up = finish<F>(pair.up, matrix, row, up);
      store(pair.out, 0, k * pair.gate.rows + row, activate(a.activation, gate, up));
    }
    if (reports) {
      if (unreported != 0xffffffffu) report(unreported);
      unreported = unit;
    }
  }
  pdl_launch();
  if (reports && unreported != 0xffffffffu) report(unreported);
}
template <int F, int G> DEVICE void experts_up(const UpArgs& a) {
  extern __shared__ __align__(16) u8 shared[];
  if (blockIdx.x < a.shared_blocks) up<G, false>(a, a.shared, blockIdx.x, a.shared_blocks, shared);
  else up<F, true>(a, a.routed, blockIdx.x - a.shared_blocks, gridDim.x - a.shared_blocks, shared);
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
  u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  u32 S = a.slices, side = WARPS / S, team = warp / S, slice = warp % S;
  u32 row_tiles = (a.w.rows + 15) / 16, tiles = num_tiles(a.w);
  u32 first = slice_start(slice, S, tiles), count = slice_start(slice + 1, S, tiles) - first;
  const Packed* w[1] = {&a.w};
  pipe.start(shared);
  pdl_wait();
  if (threadIdx.x < a.top_k) { ids[threadIdx.x] = a.ids[threadIdx.x]; weights[threadIdx.x] = a.weights.p[threadIdx.x]; }
  __syncthreads();
  u32 ahead_tile = blockIdx.x, ahead_k = team;
  auto issue = [&] {
    if (pipe.left == 0) {
      if (ahead_k >= a.top_k) { ahead_k = team; ahead_tile += gridDim.x; }
      if (ahead_tile < row_tiles && ahead_k < a.top_k) {
        pipe.aim(w, ids[ahead_k], ahead_tile, first, count);
        ahead_k += side;
      }
    }
    pipe.issue();
  };
#pragma unroll
  for (int i = 0; i < pipe.D; i++) issue();
  u32 turn = 0;
  for (u32 row_tile = blockIdx.x; row_tile < row_tiles; row_tile += gridDim.x, turn++) {
    float* here = results + (turn & 1) * a.top_k * S * 16;
    for (u32 k = team; k < a.top_k; k += side) {
      float acc[1][4] = {};
      pipe.unit(acc, a.x + k * a.part_bytes, first, count, a.w.cols, issue);
      put_one(here + (k * S + slice) * 16, acc[0], lane);
    }
    if (row_tile + gridDim.x >= row_tiles) pdl_launch();
    __syncthreads();
    u32 row = row_tile * 16 + lane;
    // Another warp each time, so that no one falls behind.
    if (warp == turn % WARPS && lane < 16 && row < a.w.rows) {
      float sum = a.plus.p ? a.plus.p[row] : 0.f;
      for (u32 k = 0; k < a.top_k; k++)
        sum = fmaf(weights[k], finish<F>(a.w, ids[k], row, sum_slices((const float(*)[16])(here + k * S * 16), S, lane)), sum);
      store(a.out, 0, row, sum);
      if (a.residual.p) a.residual.p[row] += sum;
    }
  }
}

#define KERNELS(NAME, F) \
  KERNEL __launch_bounds__(256, 3) line_##NAME(const __grid_constant__ LineArgs a) { line<F>(a); } \
  KERNEL __launch_bounds__(256, 3) heads_##NAME(const __grid_constant__ HeadsArgs a) { heads<F>(a); } \
  KERNEL __launch_bounds__(256, 3) up_##NAME##_##NAME(const __grid_constant__ UpArgs a) { experts_up<F, F>(a); } \
  KERNEL __launch_bounds__(256, 3) experts_down_##NAME(const __grid_constant__ DownArgs a) { experts_down<F>(a); }
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
