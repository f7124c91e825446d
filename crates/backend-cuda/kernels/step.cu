// One row of activations: the step of one sequence, by one kernel that stays on the device while it goes through a list of stages.
//
// Such a step is bound by reading weights, and by what stands between two reads: as kernels of their own the ten stages of a layer lost
// 5-8 us each to the launch, to the row that every block makes for itself, to the first tiles and to the last blocks (41 % of the
// bandwidth in all, receipt 2026-11-21-cuda). Weights wait for nobody, so here nothing waits for them either:
//
// - A block of 24 warps that multiply and four that feed them has a multiprocessor. Each of the 24 has a ring of slots in shared memory, and
//   a lane of a feeding warp to itself, which knows what its warp multiplies, stage after stage, and asks for the next tiles as soon as a
//   slot is free (bulk copies, TMA), those of the next stages too: 160 KB a multiprocessor are on their way or there while blocks wait for
//   each other and make the next row. Only experts that the router has not chosen yet cannot be asked for.
// - A stage begins when all blocks have ended the one before (a counter in memory), where it reads what others wrote.
// - High and low digits of a row are two columns of a tensor-core product; four neighbouring tiles share one product's eight columns, and
//   each quarter of lanes applies the scales of one of them.
//
// - Code that runs once a layer is fetched from far away: what is written here is short and shared (`CALL`), not unrolled. With everything
//   inlined (390 KB) a norm took 9 us, of which its instructions were most.
//
// Results are those of the kernels in matmul.cu, rows.cu and attention.cu bit for bit: the same sums in the same order (`Order`).
//
// One piece: stages share the ring, the row and the fragments.
#include "attend.cuh"
#include "product.cuh"
#include "route.cuh"

#define STEP_WARPS 24
#define STEP_THREADS (STEP_WARPS * 32)  // that multiply
#define FEEDERS 4           // warps that feed them
#define FED (STEP_WARPS / FEEDERS)
#define ROUTER_BARRIER 13   // named barrier of the eight warps of a router's row; teams have 1 to 12
#define BLOCK_BARRIER 14    // of all that multiply
#define SLOT_BYTES 2304     // most bytes of a slot's tiles
#define SLOTS 3
#define RING_BYTES (STEP_WARPS * SLOTS * SLOT_BYTES)
#define DESCRIPTORS 4       // stages whose descriptions are in shared memory
#define RESULT_BYTES 8192   // of `down`: the sums of a block's row tiles

#define CALL static __device__ __noinline__

// The row in the form of F, 64 columns: bytes.
template <int F> struct Form { static constexpr u32 tile = Is<F>::affine ? DIGITS_BYTES : 128; };
// Tiles with their scales behind them; tiles of a slot.
template <int F> struct Tile {
  static constexpr u32 bytes = Words<F>::n * 128 + (Is<F>::e8m0 ? 32 : 64);
  static constexpr u32 slot = Words<F>::n > 4 ? 2 : 4;
};

// Where the row of a product comes from.
struct RowInput {
  Mat x;              // floats; the twin is read where it is taken as it lies
  const u8* digits;   // the same for affine formats
  u32 kind;           // 0: as it lies (twin or digits), 1: from its floats, 2: from their norm, 3: still in shared memory
  float eps;
  const float* weight;
  Mat out;            // where the norm goes too, as floats and twin; null where it does not. Not over x: other blocks may still read it
  u8* out_digits;     // and as digits, or null
};

// out = x W for several weights of one format; also the router's choice, made by every block for itself beside it.
struct LineStage {
  Part part[4];
  u32 first_unit[5];   // of each part, in row tiles
  u32 num_parts;
  RowInput in;
  Mat residual;        // the result is added to it too (p null: none)
  RouteArgs route;     // top_k 0: none
};

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
// A product a head.
struct HeadsStage {
  Packed w;
  Mat out;              // [heads * rows]
  u8* out_digits;       // the result once more as digits, or null; a unit then has whole 64 rows
  const float* x;       // inputs of the heads
  u32 x_head_stride, num_heads, joins, has_latent;
  AttendArgs attend;    // joins: the input is attention's result
  Latent latent;
};

// h = f(x gate, x up) of one pair of matrices, or of those of the chosen experts; before it, and of the same row, the router's product.
struct PairStage {
  Packed gate, up;      // gate.rows 0: no pair, the router alone
  Mat out;
  RowInput in;
  const u8* router;     // plain weights, or null
  const float* router_bias;
  Mat router_out;
  u32 router_rows, router_kind;  // 0 f32, 1 f16, 2 bf16
  u32 top_k;            // 0: not routed
  u32 pad;
  Activation activation;
};

// out = plus + sum over the experts of weight * (h W).
struct DownStage {
  Packed w;
  Mat out, plus, residual;
  const float* h;       // a part of `w.cols` an expert
  u32 top_k, pad;
};

enum StageKind { LINE, HEADS, PAIR, DOWN };
struct __align__(16) Stage {
  u32 kind;
  u32 waits;    // what other blocks wrote before is read
  u32 slices;   // of the columns
  u32 x_at;     // where the row lies in shared memory
  union { LineStage line; HeadsStage heads; PairStage pair; DownStage down; };
};

struct StepArgs {
  const Stage* stages;
  u32* arrived;   // how often the kernel ran, then a counter a stage: blocks that ended it, in all runs
  u32 num_stages, pad;
};

