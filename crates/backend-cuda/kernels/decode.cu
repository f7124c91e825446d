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
#include "product.cuh"
#include "route.cuh"

// c = a b + BIAS, exactly; `start` false adds to c.
DEVICE void mma_bytes_biased(int d[4], const u32 a[4], u32 b0, u32 b1, const int c[4]) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}

// The row in the form of F, 64 columns: bytes.
template <int F> struct Form { static constexpr u32 tile = Is<F>::affine ? DIGITS_BYTES : 128; };

// The tiles of one warp on their way through shared memory: D slots of C neighbouring tiles of R matrices, each one bulk copy (TMA) a
// matrix with a barrier of its own. A lane asks for 2 KB with two instructions; copies of 16 bytes a lane and their addresses were a third
// of all instructions. Rows g and g + 8 of the sums are in acc[0] and acc[2] of the lanes with t = 0.
template <int F, int R> struct Pipe {
  static constexpr int N = Words<F>::n;
  static constexpr int TILE = N * 128 + (Is<F>::e8m0 ? 32 : 64);
  static constexpr int C = R == 2 || N > 5 ? 2 : 4;
  static constexpr int D = R == 1 && N > 5 ? 4 : 3;
  static constexpr int SLOT = R * C * TILE;
  static constexpr int RING = D * SLOT + 64;  // and the barriers
  u32 ring, bars, lane;
  u32 put, take, phases;  // next slots; a bit a slot: the parity that its next copy ends
  const u8* code[R];
  u32 left;               // tiles of the unit that are not on their way yet

  METHOD void start(u8* shared) {
    lane = threadIdx.x & 31;
    ring = (u32)__cvta_generic_to_shared(shared) + threadIdx.x / 32 * RING;
    bars = ring + D * SLOT;
    put = take = phases = left = 0;
#if __CUDA_ARCH__ >= 900
    if (lane == 0) {
#pragma unroll
      for (int d = 0; d < D; d++) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(bars + 8 * d) : "memory");
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncwarp();
#endif
  }
  // Points the cursor at `count` tiles.
  METHOD void aim(const Packed* const w[R], u32 matrix, u32 row_tile, u32 first, u32 count) {
    left = count;
#pragma unroll
    for (int r = 0; r < R; r++) code[r] = (const u8*)(w[r]->codes + matrix * w[r]->codes_stride) + (row_tile * num_tiles(*w[r]) + first) * (u64)TILE;
  }
  // Starts copying the next tiles at the cursor, if there are any.
  METHOD void issue() {
    u32 n = left < C ? left : C, slot = ring + put * SLOT;
    if (n) {
#if __CUDA_ARCH__ >= 900
      if (lane == 0) {
        u32 bar = bars + 8 * put;
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(n * (R * TILE)) : "memory");
#pragma unroll
        for (int r = 0; r < R; r++)
          asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
              ::"r"(slot + r * (C * TILE)), "l"(code[r]), "r"(n * TILE), "r"(bar) : "memory");
      }
#else
#pragma unroll
      for (int r = 0; r < R; r++)
        for (u32 at = lane * 16; at < n * TILE; at += 512) copy_async<16>(slot + r * (C * TILE) + at, code[r] + at);
#endif
#pragma unroll
      for (int r = 0; r < R; r++) code[r] += n * TILE;
      left -= n;
      put = put + 1 == D ? 0 : put + 1;
    }
#if __CUDA_ARCH__ < 900
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
  }
  // Waits for the oldest slot.
  METHOD void wait() {
#if __CUDA_ARCH__ >= 900
    u32 bar = bars + 8 * take, parity = phases >> take & 1, done = 0;
    while (!done)
      asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }" : "=r"(done) : "r"(bar), "r"(parity) : "memory");
    phases ^= 1u << take;
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(D - 1) : "memory");
    __syncwarp();
