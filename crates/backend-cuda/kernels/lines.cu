// Products of nine to 32 rows of activations with dense weights: a block has one slice of the columns, of all rows, in shared memory.
//
// With rows on their way through a ring (few_line of few.cu) every block of row tiles reads them again, which with 32 rows were more bytes than the weights, from
// a second-level cache that gives multiprocessors some 5.5 TB/s altogether. Here a block copies its columns once, and its warps go through many row
// tiles of weights. A cluster of blocks has all columns: the sums of its slices lie in their blocks' shared memory, each block adds a part of them in the order of the
// slices, and stores whole lines. So the result has the bits of few_line: the same sums of a slice, added in the same order.
//
// Only on GPUs with clusters and bulk copies; others have few_line.
#include "barriers.cuh"
#include "lots.cuh"

// Units in row tiles of a cluster.
struct LinesArgs : DenseArgs {
  u32 depth;          // slots of a warp's ring
  u32 x_at;           // bytes of shared memory before the rows, whose place the sums of slices take later
  u32 shares, pad;    // blocks that have a unit's slices where they are no cluster, all of which are resident; else 0
  float* sums;        // shares: of each unit and slice; and
  u32* arrived;       // two counters a unit, zero between two launches
};

#if __CUDA_ARCH__ >= 900

#define CHUNK 8        // tiles of columns that arrive together
#define MAX_CHUNKS 16

DEVICE u32 cluster_rank() { u32 r; asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r)); return r; }
DEVICE u32 cluster_size() { u32 r; asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(r)); return r; }
// Four floats at the address `at` of this block, of block `rank` of the cluster.
DEVICE float4 cluster_load(u32 at, u32 rank) {
  float4 v;
  asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(cluster_address(at, rank)) : "memory");
  return v;
}

// Blocks that share a unit without being a cluster wait for each other. What they wrote before, all of them see behind it.
DEVICE void shares_barrier(u32* arrived, u32 shares) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    atomicAdd(arrived, 1);
    u32 seen = 0;
    while (seen < shares) asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(arrived) : "memory");
    // The last one to leave makes the counters ready for the next step.
    if (atomicInc(arrived + 1, shares - 1) == shares - 1) atomicExch(arrived, 0);
  }
  __syncthreads();
}
DEVICE float4 load_sums(const float* p) {
  float4 v;
  asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p) : "memory");
  return v;
}

// A warp's ring of `depth` slots of C tiles of R neighbouring row tiles; as Pipe, in as much shared memory as there is.
template <int F, int R, int C> struct DeepPipe : Pipe<F, R, C, 1> {
  typedef Pipe<F, R, C, 1> Base;
  static constexpr u32 SLOT = Base::SLOT;
  u32 depth;

  static METHOD u32 bytes(u32 depth) { return depth * SLOT + (depth * 8 + 127) / 128 * 128; }
  METHOD void start(u8* shared, u32 slots) {
    depth = slots;
    this->lane = threadIdx.x & 31;
    this->ring = (u32)__cvta_generic_to_shared(shared) + warp_index() * bytes(depth);
    this->bars = this->ring + depth * SLOT;
    this->put = this->take = this->phases = this->left = 0;
    if (this->lane == 0) {
      for (u32 d = 0; d < depth; d++) barrier_init(this->bars + 8 * d, 1);
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncwarp();
  }
  METHOD void issue() {
    u32 n = this->left < C ? this->left : C, slot = this->ring + this->put * SLOT, bar = this->bars + 8 * this->put;
    if (n == 0) return;
    if (this->lane == 0) {
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(n * (R * Base::TILE)) : "memory");
#pragma unroll
      for (int r = 0; r < R; r++)
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
            ::"r"(slot + r * (C * Base::TILE)), "l"(this->code[r]), "r"(n * Base::TILE), "r"(bar) : "memory");
    }
#pragma unroll
    for (int r = 0; r < R; r++) this->code[r] += n * Base::TILE;
    this->left -= n;
    this->put = this->put + 1 == depth ? 0 : this->put + 1;
  }
  // Waits for the oldest slot.
  METHOD u32 next() {
    u32 slot = this->ring + this->take * SLOT;
    barrier_wait(this->bars + 8 * this->take, this->phases >> this->take & 1);
    this->phases ^= 1u << this->take;
    this->take = this->take + 1 == depth ? 0 : this->take + 1;
    return slot;
  }
};