struct Shared {
  Stage stages[DESCRIPTORS];
  u32 current;               // the stage that is multiplied: two more may be fed
  u32 cursors[STEP_WARPS];   // the stages that are fed
  u32 ids[32];
  float weights[32];
  float scratch[48];
  float scores[2 * 256 + 4];
  union {
    float sums[2][STEP_WARPS][2][16];
    float results[RESULT_BYTES / 4];  // [row tile of this block][top_k][slices][16]
    float values[STEP_WARPS * 16];
  };
};

// A team of `slices` warps has a unit.
struct Team {
  u32 size, count, index, slice;
  METHOD Team(u32 slices, u32 warp) {
    size = slices;
    count = STEP_WARPS / slices;
    index = warp / slices;
    slice = warp % slices;
  }
  METHOD explicit Team(u32 slices) : Team(slices, threadIdx.x / 32) {}
  METHOD void barrier() const {
    if (size == 1) __syncwarp();
    else asm volatile("bar.sync %0, %1;" ::"r"(1 + index), "r"(size * 32) : "memory");
  }
};
DEVICE void block_barrier() { asm volatile("bar.sync %0, %1;" ::"n"(BLOCK_BARRIER), "n"(STEP_THREADS) : "memory"); }

DEVICE u32 row_tiles_of(const Packed& w) { return (w.rows + 15) / 16; }

// The units of a team in a stage, row tiles of matrices: unit u is matrix q, row tile r. Neighbouring units go to different blocks, so that
// all end at the same time. Divides once a stage.
struct Walk {
  u32 u, end, du;
  u32 q, r, dq, dr, d;
  METHOD void start(const Stage& stage, const Team& team) {
    u32 blocks = gridDim.x, block = blockIdx.x;
    if (stage.kind == HEADS) {  // q: head. A block has neighbouring units, of few heads.
      d = row_tiles_of(stage.heads.w);
      u32 total = stage.heads.num_heads * d, each = (total + blocks - 1) / blocks;
      u = block * each + team.index;
      end = min(block * each + each, total);
      du = team.count;
    } else if (stage.kind == DOWN) {  // q: row tile `block + q blocks`, r: place among the chosen. A block has all experts of a row tile.
      u32 row_tiles = row_tiles_of(stage.down.w);
      d = stage.down.top_k;
      u = team.index;
      end = (row_tiles > block ? (row_tiles - block - 1) / blocks + 1 : 0) * d;
      du = team.count;
    } else {
      u = team.index * blocks + block;
      du = team.count * blocks;
      if (stage.kind == LINE) {  // r: row tile of all parts together
        d = 0xffffffffu;
        end = stage.line.first_unit[stage.line.num_parts];
      } else {  // q: place among the chosen
        u32 row_tiles = row_tiles_of(stage.pair.gate);
        d = max(row_tiles, 1u);
        end = max(stage.pair.top_k, 1u) * row_tiles;
      }
    }
    q = u / d;
    r = u - q * d;
    dq = du / d;
    dr = du - dq * d;
  }
  METHOD bool there() const { return u < end; }
  METHOD void step() {
    u += du;
    q += dq;
    r += dr;
    if (r >= d) { r -= d; q++; }
  }
};

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
DEVICE bool arrived_at(u32 bar, u32 parity) {
  u32 done;
  asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }" : "=r"(done) : "r"(bar), "r"(parity) : "memory");
  return done;
}

// Where the rings lie, and their barriers: [warp][slot] tiles; then {full, empty} barriers.
struct Rings {
  u32 base;
  METHOD u32 slot(u32 warp, u32 k) const { return base + (warp * SLOTS + k) * SLOT_BYTES; }
  METHOD u32 full(u32 warp, u32 k) const { return base + RING_BYTES + (warp * SLOTS + k) * 16; }
  METHOD u32 empty(u32 warp, u32 k) const { return full(warp, k) + 8; }
};

// What a lane feeds: the units of a stage, one after another.
struct Source {
  Walk walk;
  const u8 *base, *other_base;  // the slice of the first row tile of the first matrix, and of the second of a pair
  u64 matrix_bytes;
  u32 row_tile_bytes, first_bytes, count, tile_bytes, slot_tiles;
  METHOD void start(const Stage& stage, const Team& team) {
    walk.start(stage, team);
    const Packed* w = stage.kind == LINE ? &stage.line.part[0].w : stage.kind == HEADS ? &stage.heads.w : stage.kind == PAIR ? &stage.pair.gate : &stage.down.w;
    u32 tiles = num_tiles(*w), first = slice_start(team.slice, team.size, tiles);
    count = slice_start(team.slice + 1, team.size, tiles) - first;
    tile_bytes = w->tile_words * 4;
    slot_tiles = tile_bytes > 576 ? 2 : 4;
    row_tile_bytes = tiles * tile_bytes;
    first_bytes = first * tile_bytes;
    matrix_bytes = w->codes_stride * 4;
    base = (const u8*)w->codes + first_bytes;
    other_base = stage.kind == PAIR ? (const u8*)stage.pair.up.codes + first_bytes : nullptr;
  }
  // The unit at the walk.
  METHOD void aim(const Stage& stage, const Shared& shared, const u8*& code, const u8*& other) const {
    u32 matrix = walk.q, row_tile = walk.r;
    if (stage.kind == LINE) {
      u32 k = 0;
      while (row_tile >= stage.line.first_unit[k + 1]) k++;
      code = (const u8*)stage.line.part[k].w.codes + first_bytes + (u64)(row_tile - stage.line.first_unit[k]) * row_tile_bytes;
      other = nullptr;
      return;
    }
    if (stage.kind == PAIR) matrix = stage.pair.top_k ? shared.ids[matrix] : 0;
    if (stage.kind == DOWN) {
      matrix = shared.ids[walk.r];
      row_tile = blockIdx.x + walk.q * gridDim.x;
    }
    u64 at = matrix * matrix_bytes + (u64)row_tile * row_tile_bytes;
    code = base + at;
    other = other_base ? other_base + at : nullptr;
  }
};

