// Products of many rows on Hopper: the tensor cores' own instruction (wgmma) over weights in registers and activations in shared memory.
//
// A block has 64 rows of activations and 64 rows of weights for each of three warpgroups that multiply. One thread more copies activations, several
// pieces of 64 columns ahead; a warp copies the weights of its own 16 rows and takes their codes apart, which are then the instruction's first
// operand as they are. Affine formats are multiplied as bytes with digits, the others as bfloat16. While the sums of one warpgroup become floats,
// those of the others are on their way through the tensor cores.
//
// The result has the bits of the kernels for few rows: the same sums of 64 columns, the same steps from them to a float, in the
// same order. Only on GPUs with wgmma (sm_90a); others have `gemm_*` of matmul.cu.
#include "barriers.cuh"
#include "product.cuh"
#include "wgmma.cuh"

#define TOKENS 64
#define CONSUMERS 3  // warpgroups that multiply
#define THREADS (128 * CONSUMERS + 128)
#define BLOCKED_BYTES (TOKENS * 136)  // 64 columns of digits of so many rows
#define BLOCKED_TWIN (TOKENS * 128)   // of bfloat16

struct Tile { u32 begin, first, count, matrix; };
// Which rows of activations tile `index` has: of the expert whose it is among all experts' tiles, in order; `count` 0: there is none.
DEVICE Tile tile_of(const Routing& r, u32 experts, u32 index) {
  u32 lane = threadIdx.x % 32, before = 0;
  for (u32 base = 0; base < experts; base += 32) {
    u32 e = base + lane, begin = e < experts ? r.offsets[e] : 0, count = e < experts ? r.offsets[e + 1] - begin : 0;
    u32 tiles = (count + TOKENS - 1) / TOKENS, sum = tiles;
#pragma unroll
    for (int d = 1; d < 32; d <<= 1) {
      u32 x = __shfl_up_sync(0xffffffffu, sum, d);
      if (lane >= d) sum += x;
    }
    u32 mine = before + sum - tiles;
    u32 found = __ballot_sync(0xffffffffu, index >= mine && index < mine + tiles);
    if (found) {
      int who = __ffs(found) - 1;
      u32 first = (index - __shfl_sync(0xffffffffu, mine, who)) * TOKENS;
      return {__shfl_sync(0xffffffffu, begin, who), first, __shfl_sync(0xffffffffu, count, who), base + who};
    }
    before += __shfl_sync(0xffffffffu, sum, 31);
  }
  return {0, 0, 0, 0};
}

struct BlockArgs {
  Routing routing;
  Mat x;             // block_twins
  const u8* digits;  // block_digits
  u8* out;
  u32 rows, tiles, parts, experts;
  u32 cols, head_stride;  // of a row or its part; between two heads or slots
};
// Digits in the order in which prompt_* wants them: [head][tile of 64 rows][64 columns][row][high + 128, low + 64], the pieces of 16 bytes of a
// row swizzled by its number, then {scale, sum} of each row. A warp has two rows, a lane a word. Grid: (eights of pieces of 64 columns, each for
// 16 rows; tiles of rows as prompt_*; heads).
KERNEL __launch_bounds__(256) block_digits(const __grid_constant__ BlockArgs a) {
  pdl_launch();
  pdl_wait();
  Tile tile = {0, blockIdx.y * TOKENS, a.rows, blockIdx.z};
  if (a.routing.ids) tile = tile_of(a.routing, a.experts, blockIdx.y);
  if (tile.first >= tile.count) return;
  u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, begin = blockIdx.x / 4 * 8;
  // Word (digit, t, w) of a row of 64 columns is word t of piece 4 digit + w.
  u32 piece = lane / 16 * 4 + lane % 4, word = lane % 16 / 4 * 4, lower = lane < 16 ? 0 : 0x40404040u;
  u8* to = a.out + (((u64)blockIdx.z * gridDim.y + blockIdx.y) * a.tiles + begin) * BLOCKED_BYTES;
#pragma unroll
  for (u32 i = 0; i < 2; i++) {
    u32 r = blockIdx.x % 4 * 16 + i * 8 + warp;
    // Rows past the end repeat the first one; their results are not stored.
    u32 n = tile.first + r < tile.count ? tile.first + r : tile.first;
    u32 flat = a.routing.ids ? a.routing.sorted[tile.begin + n] : n;
    u64 at = a.routing.ids ? (a.routing.slots_in_x ? flat : flat / a.routing.top_k) : (u64)flat * a.parts + (a.parts > 1 ? blockIdx.z : 0);
    const u8* from = a.digits + (at * a.tiles + begin) * DIGITS_BYTES;
    u32 place = r * 128 + (piece ^ (r & 7)) * 16 + word, v[8], about[8];
#pragma unroll
    for (int j = 0; j < 8; j++) {
      if (begin + j >= a.tiles) break;
      v[j] = *(const u32*)(from + j * DIGITS_BYTES + lane * 4);
      if (lane < 2) about[j] = *(const u32*)(from + j * DIGITS_BYTES + 128 + lane * 12);
    }
#pragma unroll
    for (int j = 0; j < 8; j++) {
      if (begin + j >= a.tiles) break;
      *(u32*)(to + j * BLOCKED_BYTES + place) = (v[j] ^ 0x80808080u) - lower;
      if (lane < 2) *(u32*)(to + j * BLOCKED_BYTES + TOKENS * 128 + r * 8 + lane * 4) = about[j];
    }
  }
}

