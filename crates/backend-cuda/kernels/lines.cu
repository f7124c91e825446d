// Products of two to 32 rows of activations with dense weights: a block has one slice of the columns, of all rows, in shared memory.
//
// With rows on their way through a ring (few_line of few.cu) every block of row tiles reads them again, which with 32 rows were more bytes than the weights, from
// a second-level cache that gives multiprocessors some 5.5 TB/s altogether. Here a block copies its columns once, and its warps go through many row
// tiles of weights. A cluster of blocks has all columns: the sums of its slices lie in their blocks' shared memory, each block adds a part of them in the order of the
// slices, and stores whole lines. So the result has the bits of few_line: the same sums of a slice, added in the same order.
//
// Only on GPUs with clusters and bulk copies; others have few_line.
#include "barriers.cuh"
#include "lots.cuh"
#include "wgmma.cuh"

// Units in row tiles of a cluster.
struct LinesArgs : DenseArgs {
  u32 depth;          // slots of a warp's ring
  u32 x_at, sums_at;  // bytes of shared memory before the rows, and before the sums of slices
  u32 sums_bytes;     // between the sums of two units in turn; 0: they lie where the rows were, and a cluster has one unit
  u32 shares, pad;    // blocks that have a unit's slices where they are no cluster, all of which are resident; else 0
  float* sums;        // shares: of each unit and slice; and
  u32* arrived;       // two counters a unit
};

#if __CUDA_ARCH__ >= 900 || !defined(__CUDA_ARCH__)

#define CHUNK 8        // tiles of columns that arrive together
#define MAX_CHUNKS 16

DEVICE u32 cluster_rank() { u32 r; asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r)); return r; }
DEVICE u32 cluster_size() { u32 r; asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(r)); return r; }
DEVICE void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Four floats at the address `at` of this block, of block `rank` of the cluster.
DEVICE float4 cluster_load(u32 at, u32 rank) {
  u32 there;
  float4 v;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(rank));
  asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(there) : "memory");
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
    this->ring = (u32)__cvta_generic_to_shared(shared) + threadIdx.x / 32 * bytes(depth);
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

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// The same as wgmma wants its second operand: [pair of tiles][32 rows' high digits, then their low ones][128 bytes: 64 of each tile], pieces of 16 bytes swizzled by the
// row's number; then [tile][row] scales and sums. Word (t, w) of a tile's digits of a row becomes word (w, t), the order in which lanes hold codes.
template <int F> struct WideColumns : Columns32<F, 32> {
  u32 about;
  METHOD void copy(const u8* from, u64 row_bytes, u32 rows, u32 tiles) {
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    about = this->at + (tiles + 1) / 2 * 8192;
    for (u32 chunk = 0; chunk * CHUNK < tiles; chunk++) {
      u32 first = chunk * CHUNK, end = first + CHUNK < tiles ? first + CHUNK : tiles;
      for (u32 row = warp; row < rows; row += blockDim.x / 32) {
        const u8* source = from + row * row_bytes;
        u32 to = this->at + (row + lane / 16 * 32) * 128 + lane % 16 / 4 * 4;
        for (u32 tile = first; tile < end; tile++) copy_async<4>(to + tile / 2 * 8192 + ((tile % 2 * 4 + lane % 4) ^ (row & 7)) * 16, source + tile * DIGITS_BYTES + lane * 4);
        u32 tile = first + lane / 2;
        if (tile < end) copy_async<4>(about + tile * 256 + row * 8 + lane % 2 * 4, source + tile * DIGITS_BYTES + 128 + lane % 2 * 12);
      }
      asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(this->bars + 8 * chunk) : "memory");
    }
  }
  METHOD void wait(u32 end) {
    if (this->known * CHUNK >= end) return;
    Columns32<F, 32>::wait(end);
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
};
#define R4(i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3])
DEVICE void wgmma_digits(u32 d[32], u32 a0, u32 a1, u32 a2, u32 a3, u64 b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k32.s32.u8.s8 " WGMMA_SUMS ", {%32,%33,%34,%35}, %36, 1;"
      : R4(0), R4(4), R4(8), R4(12), R4(16), R4(20), R4(24), R4(28) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));
}
// acc += N tiles of the R row tiles of each warp of a warpgroup times 32 rows, by wgmma: 64 rows of weights, both digits of all rows.
template <int F, int R, int N, typename P> DEVICE void multiply_wide(P& pipe, float acc[R][16], u32 slot, const WideColumns<F>& x, u32 tile) {
  u32 t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < N; i++) {
    u64 b = descriptor(x.at + (tile + i) / 2 * 8192) + (tile + i) % 2 * 4;
    u32 d[R][32];
    uint2 scales[R];
#pragma unroll
    for (int r = 0; r < R; r++) {
      Codes<F> codes;
      Scales<F, true> v;
      pipe.read(codes, v, slot + (r * P::C + i) * P::TILE);
      scales[r] = v.v;
      u32 o[8];
#pragma unroll
      for (int k = 0; k < 8; k++) o[k] = code_bytes<F>(codes, k);
#pragma unroll
      for (int k = 0; k < 32; k++) d[r][k] = BIAS_BITS;
      wgmma_fence();
      wgmma_digits(d[r], o[0], o[4], o[1], o[5], b);
      wgmma_digits(d[r], o[2], o[6], o[3], o[7], b + 2);
      wgmma_commit();
    }
#pragma unroll
    for (int r = 0; r < R; r++) {
      if (r + 1 < R) asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
      else asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
      for (int k = 0; k < 32; k++) asm volatile("" : "+r"(d[r][k])::"memory");
      float s[2] = {__uint_as_float(scales[r].x << 16), __uint_as_float(scales[r].y << 16)};
      float o[2] = {__uint_as_float(scales[r].x & 0xffff0000u), __uint_as_float(scales[r].y & 0xffff0000u)};
#pragma unroll
      for (int q = 0; q < 4; q++) {
        uint4 v = shared_load<uint4>(x.about + (tile + i) * 256 + q * 64 + t * 16);
        float scale[2] = {__uint_as_float(v.x), __uint_as_float(v.z)}, sum[2] = {__uint_as_float(v.y), __uint_as_float(v.w)};
#pragma unroll
        for (int e = 0; e < 4; e++) {
          float& a = acc[r][4 * q + e];
          a = fmaf(o[e >> 1], sum[e & 1], fmaf(s[e >> 1] * scale[e & 1], join_digits(d[r][4 * q + e], d[r][16 + 4 * q + e]), a));
        }
      }
    }
  }
}
#endif

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