// A feeding warp. A lane feeds one warp; all lanes go round together, else each would go round alone.
DEVICE void feed(const StepArgs& a, Shared& shared, Rings rings) {
  u32 warp = threadIdx.x % 32 < FED ? (threadIdx.x - STEP_THREADS) / 32 * FED + threadIdx.x % 32 : STEP_WARPS;
  const u8 *code = nullptr, *other = nullptr;  // the next tiles of the unit, and of the second of its pair
  u32 left = 0, second = 0, put = 0, round = 0, current = 0, entered = 0;
  u32 stage = warp < STEP_WARPS ? 0 : a.num_stages;
  Source source = {};
  while (__any_sync(0xffffffffu, left || stage < a.num_stages)) {
    if (left == 0 && stage < a.num_stages) {
      const Stage& s = shared.stages[stage % DESCRIPTORS];
      if (!entered) {
        // A stage may be entered when its description is there and its experts are chosen.
        if (stage > current) {
          current = *(volatile u32*)&shared.current;
          __threadfence_block();
        }
        if (stage <= current + DESCRIPTORS - 2 && (stage <= current || s.kind != PAIR || !s.pair.top_k)) {
          source.start(s, Team(s.slices, warp));
          entered = 1;
        }
      }
      if (entered) {
        if (source.walk.there()) {
          source.aim(s, shared, code, other);
          source.walk.step();
          left = source.count;
          second = 0;
        } else {
          entered = 0;
          stage++;
          __threadfence_block();
          *(volatile u32*)&shared.cursors[warp] = stage;
        }
      }
    }
    __syncwarp();
    // The barrier of a slot that was never used has not arrived anywhere: the parity before the first is one.
    if (left && arrived_at(rings.empty(warp, put), (round & 1) ^ 1)) {
      u32 n = min(left, source.slot_tiles), bytes = n * source.tile_bytes, bar = rings.full(warp, put);
      const u8* from = second ? other : code;
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
          ::"r"(rings.slot(warp, put)), "l"(from), "r"(bytes), "r"(bar) : "memory");
      if (++put == SLOTS) { put = 0; round++; }
      if (second) other += bytes;
      else code += bytes;
      second = other && !second;
      if (!second) left -= n;
    }
    __syncwarp();
  }
}

// What a warp takes from its ring.
struct Feed {
  u32 slots, bars, lane;
  u32 take, phase;
  METHOD void start(Rings rings) {
    lane = threadIdx.x % 32;
    slots = rings.slot(threadIdx.x / 32, 0);
    bars = rings.full(threadIdx.x / 32, 0);
    take = phase = 0;
  }
  // Waits for the oldest slot.
  METHOD u32 wait() const {
    u32 bar = bars + 16 * take, done = 0;
    while (!done)
      asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }" : "=r"(done) : "r"(bar), "r"(phase) : "memory");
    return slots + take * SLOT_BYTES;
  }
  // Gives it back.
  METHOD void release() {
    __syncwarp();
    if (lane == 0) asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bars + 16 * take + 8) : "memory");
    if (++take == SLOTS) { take = 0; phase ^= 1; }
  }
};

// c = a b + c for bytes: a 16x32 unsigned codes, b 32x8 signed digits.
DEVICE void mma_bytes(int c[4], const u32 a[4], u32 b0, u32 b1) { mma_bytes(c, a[0], a[1], a[2], a[3], b0, b1); }

template <int F> DEVICE Codes<F> read_codes(u32 tile, u32 lane) {
  constexpr int N = Words<F>::n, four = N / 4 * 4;
  Codes<F> codes;
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
  return codes;
}