#endif
  }
  METHOD void read(Codes<F>& codes, Scales<F, true>& scales, u32 tile) {
    constexpr int four = N / 4 * 4;
#pragma unroll
    for (int k = 0; k < four; k += 4) {
      uint4 v = shared_load<uint4>(tile + lane * 16 + k * 128);
      codes.w[k] = v.x; codes.w[k + 1] = v.y; codes.w[k + 2] = v.z; codes.w[k + 3] = v.w;
    }
    if constexpr (N % 4 >= 2) {
      uint2 v = shared_load<uint2>(tile + lane * 8 + four * 128);
      codes.w[four] = v.x; codes.w[four + 1] = v.y;
    }
    if constexpr (N % 2 == 1) codes.w[N - 1] = shared_load<u32>(tile + lane * 4 + (N - 1) * 128);
    u32 p = tile + N * 128, g = lane / 4, t = lane % 4;
    if constexpr (F == NVFP4) scales.raw = shared_load<u32>(p + (g * 2 + t / 2) * 4);
    else if constexpr (Is<F>::e8m0) scales.raw = shared_load<u32>(p + g * 4);
    else if constexpr (F == FP8) { uint2 v = shared_load<uint2>(p + g * 8); scales.s[0] = __uint_as_float(v.x); scales.s[1] = __uint_as_float(v.y); }
    else scales.v = shared_load<uint2>(p + g * 8);
  }
  // acc += a tile of each matrix times 64 columns of the row, which start at `x` (this lane's part of them).
  METHOD void tile(float acc[R][4], u32 at, const u8* x, u32 column, u32 cols) {
    uint4 b0, b1;
    float scale = 0.f, sum = 0.f;
    u32 g = lane / 4, t = lane % 4;
    if constexpr (Is<F>::affine) {
      // Column 0 of the product is the high digits, column 1 the low ones; nobody reads the others.
      b0 = *(const uint4*)(x + 16 * t + (g & 1) * 64);
      scale = *(const float*)(x + 128);
      sum = *(const float*)(x + 140);
    } else {
      b0 = b1 = make_uint4(0, 0, 0, 0);
      if (column + 8 * t < cols) b0 = *(const uint4*)(x + 16 * t);
      if (column + 32 + 8 * t < cols) b1 = *(const uint4*)(x + 16 * t + 64);
    }
#pragma unroll
    for (int r = 0; r < R; r++) {
      Codes<F> codes;
      Scales<F, true> scales;
      read(codes, scales, at + r * (C * TILE));
      if constexpr (Is<F>::affine) {
        const int bias[4] = {BIAS_BITS, BIAS_BITS, BIAS_BITS, BIAS_BITS};
        int c[4], d[4];
        u32 a0[4] = {code_bytes<F>(codes, 0), code_bytes<F>(codes, 4), code_bytes<F>(codes, 1), code_bytes<F>(codes, 5)};
        u32 a1[4] = {code_bytes<F>(codes, 2), code_bytes<F>(codes, 6), code_bytes<F>(codes, 3), code_bytes<F>(codes, 7)};
        mma_bytes_biased(c, a0, b0.x, b0.y, bias);
        mma_bytes_biased(d, a1, b0.z, b0.w, c);
        float s0 = __uint_as_float(scales.v.x << 16), o0 = __uint_as_float(scales.v.x & 0xffff0000u);
        float s1 = __uint_as_float(scales.v.y << 16), o1 = __uint_as_float(scales.v.y & 0xffff0000u);
        float y0 = fmaf(__int_as_float(d[0]) - BIAS, 128.f, __int_as_float(d[1]) - BIAS);
        float y1 = fmaf(__int_as_float(d[2]) - BIAS, 128.f, __int_as_float(d[3]) - BIAS);
        acc[r][0] = fmaf(o0, sum, fmaf(s0 * scale, y0, acc[r][0]));
        acc[r][2] = fmaf(o1, sum, fmaf(s1 * scale, y1, acc[r][2]));
      } else {
        Taken<F, true> taken;
        take_apart<F, true>(taken, codes, scales);
        Columns<false> columns;
        columns.b[0] = b0;
        columns.b[1] = b1;
        accumulate<F, true>(acc[r], taken, scales, columns, false);
      }
    }
  }
  // Multiplies `count` tiles from `first` on, which have been issued in this order; `refill` keeps the ring full.
  template <typename Refill>
  METHOD void unit(float acc[R][4], const u8* x, u32 first, u32 count, u32 cols, Refill refill) {
    x += first * Form<F>::tile;
    u32 column = first * 64;
    for (u32 j = 0; j < count; j += C) {
      wait();
      u32 slot = ring + take * SLOT;
      take = take + 1 == D ? 0 : take + 1;
      if (count - j >= C) {
#pragma unroll
        for (int i = 0; i < C; i++) tile(acc, slot + i * TILE, x + i * Form<F>::tile, column + i * 64, cols);
      } else {
        for (u32 i = 0; i < count - j; i++) tile(acc, slot + i * TILE, x + i * Form<F>::tile, column + i * 64, cols);
      }
      x += C * Form<F>::tile;
      column += C * 64;
      __syncwarp();
      refill();
    }
  }
};

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