// The same for activations in bfloat16: [head][tile of 64 rows][64 columns][row][columns], a row's pieces swizzled, columns in the order in which products want them
// (packed.cuh): product 2 h + q has 32 h + 8 t + 4 q + i, a lane's i 0 and 1 in its first eight, 2 and 3 in its last. A lane has two columns.
KERNEL __launch_bounds__(256) block_twins(const __grid_constant__ BlockArgs a) {
  pdl_launch();
  pdl_wait();
  Tile tile = {0, blockIdx.y * TOKENS, a.rows, blockIdx.z};
  if (a.routing.ids) tile = tile_of(a.routing, a.experts, blockIdx.y);
  if (tile.first >= tile.count) return;
  u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, begin = blockIdx.x / 4 * 8;
  u32 piece = lane / 16 * 4 + lane / 2 % 2 * 2 + lane % 2, word = lane / 4 % 4 * 4;
  u8* to = a.out + (((u64)blockIdx.z * gridDim.y + blockIdx.y) * a.tiles + begin) * BLOCKED_TWIN;
#pragma unroll
  for (u32 i = 0; i < 2; i++) {
    u32 r = blockIdx.x % 4 * 16 + i * 8 + warp;
    u32 n = tile.first + r < tile.count ? tile.first + r : tile.first;
    u32 flat = a.routing.ids ? a.routing.sorted[tile.begin + n] : n;
    const u16* from = a.routing.ids ? a.x.twin + (u64)(flat / a.routing.top_k) * a.x.stride + (a.routing.slots_in_x ? flat % a.routing.top_k * a.head_stride : 0)
                                    : a.x.twin + (u64)flat * a.x.stride + blockIdx.z * a.head_stride;
    u32 place = r * 128 + (piece ^ (r & 7)) * 16 + word, v[8];
#pragma unroll
    for (int j = 0; j < 8; j++) {
      u32 c = (begin + j) * 64 + lane * 2;
      v[j] = c < a.cols ? *(const u32*)(from + c) : 0;
    }
#pragma unroll
    for (int j = 0; j < 8; j++)
      if (begin + j < a.tiles) *(u32*)(to + j * BLOCKED_TWIN + place) = v[j];
  }
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Shared memory: stages of activations (digits and what is known about them), as in memory; a kilobyte of ones; for each warp that multiplies a ring of its tiles of
// weights; what the slices before gave, for each thread.
template <int F> struct Stage {
  static constexpr u32 TILE = Words<F>::n * 128 + (Is<F>::e8m0 ? 32 : 64);
  static constexpr u32 ABOUT = TOKENS * 128;
  static constexpr u32 COPIED = Is<F>::affine ? BLOCKED_BYTES : BLOCKED_TWIN;
  static constexpr u32 BYTES = (COPIED + 1023) / 1024 * 1024;
  static constexpr u32 COUNT = 8;
  static constexpr u32 SLOTS = Words<F>::n == 8 ? 4 : 8;  // what fits
  static constexpr u32 ONES = COUNT * BYTES, WEIGHTS = ONES + 1024, TOTALS = WEIGHTS + 4 * CONSUMERS * SLOTS * TILE;
};

#define R4(i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3])
#define R32 R4(0), R4(4), R4(8), R4(12), R4(16), R4(20), R4(24), R4(28)
// d = a b or d += a b: 64 rows of codes, 32 columns, 64 rows of digits.
DEVICE void wgmma_first(u32 d[32], u32 a0, u32 a1, u32 a2, u32 a3, u64 b) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n64k32.s32.u8.u8 " WGMMA_SUMS ", {%32,%33,%34,%35}, %36, p; }"
      : R32 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));
}
DEVICE void wgmma_next(u32 d[32], u32 a0, u32 a1, u32 a2, u32 a3, u64 b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k32.s32.u8.u8 " WGMMA_SUMS ", {%32,%33,%34,%35}, %36, 1;"
      : R32 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));
}
// The same for eight columns of ones: sums of codes.
DEVICE void wgmma_codes(u32 d[4], const u32 o[8], u64 ones) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n8k32.s32.u8.u8 {%0,%1,%2,%3}, {%4,%5,%6,%7}, %8, p; }"
      : R4(0) : "r"(o[0]), "r"(o[4]), "r"(o[1]), "r"(o[5]), "l"(ones));
  asm volatile("wgmma.mma_async.sync.aligned.m64n8k32.s32.u8.u8 {%0,%1,%2,%3}, {%4,%5,%6,%7}, %8, 1;"
      : R4(0) : "r"(o[2]), "r"(o[6]), "r"(o[3]), "r"(o[7]), "l"(ones));
}
// Waits for products, and keeps what reads their sums behind it.
DEVICE void wgmma_wait(u32 d[32], u32 e[32], u32 f[4]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (int i = 0; i < 32; i++) asm volatile("" : "+r"(d[i]), "+r"(e[i])::"memory");
#pragma unroll
  for (int i = 0; i < 4; i++) asm volatile("" : "+r"(f[i])::"memory");
}