// Sums of `count` tiles from tile `first` of the row on, which are the next in the ring, of R matrices in turn: of rows g and g + 8 of the
// row tile, right in the lanes with t = 0.
template <int R> struct Sums { float of[R][2]; u32 take, phase; };
template <int F, int R> CALL Sums<R> strip_at(Feed feed, const u8* x, u32 first, u32 count, u32 cols) {
  Sums<R> result;
  auto& sums = result.of;
  constexpr u32 C = Tile<F>::slot, N = Words<F>::n, TILE = Tile<F>::bytes;
  u32 lane = feed.lane, g = lane / 4, t = lane % 4;
  x += first * Form<F>::tile;
  if constexpr (Is<F>::affine) {
    // Columns 2c and 2c + 1 of a product are the high and low digits of the tile of class c: lanes with g / 2 = c have them, for the other
    // tiles they give zeros. Lanes with t = c get the sums.
    float acc[R][2] = {};
    for (u32 j = 0; j < count; j += C) {
      u32 n = min(C, count - j), base = C == 4 ? 0 : j & 2, mine = t - base, column = g / 2 - base;
      uint4 b = make_uint4(0, 0, 0, 0);
      if (column < n) b = *(const uint4*)(x + column * DIGITS_BYTES + 16 * t + (g & 1) * 64);
      bool has = mine < n;
      float4 about = make_float4(0.f, 0.f, 0.f, 0.f);
      if (has) about = *(const float4*)(x + mine * DIGITS_BYTES + 128);
#pragma unroll
      for (int r = 0; r < R; r++) {
        u32 slot = feed.wait();
        int c[4] = {BIAS_BITS, BIAS_BITS, BIAS_BITS, BIAS_BITS}, d[4] = {0, 0, 0, 0};
#pragma unroll
        for (u32 i = 0; i < C; i++) {
          if (i >= n) break;
          Codes<F> codes = read_codes<F>(slot + i * TILE, lane);
          u32 a0[4] = {code_bytes<F>(codes, 0), code_bytes<F>(codes, 4), code_bytes<F>(codes, 1), code_bytes<F>(codes, 5)};
          u32 a1[4] = {code_bytes<F>(codes, 2), code_bytes<F>(codes, 6), code_bytes<F>(codes, 3), code_bytes<F>(codes, 7)};
          bool own = column == i;
          mma_bytes(c, a0, own ? b.x : 0, own ? b.y : 0);
          mma_bytes(d, a1, own ? b.z : 0, own ? b.w : 0);
        }
        uint2 scale = make_uint2(0, 0);
        if (has) scale = shared_load<uint2>(slot + mine * TILE + N * 128 + g * 8);
        feed.release();
        if (has) {
          float s0 = __uint_as_float(scale.x << 16), o0 = __uint_as_float(scale.x & 0xffff0000u);
          float s1 = __uint_as_float(scale.y << 16), o1 = __uint_as_float(scale.y & 0xffff0000u);
          float y0 = fmaf(__int_as_float(c[0] + d[0]) - BIAS, 128.f, __int_as_float(c[1] + d[1]) - BIAS);
          float y1 = fmaf(__int_as_float(c[2] + d[2]) - BIAS, 128.f, __int_as_float(c[3] + d[3]) - BIAS);
          acc[r][0] = fmaf(o0, about.w, fmaf(s0 * about.x, y0, acc[r][0]));
          acc[r][1] = fmaf(o1, about.w, fmaf(s1 * about.x, y1, acc[r][1]));
        }
      }
      x += C * DIGITS_BYTES;
    }
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
      for (int k = 0; k < 2; k++) {
        float v = acc[r][k], one = __shfl_down_sync(0xffffffffu, v, 1), two = __shfl_down_sync(0xffffffffu, v, 2), three = __shfl_down_sync(0xffffffffu, v, 3);
        sums[r][k] = ((v + one) + two) + three;
      }
  } else {
    float acc[R][4] = {};
    u32 column = first * 64 + 8 * t;
    for (u32 j = 0; j < count; j += C) {
      u32 n = min(C, count - j);
#pragma unroll
      for (int r = 0; r < R; r++) {
        u32 slot = feed.wait();
        for (u32 i = 0; i < n; i++) {
          u32 tile = slot + i * TILE, p = tile + N * 128;
          Codes<F> codes = read_codes<F>(tile, lane);
          Scales<F, true> scales;
          if constexpr (F == NVFP4) scales.raw = shared_load<u32>(p + (g * 2 + t / 2) * 4);
          else if constexpr (Is<F>::e8m0) scales.raw = shared_load<u32>(p + g * 4);
          else { uint2 v = shared_load<uint2>(p + g * 8); scales.s[0] = __uint_as_float(v.x); scales.s[1] = __uint_as_float(v.y); }
          Columns<false> columns;
          columns.b[0] = columns.b[1] = make_uint4(0, 0, 0, 0);
          const u8* at = x + i * 128 + 16 * t;
          if (column + i * 64 < cols) columns.b[0] = *(const uint4*)at;
          if (column + i * 64 + 32 < cols) columns.b[1] = *(const uint4*)(at + 64);
          Taken<F, true> taken;
          take_apart<F, true>(taken, codes, scales);
          accumulate<F, true>(acc[r], taken, scales, columns, false);
        }
        feed.release();
      }
      x += C * 128;
      column += C * 64;
    }
#pragma unroll
    for (int r = 0; r < R; r++) { sums[r][0] = acc[r][0]; sums[r][1] = acc[r][2]; }
  }
  result.take = feed.take;
  result.phase = feed.phase;
  return result;
}
// The same where the ring's state stays in registers: a call cannot change them.
template <int F, int R> DEVICE Sums<R> strip(Feed& feed, const u8* x, u32 first, u32 count, u32 cols) {
  Sums<R> result = strip_at<F, R>(feed, x, first, count, cols);
  feed.take = result.take;
  feed.phase = result.phase;
  return result;
}

// ---- what comes before ----

// Weights of a norm or a router into the second-level cache: they do not wait for anybody. Every block asks for its share.
DEVICE void prefetch(const void* p, u32 bytes) {
  if (!p) return;
#pragma unroll 1
  for (u32 at = (threadIdx.x % 64 * gridDim.x + blockIdx.x) * 128; threadIdx.x / 64 == 2 && at < bytes; at += 64 * gridDim.x * 128)
    asm volatile("prefetch.global.L2 [%0];" ::"l"((const u8*)p + at));
}

// Bytes that lie in memory into shared memory, by all threads.
DEVICE void copy_row(u8* to, const u8* from, u32 bytes) {
#pragma unroll 1
  for (u32 at = threadIdx.x * 16; at < bytes; at += STEP_THREADS * 16) *(uint4*)(to + at) = *(const uint4*)(from + at);
}

