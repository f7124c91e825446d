// Products of many rows on Hopper: the tensor cores' own instruction (wgmma) over weights in registers and digits in shared memory.
//
// A block has 64 rows of activations and 64 rows of weights for each of three warpgroups that multiply. One thread more copies digits, several
// pieces of 64 columns ahead; a warp copies the weights of its own 16 rows and takes their codes apart, which are then the instruction's first
// operand as they are. While the sums of one warpgroup become floats, those of the others are on their way through the tensor cores.
//
// The result has the bits of the kernels for few rows: the same integer sums of 64 columns, the same steps from them to a float, in the
// same order. Only on GPUs with wgmma (sm_90a); others have `gemm_*` of matmul.cu.
#include "barriers.cuh"
#include "product.cuh"

#define TOKENS 64
#define CONSUMERS 3  // warpgroups that multiply
#define THREADS (128 * CONSUMERS + 128)
#define BLOCKED_BYTES (TOKENS * 136)

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

struct BlockArgs { Routing routing; const u8* digits; u8* out; u32 rows, tiles, parts, experts; };
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

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Shared memory: stages of digits and what is known about them, as in memory; a kilobyte of ones; for each warp that multiplies a ring of its tiles of
// weights; what the slices before gave, for each thread.
template <int F> struct Stage {
  static constexpr u32 TILE = Words<F>::n * 128 + 64;
  static constexpr u32 ABOUT = TOKENS * 128;
  static constexpr u32 BYTES = (BLOCKED_BYTES + 1023) / 1024 * 1024;
  static constexpr u32 COUNT = 8;
  static constexpr u32 SLOTS = F == AFFINE8 ? 4 : 8;  // what fits
  static constexpr u32 ONES = COUNT * BYTES, WEIGHTS = ONES + 1024, TOTALS = WEIGHTS + 4 * CONSUMERS * SLOTS * TILE;
};

// A matrix in shared memory, rows of 128 swizzled bytes, groups of eight rows 1024 bytes apart.
DEVICE u64 descriptor(u32 at) { return (u64)(at >> 4 & 0x3fff) | (u64)1 << 16 | (u64)64 << 32 | (u64)1 << 62; }

#define R4(i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3])
#define SUMS                                                                                                                              \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}"
#define R32 R4(0), R4(4), R4(8), R4(12), R4(16), R4(20), R4(24), R4(28)
// d = a b or d += a b: 64 rows of codes, 32 columns, 64 rows of digits.
DEVICE void wgmma_first(u32 d[32], u32 a0, u32 a1, u32 a2, u32 a3, u64 b) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n64k32.s32.u8.u8 " SUMS ", {%32,%33,%34,%35}, %36, p; }"
      : R32 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));
}
DEVICE void wgmma_next(u32 d[32], u32 a0, u32 a1, u32 a2, u32 a3, u64 b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k32.s32.u8.u8 " SUMS ", {%32,%33,%34,%35}, %36, 1;"
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

// The thread that copies digits, tile after tile, into stages that all warps have left.
template <int F> DEVICE void copy_digits(const u8* from, u32 tiles, u32 stages, u32 bar) {
  typedef Stage<F> S;
  for (u32 j = 0; j < tiles; j++) {
    u32 stage = j % S::COUNT, full = bar + 8 * stage;
    barrier_wait(bar + 8 * (S::COUNT + stage), ~(j / S::COUNT) & 1);
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(full), "r"(BLOCKED_BYTES) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
        ::"r"(stages + stage * S::BYTES), "l"(from), "r"(BLOCKED_BYTES), "r"(full) : "memory");
    from += BLOCKED_BYTES;
  }
}

// A warp's tile of weights from its slot: the bytes of its codes, and the scales of this lane's rows.
template <int F> DEVICE uint2 take_tile(u32 o[8], u32 slot) {
  u32 lane = threadIdx.x % 32;
  Codes<F> codes;
  constexpr int N = Words<F>::n, four = N / 4 * 4;
#pragma unroll
  for (int i = 0; i < four; i += 4) {
    uint4 v = shared_load<uint4>(slot + lane * 16 + i * 128);
    codes.w[i] = v.x; codes.w[i + 1] = v.y; codes.w[i + 2] = v.z; codes.w[i + 3] = v.w;
  }
  if constexpr (N % 4 >= 2) {
    uint2 v = shared_load<uint2>(slot + lane * 8 + four * 128);
    codes.w[four] = v.x; codes.w[four + 1] = v.y;
  }
  if constexpr (N % 2 == 1) codes.w[N - 1] = shared_load<u32>(slot + lane * 4 + (N - 1) * 128);
#pragma unroll
  for (int i = 0; i < 8; i++) o[i] = code_bytes<F>(codes, i);
  return shared_load<uint2>(slot + N * 128 + lane / 4 * 8);
}