// Digits are not negative here, and so are their sums with codes. The bits of an integer that is not negative and below 2^24 are a float, 2^-149 times
// it, which the first multiplication brings into range: no instruction turns an integer into a float. The sum of the codes times 128 * 128 + 64 is
// too much in it, which `less` takes away: what stands between the two steps is 64 times an integer below 2^24. So this is 2^-29 join_digits, rounded once.
DEVICE float join_sums(u32 high, u32 low, float less) {
  return fmaf(__uint_as_float(low), 1.329227995784916e36f /* 2^120 */, fmaf(__uint_as_float(high), 1.7014118346046923e38f /* 2^127 */, less));
}
DEVICE float less_of(u32 codes) { return __uint_as_float(codes) * 1.2676506002282294e30f /* 2^100 */ * (-16448.f * 1048576.f /* 2^20 */); }

// The thread that copies activations, tile after tile, into stages that all warps have left.
template <int F> DEVICE void copy_activations(const u8* from, u32 tiles, u32 stages, u32 bar) {
  typedef Stage<F> S;
  for (u32 j = 0; j < tiles; j++) {
    u32 stage = j % S::COUNT, full = bar + 8 * stage;
    barrier_wait(bar + 8 * (S::COUNT + stage), ~(j / S::COUNT) & 1);
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(full), "r"(S::COPIED) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
        ::"r"(stages + stage * S::BYTES), "l"(from), "r"(S::COPIED), "r"(full) : "memory");
    from += S::COPIED;
  }
}