DEVICE void load8(float v[8], const float* p) {
  float4 lo = *(const float4*)p, hi = *(const float4*)(p + 4);
  v[0] = lo.x; v[1] = lo.y; v[2] = lo.z; v[3] = lo.w; v[4] = hi.x; v[5] = hi.y; v[6] = hi.z; v[7] = hi.w;
}

// 1 / rms of a row of whole eights, in the order of `inverse_rms`.
CALL float row_scale(const float* x, u32 cols, float eps, float* scratch) {
  u32 warp = threadIdx.x / 32, parts = (cols + 255) / 256;
#pragma unroll 1
  for (u32 part = warp; part < parts; part += STEP_WARPS) {
    u32 c = part * 256 + threadIdx.x % 32 * 8;
    float v[8] = {}, sum = 0.f;
    if (c < cols) load8(v, x + c);
#pragma unroll
    for (int k = 0; k < 8; k++) sum = fmaf(v[k], v[k], sum);
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) scratch[part] = sum;
  }
  block_barrier();
  // Where the row ends within a step, warps without columns have added zeros.
  float sum = 0.f;
#pragma unroll 4
  for (u32 i = 0; i < parts; i++) sum += scratch[i];
  return rsqrtf(sum / (float)cols + eps);
}

// What becomes of a row: `to` in the form of a format, and as floats, twin and digits where these are wanted.
struct RowOutput { u8* to; float* floats; Mat out; u8* out_digits; };

// Makes a row of whole eights, times `scale` and `weight` where there is a weight.
template <bool DIGITS> CALL void make_row(const float* x, const float* weight, float scale, u32 cols, const RowOutput& o) {
  u32 end = (cols + 63) / 64 * 64;
#pragma unroll 1
  for (u32 first = 0; first < end; first += STEP_THREADS * 8) {
    u32 c = first + threadIdx.x * 8;
    if (c / 256 * 256 >= end) break;  // whole warps
    float v[8] = {}, w[8];
    if (c < cols) load8(v, x + c);
    if (weight && c < cols) {
      load8(w, weight + c);
#pragma unroll
      for (int k = 0; k < 8; k++) v[k] = v[k] * scale * w[k];
    }
    bool inside = c < end;
    if constexpr (DIGITS) {
#pragma unroll 1
      for (u8* to = o.to; to; to = to == o.to ? o.out_digits : nullptr) digits8(v, inside ? to + c / 64 * DIGITS_BYTES : nullptr);
    } else if (inside) *(uint4*)(o.to + c * 2) = pack8(v);
    if (c < cols) {
      if (o.floats) store8(o.floats, v, c, cols, true);
      if (o.out.p) store8(o.out.p, v, c, cols, true);
      if (o.out.twin) *(uint4*)(o.out.twin + c) = pack8(v);
    }
  }
}