// acc += 64 columns of a warp's 16 rows times all rows of activations.
template <int F> DEVICE void add_products(float acc[32], const u32 o[8], uint2 scales, u32 stage, u64 ones) {
  u32 high[32], low[32], sum_of_codes[4], t = threadIdx.x % 4;
  u64 digits = descriptor(stage);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  wgmma_codes(sum_of_codes, o, ones);
  wgmma_first(high, o[0], o[4], o[1], o[5], digits);
  wgmma_first(low, o[0], o[4], o[1], o[5], digits + 4);
  wgmma_next(high, o[2], o[6], o[3], o[7], digits + 2);
  wgmma_next(low, o[2], o[6], o[3], o[7], digits + 6);
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  float s[2] = {__uint_as_float(scales.x << 16) * 536870912.f /* 2^29 */, __uint_as_float(scales.y << 16) * 536870912.f};
  float b[2] = {__uint_as_float(scales.x & 0xffff0000u), __uint_as_float(scales.y & 0xffff0000u)};
  wgmma_wait(high, low, sum_of_codes);
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

// out[flat] = x[flat] W for one or several weights that share x. Grid: (blocks of 64 CONSUMERS rows of all weights, tiles of 64 rows of x, heads); with
// experts: (the same, tiles of all experts, 1).
template <int F> DEVICE void prompt_product(const MatmulArgs& a) {
  typedef Stage<F> S;
  extern __shared__ __align__(1024) u8 ring[];
  __shared__ __align__(8) u64 bars[2 * S::COUNT];
  __shared__ u32 flats[TOKENS];
  pdl_launch();
  pdl_wait();
  const Routing& routing = a.routing;
  u32 k = 0;
  while (k + 1 < a.num_parts && blockIdx.x >= a.first_block[k + 1]) k++;
  const Part& part = a.part[k];
  const Packed& w = part.w;
  Tile tile = {0, blockIdx.y * TOKENS, a.x.rows, blockIdx.z};
  if (routing.ids) tile = tile_of(routing, a.num_experts, blockIdx.y);
  if (tile.first >= tile.count) return;
  u32 matrix = tile.matrix, tiles = num_tiles(w), row_tiles = (w.rows + 15) / 16, block = blockIdx.x - a.first_block[k];
  u32 warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  u32 stages = (u32)__cvta_generic_to_shared(ring), bar = (u32)__cvta_generic_to_shared(bars), row_tile = block * 4 * CONSUMERS + warp;
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
  if (warp >= 4 * CONSUMERS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (threadIdx.x > 128 * CONSUMERS) return;
    copy_digits<F>(a.digits + ((u64)blockIdx.z * gridDim.y + blockIdx.y) * tiles * BLOCKED_BYTES, tiles, stages, bar);
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 160;");
  u32 g = lane / 4, t = lane % 4, slices = a.slices, slots = stages + S::WEIGHTS + warp * (S::SLOTS * S::TILE) + lane * 16;
  // Row tiles past the end are computed from the last one and not stored.
  const u8* from = (const u8*)tile_at(w, matrix, row_tile < row_tiles ? row_tile : row_tiles - 1, 0) + lane * 16;
  // A bulk copy for each warp's tile would be one thread's work: 13 of them took 1,600 cycles, twice as long as what is done with them.
  auto issue = [&](u32 j) {
    if (j < tiles) {
#pragma unroll
      for (u32 at = 0; at < S::TILE; at += 512)
        if (at + 512 <= S::TILE || lane * 16 < S::TILE - at) copy_async<16>(slots + j % S::SLOTS * S::TILE + at, from + at);
      from += S::TILE;
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
#pragma unroll
  for (u32 j = 0; j < S::SLOTS - 1; j++) issue(j);
  u64 ones = descriptor(stages + S::ONES);
  // What the slices before gave: shared memory, since registers are scarce.
  float4* totals = (float4*)(ring + S::TOTALS) + threadIdx.x;
#pragma unroll
  for (int i = 0; i < 8; i++) totals[i * (128 * CONSUMERS)] = make_float4(0.f, 0.f, 0.f, 0.f);
  float acc[32] = {};
  for (u32 j = 0, slice = 0; slice < slices; slice++) {
    for (u32 end = slice_start(slice + 1, slices, tiles); j < end; j++) {
      u32 stage = stages + j % S::COUNT * S::BYTES, slot = slots + j % S::SLOTS * S::TILE - lane * 16;
      asm volatile("cp.async.wait_group %0;" ::"n"(S::SLOTS - 2) : "memory");
      __syncwarp();
      u32 o[8];
      uint2 scales = take_tile<F>(o, slot);
      // Into the slot of the tile before, which every lane has read.
      issue(j + S::SLOTS - 1);
      barrier_wait(bar + 8 * (j % S::COUNT), j / S::COUNT & 1);
      add_products<F>(acc, o, scales, stage, ones);
      warp_arrives(bar + 8 * (S::COUNT + j % S::COUNT));
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
      float4 v = totals[i * (128 * CONSUMERS)];
      v.x += acc[4 * i]; v.y += acc[4 * i + 1]; v.z += acc[4 * i + 2]; v.w += acc[4 * i + 3];
      totals[i * (128 * CONSUMERS)] = v;
    }
#pragma unroll
    for (int n = 0; n < 32; n++) acc[n] = 0.f;
  }
  u32 row = row_tile * 16 + g;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    float4 v = totals[i * (128 * CONSUMERS)];
    float total[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int e = 0; e < 4; e++) {
      u32 r = row + 8 * (e >> 1), flat = flats[i * 8 + 2 * t + (e & 1)];
      if (r >= w.rows || flat == 0xffffffffu) continue;
      store(part.out, flat, routing.ids ? r : matrix * w.rows + r, finish<F>(w, matrix, r, total[e]));
    }
  }
}

#define PROMPT(NAME, F) \
  KERNEL __launch_bounds__(THREADS, 1) prompt_##NAME(const __grid_constant__ MatmulArgs a) { prompt_product<F>(a); }
PROMPT(affine2, AFFINE2)
PROMPT(affine3, AFFINE3)
PROMPT(affine4, AFFINE4)
PROMPT(affine5, AFFINE5)
PROMPT(affine6, AFFINE6)
PROMPT(affine8, AFFINE8)
#endif