// The block's columns of up to ROWS rows: [tile][row][128 bytes], and behind the rows of a tile their scales and sums (digits), for two lots in 16 bytes a lane.
template <int F, int ROWS> struct Columns32 {
  static constexpr bool BYTES = Is<F>::affine;
  static constexpr u32 STEP = ROWS * (BYTES ? 136 : 128), FROM = Form<F>::tile;
  u32 at, bars;  // shared memory; a barrier a chunk
  u32 known;     // chunks that this warp knows are there

  METHOD void start(u32 at_, u32 bars_) {
    at = at_;
    bars = bars_;
    if (threadIdx.x == 0)
      for (u32 c = 0; c < MAX_CHUNKS; c++) barrier_init(bars + 8 * c, blockDim.x);
  }
  // By all threads: copies `tiles` tiles of `rows` rows, the first of which starts at `from`. Pieces of 16 bytes: neighbouring lanes have neighbouring ones.
  METHOD void copy(const u8* from, u64 row_bytes, u32 rows, u32 tiles) {
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (u32 chunk = 0; chunk * CHUNK < tiles; chunk++) {
      u32 first = chunk * CHUNK, n = tiles - first < CHUNK ? tiles - first : CHUNK;
      for (u32 row = warp; row < rows; row += blockDim.x / 32) {
        const u8* source = from + row * row_bytes + first * FROM;
        u32 to = at + first * STEP + row * 128;
        // bfloat16: halves of odd rows change places, so that two rows are in different banks.
        u32 turn = BYTES ? 0 : (row & 1) * 64;
        for (u32 p = lane; p < n * 8; p += 32) copy_async<16>(to + p / 8 * STEP + (p % 8 * 16 ^ turn), source + p / 8 * FROM + p % 8 * 16);
        if constexpr (BYTES)
          if (lane < 2 * n)
            copy_async<4>(at + (first + lane / 2) * STEP + ROWS * 128 + row / 8 * 64 + row % 4 * 16 + row / 4 % 2 * 8 + lane % 2 * 4,
                source + lane / 2 * FROM + 128 + lane % 2 * 12);
      }
      asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(bars + 8 * chunk) : "memory");
    }
  }
  // Waits until the tiles before `end` are there, if those before were.
  METHOD void wait(u32 end) {
    for (; known * CHUNK < end; known++) barrier_wait(bars + 8 * known, 0);
  }
};

// acc += C tiles (or one) of the slot times the rows of the tiles at `x`.
template <int F, int ROWS, int R, int N, typename P> DEVICE void multiply_columns(P& pipe, float acc[R][ROWS / Lot<F>::rows][Lot<F>::sums], u32 slot, u32 x) {
  typedef Columns32<F, ROWS> X;
  u32 lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  if constexpr (Is<F>::affine) {
    u32 digits = x + g / 2 * 128 + 16 * t + (g & 1) * 64, about = x + ROWS * 128 + 16 * t;
    uint4 two = make_uint4(0, 0, 0, 0);
    multiply_tiles<F, R, ROWS / Lot<F>::rows, N>(pipe, acc, slot, [&](Loaded<true>& to, int i, int q) {
      to.x = shared_load<uint4>(digits + i * X::STEP + q * 512);
      if (q % 2 == 0) two = shared_load<uint4>(about + i * X::STEP + q / 2 * 64);
      to.scale = __uint_as_float(q % 2 ? two.z : two.x);
      to.sum = __uint_as_float(q % 2 ? two.w : two.y);
    });
  } else {
    u32 columns = x + g * 128 + 16 * t + (g & 1) * 64, other = columns ^ 64;
    multiply_tiles<F, R, ROWS / Lot<F>::rows, N>(pipe, acc, slot, [&](Loaded<false>& to, int i, int q) {
      to.columns.b[0] = shared_load<uint4>(columns + i * X::STEP + q * 1024);
      to.columns.b[1] = shared_load<uint4>(other + i * X::STEP + q * 1024);
    });
  }
}