// One row of the router, by eight warps, of the normed row in shared memory. As `plain` of matmul.cu with eight warps a row.
CALL void router_row(const PairStage& s, u32 row, const float* x, u32 cols, float* parts) {
  u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float acc = 0.f;
#pragma unroll 1
  for (u32 c = threadIdx.x * 8; c < cols; c += 2048) {
    float e[8], v[8];
    load8(v, x + c);
    u64 at = (u64)row * cols + c;
    if (s.router_kind == 0) load8(e, (const float*)s.router + at);
    else {
      uint4 q = *(const uint4*)((const u16*)s.router + at);
      const u32 words[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
      for (int k = 0; k < 8; k++) {
        u16 bits = (u16)(words[k / 2] >> (16 * (k % 2)));
        e[k] = s.router_kind == 2 ? bf16_to_f32(bits) : f16_to_f32(bits);
      }
    }
#pragma unroll
    for (int k = 0; k < 8; k++) acc = fmaf(e[k], v[k], acc);
  }
  float y = warp_sum(acc);
  if (lane == 0) parts[warp] = y;
  asm volatile("bar.sync %0, 256;" ::"n"(ROUTER_BARRIER) : "memory");
  if (threadIdx.x == 0) {
    y = 0.f;
#pragma unroll 1
    for (u32 k = 0; k < 8; k++) y += parts[k];
    if (s.router_bias) y += s.router_bias[row];
    store(s.router_out, 0, row, y);
  }
  asm volatile("bar.sync %0, 256;" ::"n"(ROUTER_BARRIER) : "memory");
}

// Makes the row in shared memory, in the form that F wants. `floats`: where its norm is wanted as floats too, or null.
template <int F> CALL void prepare(const RowInput& in, u32 cols, u8* to, Shared& shared, float* floats) {
  if (in.kind == 0) {
    if constexpr (Is<F>::affine) copy_row(to, in.digits, (cols + 63) / 64 * DIGITS_BYTES);
    else copy_row(to, (const u8*)in.x.twin, cols * 2);
  } else if (in.kind < 3) {
    bool norm = in.kind == 2, writes = norm && blockIdx.x == gridDim.x - 1;
    float scale = norm ? row_scale(in.x.p, cols, in.eps, shared.scratch) : 1.f;
    RowOutput o = {to, floats, {}, nullptr};
    if (writes) { o.out = in.out; o.out_digits = in.out_digits; }
    make_row<Is<F>::affine>(in.x.p, norm ? in.weight : nullptr, scale, cols, o);
  }
  block_barrier();
}

// The sums of rows g and g + 8 of a lane into [16].
DEVICE void put_one(float* to, const float sums[2], u32 lane) {
  if (lane % 4 == 0) { to[lane / 4] = sums[0]; to[lane / 4 + 8] = sums[1]; }
}

// ---- stages ----

struct Block {
  Shared& shared;
  Feed& feed;
  u8* row;        // shared memory for rows
};

// The router's choice, by one warp.
CALL void choose(const RouteArgs& a, Shared& shared) {
  u32 id, lane = threadIdx.x % 32;
  float weight;
  route_row(a, 0, shared.scores, id, weight);
  if (lane < a.top_k) {
    shared.ids[lane] = id;
    shared.weights[lane] = weight;
    if (blockIdx.x == gridDim.x - 1) { a.ids[lane] = id; a.weights.p[lane] = weight; }
  }
}

// A row tile's sums of the slices of a team, in order, by the first lanes of its first warp.
DEVICE float team_sum(const Shared& shared, u32 buffer, const Team& team, u32 r) {
  u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float y = 0.f;
#pragma unroll 1
  for (u32 k = 0; k < team.size; k++) y += shared.sums[buffer][warp + k][r][lane];
  return y;
}

template <int F> DEVICE void run_line(Block& b, const Stage& stage) {
  const LineStage& s = stage.line;
  u32 lane = b.feed.lane, warp = threadIdx.x / 32;
  u8* x = b.row + stage.x_at;
  if (s.num_parts) prepare<F>(s.in, s.part[0].w.cols, x, b.shared, nullptr);
  // The last warp chooses: it is the last to get units.
  if (s.route.top_k && warp == STEP_WARPS - 1) choose(s.route, b.shared);
  if (s.num_parts == 0) return;
  u32 cols = s.part[0].w.cols, tiles = num_tiles(s.part[0].w);
  Team team(stage.slices);
  u32 first = slice_start(team.slice, team.size, tiles), count = slice_start(team.slice + 1, team.size, tiles) - first;
  Walk walk;
  walk.start(stage, team);
  for (u32 buffer = 0, part = 0; walk.there(); walk.step(), buffer ^= 1) {
    while (walk.r >= s.first_unit[part + 1]) part++;
    const Packed& w = s.part[part].w;
    Sums<1> sums = strip<F, 1>(b.feed, x, first, count, cols);
    put_one(b.shared.sums[buffer][warp][0], sums.of[0], lane);
    team.barrier();
    u32 at = (walk.r - s.first_unit[part]) * 16 + lane;
    if (team.slice == 0 && lane < 16 && at < w.rows) {
      float y = finish<F>(w, 0, at, team_sum(b.shared, buffer, team, 0));
      store(s.part[part].out, 0, at, y);
      if (s.residual.p) s.residual.p[at] += y;
    }
  }
}

// The latent's norm and its place in the cache, by one block; the rotation of the queries by the others.
CALL void latent_row(const Latent& l, Shared& shared) {
  u32 half = l.table.cols / 2, others = gridDim.x > 1 ? gridDim.x - 1 : 1;
  if (blockIdx.x == gridDim.x - 1) {
    u32 cols = l.latent.cols;
    u64 at = (u64)l.slots[0] * l.cache_width;
    float scale = row_scale(l.latent.p, cols, l.eps, shared.scratch);
#pragma unroll 1
    for (u32 c = threadIdx.x; c < cols; c += STEP_THREADS) {
      float y = l.latent.p[c] * scale * l.weight[c];
      store(l.latent, 0, c, y);
      cache_store(l.cache, l.cache_bf16, at + c, y);
    }
#pragma unroll 1
    for (u32 i = threadIdx.x; i < half; i += STEP_THREADS) {
      rope_pair(l.k_pe, 0, 0, l.table.p, half, i, l.interleaved);
      u32 c0 = l.interleaved ? 2 * i : i, c1 = l.interleaved ? 2 * i + 1 : i + half;
      cache_store(l.cache, l.cache_bf16, at + cols + c0, l.k_pe.p[c0]);
      cache_store(l.cache, l.cache_bf16, at + cols + c1, l.k_pe.p[c1]);
    }
    if (gridDim.x > 1) return;
  }
#pragma unroll 1
  for (u32 i = (others - 1 - blockIdx.x % others) * STEP_THREADS + threadIdx.x; i < l.num_heads * half; i += others * STEP_THREADS)
    rope_pair(l.q, 0, i / half * l.head_stride, l.table.p, half, i % half, l.interleaved);
}

// Attention's result of a head, joined from its parts, as floats into shared memory. A thread has a column; in the order of `join8`.
CALL void join_head(const AttendArgs& a, u32 head, float* to) {
  u32 first, count;
  keys_of(a, 0, first, count);
  u32 split = split_of(count), splits = (count + split - 1) / split, width = PART_HEADER + a.value_dim;
  const float* part = a.partial + (u64)head * a.max_splits * width;
  float m = a.sinks ? a.sinks[head] : -INFINITY;
#pragma unroll 4
  for (u32 s = 0; s < splits; s++) m = fmaxf(m, part[s * width]);
#pragma unroll 1
  for (u32 c = threadIdx.x; c < a.value_dim; c += STEP_THREADS) {
    float l = a.sinks ? expf(a.sinks[head] - m) : 0.f, out = 0.f;
#pragma unroll 4
    for (u32 s = 0; s < splits; s++) {
      const float* p = part + s * width;
      float weight = expf(p[0] - m);
      l = fmaf(p[1], weight, l);
      out = fmaf(p[PART_HEADER + c], weight, out);
    }
    to[c] = out / l;
  }
}

template <int F> DEVICE void run_heads(Block& b, const Stage& stage) {
  const HeadsStage& s = stage.heads;
  u32 lane = b.feed.lane, warp = threadIdx.x / 32;
  u8* x = b.row + stage.x_at;
  u32 cols = s.w.cols, tiles = num_tiles(s.w), row_tiles = row_tiles_of(s.w), bytes = tiles * Form<F>::tile;
  u32 total = s.num_heads * row_tiles, each = (total + gridDim.x - 1) / gridDim.x, begin = min(blockIdx.x * each, total), end = min(begin + each, total);
  u32 first_head = begin / row_tiles;
  u32 heads = begin < end ? (end - 1) / row_tiles - first_head + 1 : 0;
  float* joined = (float*)(x + (heads * bytes + 15) / 16 * 16);
#pragma unroll 1
  for (u32 h = 0; s.joins && h < heads; h++) join_head(s.attend, first_head + h, joined + h * cols);
  if (s.joins) block_barrier();
#pragma unroll 1
  for (u32 h = 0; h < heads; h++) {
    RowOutput o = {x + h * bytes, nullptr, {}, nullptr};
    make_row<Is<F>::affine>(s.joins ? joined + h * cols : s.x + (first_head + h) * s.x_head_stride, nullptr, 1.f, cols, o);
  }
  if (s.has_latent) latent_row(s.latent, b.shared);
  block_barrier();
  Team team(stage.slices);
  u32 first = slice_start(team.slice, team.size, tiles), count = slice_start(team.slice + 1, team.size, tiles) - first;
  Walk walk;
  walk.start(stage, team);
  for (u32 buffer = 0; walk.there(); walk.step(), buffer ^= 1) {
    Sums<1> sums = strip<F, 1>(b.feed, x + (walk.q - first_head) * bytes, first, count, cols);
    put_one(b.shared.sums[buffer][warp][0], sums.of[0], lane);
    team.barrier();
    u32 at = walk.r * 16 + lane;
    if (team.slice == 0 && lane < 16 && at < s.w.rows) {
      float y = finish<F>(s.w, walk.q, at, team_sum(b.shared, buffer, team, 0));
      store(s.out, 0, walk.q * s.w.rows + at, y);
      if (s.out_digits) joined[(walk.u - begin) * 16 + lane] = y;
    }
  }
  if (!s.out_digits) return;
  // A block has whole tiles of digits: four row tiles of one head each.
  block_barrier();
  RowOutput o = {s.out_digits + begin / 4 * DIGITS_BYTES, nullptr, {}, nullptr};
  make_row<true>(joined, nullptr, 1.f, (end - begin) * 16, o);
}

template <int F> DEVICE void run_pair(Block& b, const Stage& stage) {
  const PairStage& s = stage.pair;
  u32 lane = b.feed.lane, warp = threadIdx.x / 32;
  u8* x = b.row + stage.x_at;
  u32 cols = s.gate.cols, tiles = num_tiles(s.gate), rows = s.gate.rows;
  float* floats = s.router ? (float*)(x + tiles * Form<F>::tile) : nullptr;
  prepare<F>(s.in, cols, x, b.shared, floats);
  // Eight warps have the router's rows; the others go on.
  if (s.router && warp < 8)
  #pragma unroll 1
    for (u32 row = blockIdx.x; row < s.router_rows; row += gridDim.x) router_row(s, row, floats, cols, b.shared.scratch);
  if (rows == 0) return;
  Team team(stage.slices);
  u32 first = slice_start(team.slice, team.size, tiles), count = slice_start(team.slice + 1, team.size, tiles) - first;
  Walk walk;
  walk.start(stage, team);
  for (u32 buffer = 0; walk.there(); walk.step(), buffer ^= 1) {
    Sums<2> sums = strip<F, 2>(b.feed, x, first, count, cols);
    put_one(b.shared.sums[buffer][warp][0], sums.of[0], lane);
    put_one(b.shared.sums[buffer][warp][1], sums.of[1], lane);
    team.barrier();
    if (team.slice != 0) continue;
    u32 at = walk.r * 16 + lane, matrix = s.top_k ? b.shared.ids[walk.q] : 0;
    if (lane < 16 && at < rows) {
      float gate = finish<F>(s.gate, matrix, at, team_sum(b.shared, buffer, team, 0));
      float up = finish<F>(s.up, matrix, at, team_sum(b.shared, buffer, team, 1));
      store(s.out, 0, walk.q * rows + at, activate(s.activation, gate, up));
    }
  }
}

template <int F> DEVICE void run_down(Block& b, const Stage& stage) {
  const DownStage& s = stage.down;
  u32 lane = b.feed.lane, warp = threadIdx.x / 32;
  u8* x = b.row + stage.x_at;
  u32 cols = s.w.cols, tiles = num_tiles(s.w), row_tiles = row_tiles_of(s.w);
  RowOutput o = {x, nullptr, {}, nullptr};
  make_row<Is<F>::affine>(s.h, nullptr, 1.f, s.top_k * cols, o);
  block_barrier();
  Team team(stage.slices);
  u32 first = slice_start(team.slice, team.size, tiles), count = slice_start(team.slice + 1, team.size, tiles) - first;
  Walk walk;
  walk.start(stage, team);
  for (; walk.there(); walk.step()) {
    Sums<1> sums = strip<F, 1>(b.feed, x + walk.r * tiles * Form<F>::tile, first, count, cols);
    put_one(b.shared.results + (walk.u * team.size + team.slice) * 16, sums.of[0], lane);
  }
  block_barrier();
  for (u32 tile = warp; blockIdx.x + tile * gridDim.x < row_tiles; tile += STEP_WARPS) {
    u32 at = (blockIdx.x + tile * gridDim.x) * 16 + lane;
    if (lane >= 16 || at >= s.w.rows) continue;
    float sum = s.plus.p ? s.plus.p[at] : 0.f;
#pragma unroll 1
    for (u32 k = 0; k < s.top_k; k++) {
      const float* parts = b.shared.results + (tile * s.top_k + k) * team.size * 16 + lane;
      float y = 0.f;
#pragma unroll 4
      for (u32 i = 0; i < team.size; i++) y += parts[i * 16];
      sum = fmaf(b.shared.weights[k], finish<F>(s.w, b.shared.ids[k], at, y), sum);
    }
    store(s.out, 0, at, sum);
    if (s.residual.p) s.residual.p[at] += sum;
  }
}

// What a stage reads before anybody has written anything.
DEVICE void prefetch_stage(const Stage& stage) {
  if (stage.kind == LINE && stage.line.num_parts) prefetch(stage.line.in.weight, stage.line.part[0].w.cols * 4);
  if (stage.kind == PAIR) {
    u32 cols = stage.pair.in.x.cols;
    prefetch(stage.pair.in.weight, cols * 4);
    prefetch(stage.pair.router, stage.pair.router_rows * cols * (stage.pair.router_kind == 0 ? 4 : 2));
  }
}

// Starts copying a description; it is there after `descriptions_arrived` and a barrier.
DEVICE void load_description(Shared& shared, const StepArgs& a, u32 stage) {
  constexpr u32 PIECES = sizeof(Stage) / 16;
  if (stage < a.num_stages && threadIdx.x < PIECES)
    copy_async<16>(shared_address(&shared.stages[stage % DESCRIPTORS]) + threadIdx.x * 16, (const u8*)(a.stages + stage) + threadIdx.x * 16);
}
DEVICE void descriptions_arrived() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// F: format of the routed experts; G: of everything else.
template <int F, int G> DEVICE void multiply(const StepArgs& a, Shared& shared, Feed& feed, u8* row) {
  Block block = {shared, feed, row};
  u32 target = 0;
  prefetch_stage(shared.stages[0]);
  pdl_wait();
  if (threadIdx.x == 0) target = (*(volatile u32*)a.arrived + 1) * gridDim.x;
  for (u32 k = 0; k < a.num_stages; k++) {
    const Stage& stage = shared.stages[k % DESCRIPTORS];
    if (k > 0) {
      descriptions_arrived();
      block_barrier();
      if (threadIdx.x == 0) {
        __threadfence();
        if (stage.waits) atomicAdd(a.arrived + k, 1);
        *(volatile u32*)&shared.current = k;
      }
      if (threadIdx.x >= 64 && k + 1 < a.num_stages) prefetch_stage(shared.stages[(k + 1) % DESCRIPTORS]);
      if (threadIdx.x == 0 && stage.waits) {
        while ((int)(*(volatile u32*)(a.arrived + k) - target) < 0) {}
        __threadfence();
      }
      // Nobody feeds the stage before any more: its description may be replaced.
      if (threadIdx.x >= 32 && threadIdx.x < 32 + STEP_WARPS)
        while (*(volatile u32*)&shared.cursors[threadIdx.x - 32] < k) {}
      block_barrier();
    }
    load_description(shared, a, k + DESCRIPTORS - 1);
    if (k + 1 == a.num_stages) pdl_launch();
    switch (stage.kind) {
      case LINE: run_line<G>(block, stage); break;
      case HEADS: run_heads<G>(block, stage); break;
      case PAIR:
        if (F == G || !stage.pair.top_k) run_pair<G>(block, stage);
        else run_pair<F>(block, stage);
        break;
      default: run_down<F>(block, stage);
    }
  }
  // All blocks have read how often the kernel ran when the first of them passes a stage that waits; with one stage nobody asks.
  if (blockIdx.x == 0 && threadIdx.x == 0) *(volatile u32*)a.arrived = *(volatile u32*)a.arrived + 1;
}
template <int F, int G> DEVICE void step(const StepArgs& a) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) u8 dynamic[];
  __shared__ Shared shared;
  Rings rings = {shared_address(dynamic)};
  if (threadIdx.x < STEP_WARPS * SLOTS) {
    u32 bar = rings.full(0, threadIdx.x);
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(bar) : "memory");
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(bar + 8) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  if (threadIdx.x < STEP_WARPS) shared.cursors[threadIdx.x] = 0;
  if (threadIdx.x == 0) shared.current = 0;
  if (threadIdx.x < STEP_THREADS)
    for (u32 k = 0; k + 1 < DESCRIPTORS; k++) load_description(shared, a, k);
  descriptions_arrived();
  __syncthreads();
  if (threadIdx.x >= STEP_THREADS) feed(a, shared, rings);
  else {
    Feed mine;
    mine.start(rings);
    multiply<F, G>(a, shared, mine, dynamic + RING_BYTES + STEP_WARPS * SLOTS * 16);
  }
#else
  __trap();  // bulk copies came with this architecture; nobody launches it on others
#endif
}

#define STEP(NAME, F, OTHER, G) KERNEL __launch_bounds__(STEP_THREADS + 32 * FEEDERS, 1) step_##NAME##_##OTHER(const __grid_constant__ StepArgs a) { step<F, G>(a); }
STEP(affine4, AFFINE4, affine4, AFFINE4)
// Routed experts with fewer bits than everything else, as demolished models have them.
STEP(affine3, AFFINE3, affine4, AFFINE4)