// By all threads of the cluster: adds the slices' sums of a unit of `unit_rows` rows of weights, `line` floats a row of activations, and stores them.
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

// Grid: clusters, each with whole units or one of them. Blocks of a cluster have neighbouring slices, the warps of a slice neighbouring row tiles, R each.
template <int F, int ROWS, int R, int C, bool WIDE> DEVICE void lines(const LinesArgs& a) {
  extern __shared__ __align__(1024) u8 shared[];
  __shared__ __align__(8) u64 bars[MAX_CHUNKS];
  constexpr int Q = WIDE ? 1 : ROWS / Lot<F>::rows, N = WIDE ? 16 : Lot<F>::sums;
  typedef DeepPipe<F, R, C> P;
  u32 warp = threadIdx.x / 32, size = a.shares ? a.shares : cluster_size(), rank = a.shares ? blockIdx.x % size : cluster_rank();
  u32 S = a.slices, own = S / size, team = blockDim.x / 32 / own;
  u32 slice = rank * own + warp / team, member = warp % team, tiles = num_tiles(a.part[0].w), unit_rows = team * R * 16;
  u32 block_first = slice_start(rank * own, S, tiles), first = slice_start(slice, S, tiles), count = slice_start(slice + 1, S, tiles) - first;
  u32 per_matrix = a.first_unit[a.num_parts], total = per_matrix * a.matrices, clusters = gridDim.x / size, unit = blockIdx.x / size;
  P pipe;
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  typename Either<WIDE, WideColumns<F>, Columns32<F, ROWS>>::type x;
#else
  Columns32<F, ROWS> x;
#endif
  pipe.start(shared, a.depth);
  u32 ahead = unit;
  auto issue = [&] {
    if (pipe.left == 0 && ahead < total) {
      Place p = place_in(a, ahead % per_matrix, unit_rows);
      pipe.aim(a.part[p.part].w, ahead / per_matrix, p.first_row / 16 + member * R, first, count);
      ahead += clusters;
    }
    pipe.issue();
  };
  for (u32 d = 0; d < a.depth; d++) issue();
  x.start((u32)__cvta_generic_to_shared(shared) + a.x_at, (u32)__cvta_generic_to_shared(bars));
  x.known = (first - block_first) / CHUNK;
  __syncthreads();
  pdl_launch();
  pdl_wait();
  x.copy(a.x + (u64)(unit / per_matrix) * a.x_matrix_bytes + block_first * Form<F>::tile, a.x_bytes, a.rows, slice_start((rank + 1) * own, S, tiles) - block_first);
  u32 line = unit_rows + 8, turn = 0;
  for (; unit < total; unit += clusters) {
    float acc[R][Q][N] = {};
    for (u32 j = 0; j < count; j += C) {
      u32 tile = first - block_first + j, n = count - j < C ? count - j : C;
      x.wait(tile + n);
      u32 slot = pipe.next();
      if constexpr (WIDE) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
        float (*wide)[16] = (float (*)[16])acc;
        if (n == C) multiply_wide<F, R, C>(pipe, wide, slot, x, tile);
        else
          for (u32 i = 0; i < n; i++) multiply_wide<F, R, 1>(pipe, wide, slot + i * P::TILE, x, tile + i);
#endif
      } else {
        u32 at = x.at + tile * Columns32<F, ROWS>::STEP;
        if (n == C) multiply_columns<F, ROWS, R, C>(pipe, acc, slot, at);
        else
          for (u32 i = 0; i < n; i++) multiply_columns<F, ROWS, R, 1>(pipe, acc, slot + i * P::TILE, at + i * Columns32<F, ROWS>::STEP);
      }
      __syncwarp();
      issue();
    }
    u32 sums = (u32)__cvta_generic_to_shared(shared) + a.sums_at + turn * a.sums_bytes;
    float* shared_sums = a.sums + (u64)unit * S * ROWS * line;
    if (a.sums_bytes == 0 && !a.shares) __syncthreads();
#pragma unroll
    for (int i = 0; i < R; i++) {
      auto put = [&](u32 r, u32 n, float sum) {
        u32 at = (member * R + i) * 16 + r;
        if (a.shares) shared_sums[(u64)(slice * ROWS + n) * line + at] = sum;
        else asm volatile("st.shared.f32 [%0], %1;" ::"r"(sums + ((warp / team * ROWS + n) * line + at) * 4), "f"(sum) : "memory");
      };
      if constexpr (WIDE) {
        u32 g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
        for (int k = 0; k < 16; k++) put(g + k / 2 % 2 * 8, k / 4 * 8 + 2 * t + k % 2, acc[i][0][k]);
      } else each_sum<F, Q>([&](u32 r, u32 n, int q, int k) { put(r, n, acc[i][q][k]); });
    }
    if (a.shares) shares_barrier(a.arrived + 2 * unit, size);
    else if (size > 1) cluster_barrier();
    else __syncthreads();
    join<F, ROWS>(a, sums, shared_sums, line, unit_rows, place_in(a, unit % per_matrix, unit_rows), unit / per_matrix, rank, size);
    turn ^= 1;
  }
  // Others read the sums of this block.
  if (size > 1 && !a.shares) cluster_barrier();
}