// Where a unit's row tiles are.
struct Place { u32 part, first_row; };
DEVICE Place place_in(const LinesArgs& a, u32 at, u32 unit_rows) {
  u32 k = 0;
  while (k + 1 < a.num_parts && at >= a.first_unit[k + 1]) k++;
  return {k, (at - a.first_unit[k]) * unit_rows};
}
DEVICE bool is_aligned(const void* p) { return (u64)p % 16 == 0; }
DEVICE void store4(const Mat& m, u32 n, u32 column, const float v[4], u32 count) {
  u64 at = (u64)n * m.stride + column;
  if (count == 4 && is_aligned(m.p + at)) {
    *(float4*)(m.p + at) = make_float4(v[0], v[1], v[2], v[3]);
    if (m.twin) *(uint2*)(m.twin + at) = make_uint2(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]));
  } else
    for (u32 k = 0; k < count; k++) store(m, n, column + k, v[k]);
}

// By all threads of the cluster: adds the slices' sums of a unit of `unit_rows` rows of weights, `line` floats a row of activations, and stores them. They are at `sums` of each
// block's shared memory, or in memory where blocks are no cluster.
// Each block has its share of the rows of activations.
template <int F, int ROWS> DEVICE void join(const LinesArgs& a, u32 sums, const float* shared_sums, u32 line, u32 unit_rows, Place place, u32 matrix, u32 rank, u32 size) {
  const Part& part = a.part[place.part];
  u32 first = a.rows * rank / size, end = a.rows * (rank + 1) / size, fours = unit_rows / 4, own = a.slices / size;
  for (u32 item = threadIdx.x; item < (end - first) * fours; item += blockDim.x) {
    u32 n = first + item / fours, r = item % fours * 4, row = place.first_row + r;
    if (row >= part.w.rows) continue;
    u32 count = part.w.rows - row < 4 ? part.w.rows - row : 4;
    float* residual = a.residual.p + (u64)n * a.residual.stride + row;
    float old[4] = {0.f, 0.f, 0.f, 0.f}, sum[4] = {0.f, 0.f, 0.f, 0.f};
    bool wide = count == 4 && is_aligned(residual);
    if (a.residual.p) {
      if (wide) { float4 v = *(const float4*)residual; old[0] = v.x; old[1] = v.y; old[2] = v.z; old[3] = v.w; }
      else
        for (u32 k = 0; k < count; k++) old[k] = residual[k];
    }
    float4 v[8];
#pragma unroll
    for (u32 s = 0; s < 8; s++)
      if (s < a.slices) {
        if (a.shares) v[s] = load_sums(shared_sums + (u64)(s * ROWS + n) * line + r);
        else v[s] = cluster_load(sums + ((s % own * ROWS + n) * line + r) * 4, s / own);
      }
#pragma unroll
    for (u32 s = 0; s < 8; s++)
      if (s < a.slices) { sum[0] += v[s].x; sum[1] += v[s].y; sum[2] += v[s].z; sum[3] += v[s].w; }
    for (u32 k = 0; k < count; k++) sum[k] = finish<F>(part.w, matrix, row + k, sum[k]);
    if (a.residual.p) {
      if (wide) *(float4*)residual = make_float4(old[0] + sum[0], old[1] + sum[1], old[2] + sum[2], old[3] + sum[3]);
      else
        for (u32 k = 0; k < count; k++) residual[k] = old[k] + sum[k];
    }
    store4(part.out, n, matrix * part.w.rows + row, sum, count);
  }
}