// Threads of a team of `slices` warps wait for each other.
DEVICE void team_barrier(u32 team, u32 slices) {
  if (slices == 1) __syncwarp();
  else asm volatile("bar.sync %0, %1;" ::"r"(1 + team), "r"(slices * 32) : "memory");
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

// What stands beside the product of a layer's queries with its heads: the rest of latent attention's input.
struct Latent {
  Mat latent, k_pe, q, table;   // normed in place; rotated in place
  const float* weight;
  const u32* slots;
  void* cache;
  u32 cache_width, cache_bf16;
  u32 num_heads, head_stride, interleaved;
  float eps;
};
struct HeadsArgs {
  Packed w;
  Mat out;              // [heads * rows]
  u8* out_digits;       // the result once more as digits, or null; a block then has whole 64 rows
  const float* x;       // inputs of the heads
  u32 x_head_stride, slices, joins, has_latent;
  AttendArgs attend;    // joins: the input is attention's result
  Latent latent;        // has_latent: blocks of one more row of the grid
};
DEVICE void latent_row(const Latent& l, float* scratch) {
  u32 half = l.table.cols / 2;
  if (blockIdx.x == 0) {
    u32 cols = l.latent.cols, c = row_column(0);
    u64 at = (u64)l.slots[0] * l.cache_width;
    float v[1][8], weight[8];
    load8(v[0], l.latent.p, c, cols, is_wide(l.latent.p, cols));
    load8(weight, l.weight, c, cols, is_wide(l.weight, cols));
    float scale = inverse_rms(v, 1, cols, l.eps, scratch);
#pragma unroll
    for (int k = 0; k < 8; k++) {
      if (c + k >= cols) continue;
      float y = v[0][k] * scale * weight[k];
      store(l.latent, 0, c + k, y);
      cache_store(l.cache, l.cache_bf16, at + c + k, y);
    }
    for (u32 i = threadIdx.x; i < half; i += blockDim.x) {
      rope_pair(l.k_pe, 0, 0, l.table.p, half, i, l.interleaved);
      u32 c0 = l.interleaved ? 2 * i : i, c1 = l.interleaved ? 2 * i + 1 : i + half;
      cache_store(l.cache, l.cache_bf16, at + cols + c0, l.k_pe.p[c0]);
      cache_store(l.cache, l.cache_bf16, at + cols + c1, l.k_pe.p[c1]);
    }
    if (gridDim.x > 1) return;
  }
  u32 first = gridDim.x > 1 ? blockIdx.x - 1 : 0, blocks = gridDim.x > 1 ? gridDim.x - 1 : 1;
  for (u32 i = first * blockDim.x + threadIdx.x; i < l.num_heads * half; i += blocks * blockDim.x)
    rope_pair(l.q, 0, i / half * l.head_stride, l.table.p, half, i % half, l.interleaved);
}
// Grid (blocks of 8 / slices row tiles, heads and one more with a latent).
template <int F> DEVICE void heads(const HeadsArgs& a) {
  extern __shared__ __align__(16) u8 shared[];
  __shared__ float red[WARPS][16], results[WARPS * 16], scratch[32];
  pdl_launch();
  u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, head = blockIdx.y;
  if (head == gridDim.y - a.has_latent) {
    prefetch_row(a.latent.weight, a.latent.latent.cols);
    pdl_wait();
    latent_row(a.latent, scratch);
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