// The tiles of weights of a warp, on their way through its own ring. A bulk copy for each warp's tile would be one thread's work: 13 of them took
// 1,600 cycles, twice as long as what is done with them.
template <int F> struct WeightRing {
  typedef Stage<F> S;
  u32 slots, tiles;
  const u8* from;  // this lane's part of the next tile
  Codes<F> codes;  // of the tile that is taken
  Scales<F, true> scales;

  METHOD void start(u32 stages, const Packed& w, u32 matrix, u32 row_tile) {
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, row_tiles = (w.rows + 15) / 16;
    slots = stages + S::WEIGHTS + warp * (S::SLOTS * S::TILE);
    tiles = num_tiles(w);
    // Row tiles past the end are computed from the last one and not stored.
    from = (const u8*)tile_at(w, matrix, row_tile < row_tiles ? row_tile : row_tiles - 1, 0) + lane * 16;
#pragma unroll
    for (u32 j = 0; j < S::SLOTS - 1; j++) issue(j);
    take(0);
  }
  METHOD void issue(u32 j) {
    u32 lane = threadIdx.x % 32, slot = slots + j % S::SLOTS * S::TILE + lane * 16;
    if (j < tiles) {
#pragma unroll
      for (u32 at = 0; at < S::TILE; at += 512)
        if (at + 512 <= S::TILE || lane * 16 < S::TILE - at) copy_async<16>(slot + at, from + at);
      from += S::TILE;
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  }
  // Waits for tile j and reads this lane's part; the tile that is SLOTS - 1 further goes into the slot of the tile before, which every lane has read. (Behind
  // the last tile there is nothing to wait for, and what is read is not used.)
  METHOD void take(u32 j) {
    u32 slot = slots + j % S::SLOTS * S::TILE, lane = threadIdx.x % 32;
    asm volatile("cp.async.wait_group %0;" ::"n"(S::SLOTS - 2) : "memory");
    __syncwarp();
    read_codes<F>(codes, slot, lane);
    read_scales<F>(scales, slot + Words<F>::n * 128, lane);
    issue(j + S::SLOTS - 1);
  }
};

// Starts the products of 64 columns of a warp's 16 rows with all rows of activations.
template <int F> DEVICE void start_products(u32 high[32], u32 low[32], u32 sum_of_codes[4], const u32 o[8], u32 stage, u64 ones) {
  u64 digits = descriptor(stage);
  wgmma_fence();
  wgmma_codes(sum_of_codes, o, ones);
  wgmma_first(high, o[0], o[4], o[1], o[5], digits);
  wgmma_first(low, o[0], o[4], o[1], o[5], digits + 4);
  wgmma_next(high, o[2], o[6], o[3], o[7], digits + 2);
  wgmma_next(low, o[2], o[6], o[3], o[7], digits + 6);
  wgmma_commit();
}
// acc += what they give.
template <int F> DEVICE void add_products(float acc[32], const u32 high[32], const u32 low[32], const u32 sum_of_codes[4], uint2 scales, u32 stage) {
  u32 t = threadIdx.x % 4;
  float s[2] = {__uint_as_float(scales.x << 16) * 536870912.f /* 2^29 */, __uint_as_float(scales.y << 16) * 536870912.f};
  float b[2] = {__uint_as_float(scales.x & 0xffff0000u), __uint_as_float(scales.y & 0xffff0000u)};
  float less[2] = {less_of(sum_of_codes[0]), less_of(sum_of_codes[2])};
#pragma unroll
  for (int i = 0; i < 8; i++) {
    uint4 v = shared_load<uint4>(stage + Stage<F>::ABOUT + i * 64 + t * 16);
    float scale[2] = {__uint_as_float(v.x), __uint_as_float(v.z)}, sum[2] = {__uint_as_float(v.y), __uint_as_float(v.w)};
#pragma unroll
    for (int e = 0; e < 4; e++) {
      int n = 4 * i + e, row = e >> 1;
      acc[n] = fmaf(b[row], sum[e & 1], fmaf(s[row] * scale[e & 1], join_sums(high[n], low[n], less[row]), acc[n]));
    }
  }
}

// The products of a slice's tiles, first to before end, with affine weights. The next tile's codes are read while this one's are multiplied.
template <int F> DEVICE void affine_slice(float acc[32], WeightRing<F>& ring, u32 first, u32 end, u32 stages, u32 bar) {
  typedef Stage<F> S;
  u64 ones = descriptor(stages + S::ONES);
#pragma unroll
  for (int n = 0; n < 32; n++) acc[n] = 0.f;
  for (u32 j = first; j < end; j++) {
    u32 high[32], low[32], sum_of_codes[4], o[8], stage = stages + j % S::COUNT * S::BYTES;
    uint2 scales = ring.scales.v;
#pragma unroll
    for (int i = 0; i < 8; i++) o[i] = code_bytes<F>(ring.codes, i);
    barrier_wait(bar + 8 * (j % S::COUNT), j / S::COUNT & 1);
    start_products<F>(high, low, sum_of_codes, o, stage, ones);
    if constexpr (F != AFFINE8) ring.take(j + 1);
    wgmma_wait(high, low, sum_of_codes);
    if constexpr (F == AFFINE8) ring.take(j + 1);  // its codes are what is multiplied
    add_products<F>(acc, high, low, sum_of_codes, scales, stage);
    warp_arrives(bar + 8 * (S::COUNT + j % S::COUNT));
  }
}

// The same for formats whose scales belong to sums of 32 columns (MXFP4, MXFP8) or 64 (FP8).
template <int F> DEVICE void scaled_slice(float acc[32], WeightRing<F>& ring, u32 first, u32 end, u32 stages, u32 bar) {
  typedef Stage<F> S;
  constexpr int SUMS_OF_A_TILE = Is<F>::e8m0 ? 2 : 1, EACH = 4 / SUMS_OF_A_TILE;
#pragma unroll
  for (int n = 0; n < 32; n++) acc[n] = 0.f;
  for (u32 j = first; j < end; j++) {
    Scales<F, true> scales = ring.scales;
    u32 a[4][4];
    fragments<F, true>(a, ring.codes, scales);
    barrier_wait(bar + 8 * (j % S::COUNT), j / S::COUNT & 1);
    u64 x = descriptor(stages + j % S::COUNT * S::BYTES);
    float c[SUMS_OF_A_TILE][32];
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < 4; s++) wgmma_bf16<false>(c[s / EACH], a[s], x + 2 * s, s % EACH);
    wgmma_commit();
    ring.take(j + 1);
#pragma unroll
    for (int h = 0; h < SUMS_OF_A_TILE; h++) wgmma_wait<0>(c[h]);
    warp_arrives(bar + 8 * (S::COUNT + j % S::COUNT));
#pragma unroll
    for (int h = 0; h < SUMS_OF_A_TILE; h++) {
      float scale[2];
#pragma unroll
      for (int r = 0; r < 2; r++)
        if constexpr (Is<F>::e8m0) scale[r] = e8m0_to_f32((scales.raw >> (16 * r + 8 * h)) & 0xff);
        else scale[r] = scales.s[r];
#pragma unroll
      for (int n = 0; n < 32; n++) acc[n] = fmaf(scale[n >> 1 & 1], c[h][n], acc[n]);
    }
  }
}