// Grid: clusters of blocks, or blocks that share a unit, a unit each. Blocks of a unit have neighbouring slices, the warps of a slice neighbouring row tiles, R each.
template <int F, int ROWS, int R, int C> DEVICE void lines(const LinesArgs& a) {
  extern __shared__ __align__(1024) u8 shared[];
  __shared__ __align__(8) u64 bars[MAX_CHUNKS];
  constexpr int Q = ROWS / Lot<F>::rows, N = Lot<F>::sums;
  typedef DeepPipe<F, R, C> P;
  typedef Columns32<F, ROWS> X;
  u32 warp = warp_index(), size = a.shares ? a.shares : cluster_size(), rank = a.shares ? blockIdx.x % size : cluster_rank();
  u32 S = a.slices, own = S / size, team = blockDim.x / 32 / own;
  u32 slice = rank * own + warp / team, member = warp % team, tiles = num_tiles(a.part[0].w), unit_rows = team * R * 16;
  u32 block_first = slice_start(rank * own, S, tiles), first = slice_start(slice, S, tiles), count = slice_start(slice + 1, S, tiles) - first;
  u32 per_matrix = a.first_unit[a.num_parts], unit = blockIdx.x / size, matrix = unit / per_matrix;
  Place place = place_in(a, unit % per_matrix, unit_rows);
  P pipe;
  X x;
  pipe.start(shared, a.depth);
  pipe.aim(a.part[place.part].w, matrix, place.first_row / 16 + member * R, first, count);
  for (u32 d = 0; d < a.depth; d++) pipe.issue();
  x.start((u32)__cvta_generic_to_shared(shared) + a.x_at, (u32)__cvta_generic_to_shared(bars));
  x.known = (first - block_first) / CHUNK;
  __syncthreads();
  pdl_launch();
  pdl_wait();
  x.copy(a.x + (u64)matrix * a.x_matrix_bytes + block_first * Form<F>::tile, a.x_bytes, a.rows, slice_start((rank + 1) * own, S, tiles) - block_first);
  float acc[R][Q][N] = {};
  for (u32 j = 0; j < count; j += C) {
    u32 tile = first - block_first + j, n = count - j < C ? count - j : C, at = x.at + tile * X::STEP;
    x.wait(tile + n);
    u32 slot = pipe.next();
    if (n == C) multiply_columns<F, ROWS, R, C>(pipe, acc, slot, at);
    else
      for (u32 i = 0; i < n; i++) multiply_columns<F, ROWS, R, 1>(pipe, acc, slot + i * P::TILE, at + i * X::STEP);
    __syncwarp();
    pipe.issue();
  }
  u32 line = unit_rows + 8;
  float* shared_sums = a.sums + (u64)unit * S * ROWS * line;
  // Nobody of the block needs the rows any more: sums take their place.
  if (!a.shares) __syncthreads();
#pragma unroll
  for (int i = 0; i < R; i++)
    each_sum<F, Q>([&](u32 r, u32 n, int q, int k) {
      u32 at = (member * R + i) * 16 + r;
      if (a.shares) shared_sums[(u64)(slice * ROWS + n) * line + at] = acc[i][q][k];
      else asm volatile("st.shared.f32 [%0], %1;" ::"r"(x.at + ((warp / team * ROWS + n) * line + at) * 4), "f"(acc[i][q][k]) : "memory");
    });
  if (a.shares) shares_barrier(a.arrived + 2 * unit, size);
  else if (size > 1) cluster_sync();
  else __syncthreads();
  join<F, ROWS>(a, x.at, shared_sums, line, unit_rows, place, matrix, rank, size);
  // Others read the sums of this block.
  if (size > 1 && !a.shares) cluster_sync();
}

#ifndef NO_KERNELS
#define LINES(NAME, F, ROWS, R, C, WARPS_) \
  KERNEL __launch_bounds__(32 * WARPS_, 1) lines##ROWS##_##R##_##NAME(const __grid_constant__ LinesArgs a) { lines<F, ROWS, R, C>(a); }
#define KERNELS(NAME, F) \
  LINES(NAME, F, 16, 1, 4, 16) LINES(NAME, F, 16, 3, 2, 8) LINES(NAME, F, 16, 4, 2, 8) \
  LINES(NAME, F, 32, 1, 4, 16) LINES(NAME, F, 32, 3, 2, 8) LINES(NAME, F, 32, 4, 2, 8)
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
#endif
#endif