#ifndef NO_KERNELS
#define LINES(NAME, F, ROWS, R, C, WARPS_) \
  KERNEL __launch_bounds__(32 * WARPS_, 1) lines##ROWS##_##R##_##C##_##WARPS_##_##NAME(const __grid_constant__ LinesArgs a) { lines<F, ROWS, R, C, false>(a); }
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define WIDE_LINES(NAME, F, R, C, WARPS_) \
  KERNEL __launch_bounds__(32 * WARPS_, 1) lines32w_##R##_##C##_##WARPS_##_##NAME(const __grid_constant__ LinesArgs a) { lines<F, 32, R, C, true>(a); }
#else
#define WIDE_LINES(NAME, F, R, C, WARPS_)
#endif
#ifdef VARIANTS
#define ALL(R, C, W) LINES(affine4, AFFINE4, 32, R, C, W) LINES(affine4, AFFINE4, 16, R, C, W) LINES(affine4, AFFINE4, 8, R, C, W)
ALL(1, 4, 16)
ALL(2, 2, 16)
ALL(2, 2, 12)
ALL(2, 4, 12)
ALL(3, 2, 12)
ALL(3, 2, 8)
ALL(4, 2, 8)
ALL(4, 1, 8)
WIDE_LINES(affine4, AFFINE4, 1, 4, 16)
WIDE_LINES(affine4, AFFINE4, 1, 2, 16)
WIDE_LINES(affine4, AFFINE4, 2, 2, 16)
WIDE_LINES(affine4, AFFINE4, 2, 2, 12)
WIDE_LINES(affine4, AFFINE4, 3, 2, 8)
#else
#define SIZES(NAME, F, ROWS) LINES(NAME, F, ROWS, 1, 4, 16) LINES(NAME, F, ROWS, 2, 2, 16)
#define KERNELS(NAME, F) SIZES(NAME, F, 8) SIZES(NAME, F, 16) SIZES(NAME, F, 32)
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
WIDE_LINES(affine2, AFFINE2, 1, 4, 16)
WIDE_LINES(affine3, AFFINE3, 1, 4, 16)
WIDE_LINES(affine4, AFFINE4, 1, 4, 16)
WIDE_LINES(affine5, AFFINE5, 1, 4, 16)
WIDE_LINES(affine6, AFFINE6, 1, 4, 16)
WIDE_LINES(affine8, AFFINE8, 1, 4, 16)
#endif
#endif
#endif