// The same for NVFP4, whose scales are in the weights: sums stay in the tensor cores' registers.
template <int F> DEVICE void plain_slice(float acc[32], WeightRing<F>& ring, u32 first, u32 end, u32 stages, u32 bar) {
  typedef Stage<F> S;
  for (u32 j = first; j < end; j++) {
    Scales<F, true> scales = ring.scales;
    u32 a[4][4];
    fragments<F, true>(a, ring.codes, scales);
    barrier_wait(bar + 8 * (j % S::COUNT), j / S::COUNT & 1);
    u64 x = descriptor(stages + j % S::COUNT * S::BYTES);
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < 4; s++) wgmma_bf16<false>(acc, a[s], x + 2 * s, s > 0 || j > first);
    wgmma_commit();
    ring.take(j + 1);
    wgmma_wait<0>(acc);
    warp_arrives(bar + 8 * (S::COUNT + j % S::COUNT));
  }
}

// Barriers of the stages (filled, then left), which row of the result each row of the tile is, and a kilobyte of ones.
template <int F> DEVICE void prepare(const Routing& routing, const Tile& tile, u8* ring, u32 bar, u32* flats) {
  typedef Stage<F> S;
  if (threadIdx.x < TOKENS) {
    u32 n = tile.first + threadIdx.x;
    flats[threadIdx.x] = n < tile.count ? (routing.ids ? routing.sorted[tile.begin + n] : n) : 0xffffffffu;
  }
  if (threadIdx.x < 256) ((u32*)(ring + S::ONES))[threadIdx.x] = 0x01010101u;
  if (threadIdx.x == 0) {
#pragma unroll
    for (int s = 0; s < S::COUNT; s++) {
      barrier_init(bar + 8 * s, 1);
      barrier_init(bar + 8 * (S::COUNT + s), 4 * CONSUMERS * WARP_ARRIVALS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
}

// Stores what a lane has of a warp's 16 rows of weights.
template <int F> DEVICE void store_rows(const float4* totals, const Part& part, const Routing& routing, u32 matrix, u32 row_tile, const u32* flats) {
  u32 lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, rows = part.w.rows;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    float4 v = totals[i * (128 * CONSUMERS)];
    float total[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int e = 0; e < 4; e++) {
      u32 r = row_tile * 16 + g + 8 * (e >> 1), flat = flats[i * 8 + 2 * t + (e & 1)];
      if (r >= rows || flat == 0xffffffffu) continue;
      store(part.out, flat, routing.ids ? r : matrix * rows + r, finish<F>(part.w, matrix, r, total[e]));
    }
  }
}

// out[flat] = x[flat] W for one or several weights that share x. Grid: (blocks of 64 CONSUMERS rows of all weights, tiles of 64 rows of x, heads); with
// experts: (the same, tiles of all experts, 1).
template <int F> DEVICE void prompt_product(const MatmulArgs& a) {
  typedef Stage<F> S;
  extern __shared__ __align__(1024) u8 ring[];
  __shared__ __align__(8) u64 bars[2 * S::COUNT];
  __shared__ u32 flats[TOKENS];
  pdl_launch();
  pdl_wait();
  u32 k = 0;
  while (k + 1 < a.num_parts && blockIdx.x >= a.first_block[k + 1]) k++;
  const Part& part = a.part[k];
  Tile tile = {0, blockIdx.y * TOKENS, a.x.rows, blockIdx.z};
  if (a.routing.ids) tile = tile_of(a.routing, a.num_experts, blockIdx.y);
  if (tile.first >= tile.count) return;
  u32 tiles = num_tiles(part.w), warp = warp_index();
  u32 stages = (u32)__cvta_generic_to_shared(ring), bar = (u32)__cvta_generic_to_shared(bars);
  prepare<F>(a.routing, tile, ring, bar, flats);
  if (warp >= 4 * CONSUMERS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (threadIdx.x > 128 * CONSUMERS) return;
    copy_activations<F>(a.digits + ((u64)blockIdx.z * gridDim.y + blockIdx.y) * tiles * S::COPIED, tiles, stages, bar);
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 160;");
  u32 row_tile = (blockIdx.x - a.first_block[k]) * 4 * CONSUMERS + warp, slices = a.slices;
  WeightRing<F> weights;
  weights.start(stages, part.w, tile.matrix, row_tile);
  // What the slices before gave: shared memory, since registers are scarce.
  float4* totals = (float4*)(ring + S::TOTALS) + threadIdx.x;
#pragma unroll
  for (int i = 0; i < 8; i++) totals[i * (128 * CONSUMERS)] = make_float4(0.f, 0.f, 0.f, 0.f);
  for (u32 slice = 0; slice < slices; slice++) {
    float acc[32];
    u32 first = slice_start(slice, slices, tiles), end = slice_start(slice + 1, slices, tiles);
    if constexpr (Is<F>::affine) affine_slice<F>(acc, weights, first, end, stages, bar);
    else if constexpr (F == NVFP4) plain_slice<F>(acc, weights, first, end, stages, bar);
    else scaled_slice<F>(acc, weights, first, end, stages, bar);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      float4 v = totals[i * (128 * CONSUMERS)];
      v.x += acc[4 * i]; v.y += acc[4 * i + 1]; v.z += acc[4 * i + 2]; v.w += acc[4 * i + 3];
      totals[i * (128 * CONSUMERS)] = v;
    }
  }
  store_rows<F>(totals, part, a.routing, tile.matrix, row_tile, flats);
}

#define PROMPT(NAME, F) \
  KERNEL __launch_bounds__(THREADS, 1) prompt_##NAME(const __grid_constant__ MatmulArgs a) { prompt_product<F>(a); }
PROMPT(affine2, AFFINE2)
PROMPT(affine3, AFFINE3)
PROMPT(affine4, AFFINE4)
PROMPT(affine5, AFFINE5)
PROMPT(affine6, AFFINE6)
PROMPT(affine8, AFFINE8)
PROMPT(nvfp4, NVFP4)
PROMPT(mxfp4, MXFP4)
PROMPT(mxfp8, MXFP8)
PROMPT(fp8, FP8)
#endif
