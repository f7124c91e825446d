// One row of latent attention as one kernel: the second product of the queries, rotations, the queries' product with the keys of the heads, the row of
// the cache, attention over the cache, the product with the values of the heads. As kernels of their own (decode.cu, attention.cu) these are four, and each
// of them waits for the one before, starts cold, and reads its row behind other blocks' weights: 28 us a layer of GLM-5.2-77 for 6 us of bytes.
//
// A cluster of two blocks has a head. Each block has half of the query's rows; of the absorbed query and of the keys, the columns that it adds up of the
// scores; of the keys again, the columns that it adds up of the values; and the slice of the last product with those. So they give each other four short rows: of
// the query, of scores, and of sums of the last product.
//
// Weights do not depend on anything: those of the first product are asked for as far as the ring goes, those of the second as a whole, before the kernel before has
// ended; those of the third when the second is done. Nor do the cache's rows of other steps: a step begins with copies from the host, for which
// it waits until the one before has ended. The row's own key is not in the cache yet: both blocks make it.
//
// Results are those of the kernels it stands for bit for bit: the same slices of columns, the same parts of keys, added in the same order.
#include "attend.cuh"
#include "barriers.cuh"
#include "matrices.cuh"
#include "pipe.cuh"

struct RowHeadsArgs {
  Packed w_q, w_k, w_v;        // [heads * (nope + ROPE), latent of queries], [heads][RANK, nope], [heads][value, RANK]
  RowInput in;                 // the norm of the queries' latent
  Latent latent;               // `q` is not used
  AttendArgs attend;           // `q`, `q_rope`, `out` and `partial` are not used
  Mat out;
  u8* out_digits;              // the result once more as digits, or null
  u32 log_slices, pad;         // of the first product; the others have one and two
};

#define RANK 512
#define ROPE_COLUMNS 64
#define KEY (RANK + ROPE_COLUMNS)
#define KEYS 32                // of a part
#define MOST_PARTS 16
#define PART (PART_HEADER + RANK / 2)
#define ROW_WARPS 16
#define MOST_ROWS 256          // of a head's query, and of its values
#define OTHER_TILES 4          // of a unit of the second and third product
// Columns of keys that a block has, from column 0 or 256 on: the first of a pair adds up scores of 288 and values of 256, the second of the others.
#define OWN_COLUMNS 320
#define KEY_STRIDE (OWN_COLUMNS + 8)  // elements between two keys in shared memory: rows in different banks

// A head's weights in shared memory: a warp's unit of the first product in SLOTS slots of CHUNK tiles of two row tiles; all of the block's row tiles of the
// second; where those were, a row tile a warp of the third, half of its columns. Copies are large: a copy takes 36 ns of its multiprocessor's copy engine however
// short it is, and with 80 of two tiles each the last one was asked for 6 us after the first.
template <int F, int CHUNK, int SLOTS> struct RowHeads {
  typedef Pipe<F, 2, CHUNK, SLOTS> Queries;
  static constexpr u32 TILE_BYTES = Queries::TILE;
  static constexpr u32 KEY_BYTES = KEYS * KEY_STRIDE * 2;
  // Where the first product's ring was: parts of keys, BATCH at a time, and what comes of all parts.
  static constexpr u32 RINGS = ROW_WARPS * Queries::RING, BATCH = (RINGS - MOST_PARTS * PART * 4) / KEY_BYTES;
  static constexpr u32 PARTS = BATCH * KEY_BYTES;                   // [MOST_PARTS][PART]
  static constexpr u32 OTHERS = RINGS;
  static constexpr u32 BARRIERS = OTHERS + ROW_WARPS * OTHER_TILES * TILE_BYTES;  // of the second product, and a warp's of the third
  static constexpr u32 ROW = BARRIERS + 16 * (ROW_WARPS / 2 + 1);   // in the form of F
  static constexpr u32 QUERY = ROW + 32 * Form<F>::tile;            // bfloat16: [high, low][KEY_STRIDE], the block's columns
  static constexpr u32 SCORES = QUERY + 2 * KEY_STRIDE * 2;         // [halves of the columns][BATCH][KEYS]
  static constexpr u32 WEIGHTS = SCORES + 2 * BATCH * KEYS * 4;     // bfloat16: [BATCH][high, low][KEYS + 8]
  static constexpr u32 RED = WEIGHTS + BATCH * 2 * (KEYS + 8) * 2;  // [warp][2][16]; [KEY / 32][16]; [RANK / 2]
  static constexpr u32 HEAD = RED + ROW_WARPS * 2 * 16 * 4;         // [MOST_ROWS]: the head's query; two slices of half of its values
  static constexpr u32 OWN = HEAD + MOST_ROWS * 4;                  // bfloat16: [KEY]
  static constexpr u32 SLOT_OF = OWN + KEY * 2;                     // [MOST_PARTS][KEYS]
  static constexpr u32 SCRATCH = SLOT_OF + MOST_PARTS * KEYS * 4;
  static constexpr u32 BYTES = SCRATCH + ROW_WARPS * 4;
};

#if __CUDA_ARCH__ >= 900

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
DEVICE void send(u32 to, float x) { asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(to), "f"(x) : "memory"); }

// Column c of the joined parts of a head, as `join8` of attend.cuh.
DEVICE float join_parts(const float* parts, u32 splits, u32 c) {
  float m = -INFINITY, l = 0.f, out = 0.f;
#pragma unroll 4
  for (u32 s = 0; s < splits; s++) m = fmaxf(m, parts[s * PART]);
#pragma unroll 4
  for (u32 s = 0; s < splits; s++) {
    const float* part = parts + s * PART;
    float weight = power_of_two(part[0] - m);
    l = fmaf(part[1], weight, l);
    out = fmaf(part[PART_HEADER + c], weight, out);
  }
  return out / l;
}

// Eight columns in the form of F; all lanes of a warp take part.
template <int F> DEVICE void put_form(const float v[8], u8* row, u32 c, bool inside) {
  if constexpr (Is<F>::affine) digits8(v, inside ? row + c / 64 * DIGITS_BYTES : nullptr);
  else if (inside) *(uint4*)(row + c * 2) = pack8(v);
}

// acc += `count` tiles from `slot` on, by columns from `column` on, which start at `x`. A loop over single tiles: code that runs once a layer is fetched from far away.
template <typename P, int F> DEVICE void tiles(P& pipe, float acc[P::SUMS], u32 slot, u32 count, const u8* x, u32 column, u32 cols) {
#pragma unroll 1
  for (u32 i = 0; i < count; i++) pipe.tile(acc, slot + i * P::TILE, x + (column / 64 + i) * Form<F>::tile, column + i * 64, cols);
}
DEVICE void copy_bulk(u32 to, const void* from, u32 bytes, u32 bar) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(bytes), "r"(bar) : "memory");
}

// Grid: two blocks a head; 512 threads.
template <int F, int CHUNK, int SLOTS> DEVICE void row_heads(const RowHeadsArgs& a) {
  extern __shared__ __align__(128) u8 shared[];
  typedef RowHeads<F, CHUNK, SLOTS> L;
  typedef Pipe<F, 1> One;  // for its product of a tile
  float* red = (float*)(shared + L::RED);
  float* query = (float*)(shared + L::HEAD);
  float* scores = (float*)(shared + L::SCORES);
  float* parts_at = (float*)(shared + L::PARTS);
  float* scratch = (float*)(shared + L::SCRATCH);
  u16* own = (u16*)(shared + L::OWN);
  u16* weights = (u16*)(shared + L::WEIGHTS);
  u16* absorbed = (u16*)(shared + L::QUERY);
  u32* slot_of = (u32*)(shared + L::SLOT_OF);
  u8* row = shared + L::ROW;
  const Latent& l = a.latent;
  pdl_launch();
  u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, half = blockIdx.x % 2, head = blockIdx.x / 2;
  u32 q_rows = a.w_q.rows / a.attend.num_heads, v_rows = a.w_v.rows, nope = a.w_k.cols;
  // The first product: a warp has at most one unit, a slice of the columns of two row tiles.
  u32 q_tiles = num_tiles(a.w_q), q_slice = warp & ((1u << a.log_slices) - 1), q_unit = warp >> a.log_slices;
  u32 q_first = q_slice * q_tiles >> a.log_slices, q_count = q_unit < q_rows / 64 ? ((q_slice + 1) * q_tiles >> a.log_slices) - q_first : 0;
  typename L::Queries queries;
  queries.start(shared);
  if (q_count) queries.aim(a.w_q, 0, head * (q_rows / 16) + half * (q_rows / 32) + q_unit * 2, q_first, q_count);
#pragma unroll 1
  for (int i = 0; i < SLOTS; i++) queries.issue();
  // The second: the row tiles of the block's columns of scores, 18 and 14, a warp one and another. The third: a row tile a warp, half of the columns.
  u32 k_tiles = num_tiles(a.w_k), k_base = half * (KEY / 32), k_units = half ? RANK / 16 - KEY / 32 : KEY / 32;
  u32 bar = shared_address(shared + L::BARRIERS), others = shared_address(shared + L::OTHERS);
  if (lane == 0) {
    if (warp == 0) barrier_init(bar, 1);
    barrier_init(bar + 8 + 8 * warp, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    if (warp == 0) copy_bulk(others, a.w_k.codes + head * a.w_k.codes_stride + k_base * k_tiles * (L::TILE_BYTES / 4), k_units * k_tiles * L::TILE_BYTES, bar);
  }
  // What the host wrote, and weights of norms, do not wait for the operation before either.
  u32 keys = a.attend.paging.positions[0] + 1, parts = (keys + KEYS - 1) / KEYS;
  if (threadIdx.x < keys) {
    const u32* table = a.attend.paging.block_table + (u64)a.attend.paging.sequences[0] * a.attend.paging.max_blocks;
    u32 block_size = a.attend.paging.block_size, slot = table[threadIdx.x / block_size] * block_size + threadIdx.x % block_size;
    slot_of[threadIdx.x] = slot;
    const u16* from = (const u16*)a.attend.cache + (u64)slot * a.attend.cache_width + half * (RANK / 2);
    if (threadIdx.x + 1 < keys)
#pragma unroll 1
      for (u32 i = 0; i < OWN_COLUMNS; i += 64) asm volatile("prefetch.global.L2 [%0];" ::"l"(from + i));
  }
  // Half a warp copies a key. Past the end are zeros: their weight is zero, and zero times what lies there may be no number. The last is the row's own.
  auto copy_keys = [&](u32 first, u32 count) {
#pragma unroll 1
    for (u32 k = threadIdx.x / 16; k < count * KEYS; k += 32) {
      u32 p = first * KEYS + k, lane16 = threadIdx.x % 16;
      bool valid = p < keys;
      u8* to = shared + k / KEYS * L::KEY_BYTES + (k % KEYS * KEY_STRIDE + lane16 * 8) * 2;
      const u16* from = (const u16*)a.attend.cache + (u64)(valid ? slot_of[p] : 0) * a.attend.cache_width + half * (RANK / 2) + lane16 * 8;
      bool is_own = p + 1 == keys;
#pragma unroll
      for (u32 i = 0; i < 3; i++) {
        if (i == 2 && lane16 >= (half ? 8 : 4)) continue;
        if (is_own) *(uint4*)(to + i * 256) = *(const uint4*)(own + half * (RANK / 2) + lane16 * 8 + i * 128);
        else asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to) + i * 256), "l"(from + i * 128), "r"(valid ? 16 : 0));
      }
    }
  };
  bool latent_half = threadIdx.x >= 256;  // threads that have the row's own key
  u32 c = threadIdx.x % 256 * 8, cols = latent_half ? RANK : a.w_q.cols;
  float v[8], weight[8];
  load8(weight, latent_half ? l.weight : a.in.weight, c, cols, true);
  cluster_arrive();
  pdl_wait();

  // Norms of the queries' latent and of the keys', by half of the block each.
  load8(v, latent_half ? l.latent.p : a.in.x.p, c, cols, true);
  u32 pairs = ROPE_COLUMNS / 2, c0 = l.interleaved ? 2 * lane : lane, c1 = l.interleaved ? 2 * lane + 1 : lane + pairs;
  float cosine = 0.f, sine = 0.f, x0 = 0.f, x1 = 0.f;
  if (warp == 15) {
    cosine = l.table.p[lane]; sine = l.table.p[pairs + lane];
    x0 = l.k_pe.p[c0]; x1 = l.k_pe.p[c1];
  }
  float sum = 0.f;
#pragma unroll
  for (int k = 0; k < 8; k++) sum = fmaf(v[k], v[k], sum);
  sum = warp_sum(sum);
  if (lane == 0) scratch[warp] = sum;
  __syncthreads();
  sum = 0.f;
#pragma unroll
  for (int i = 0; i < 8; i++) sum += scratch[(latent_half ? 8 : 0) + i];
  float scale = rsqrtf(sum / (float)cols + (latent_half ? l.eps : a.in.eps));
#pragma unroll
  for (int k = 0; k < 8; k++) v[k] = v[k] * scale * weight[k];
  if (!latent_half) {
    bool inside = c < q_tiles * 64, writes = blockIdx.x == 0;
    if (Is<F>::affine || a.in.out_digits) {
      Digits8 d = digits_of(v);
      if (Is<F>::affine && inside) d.store(row + c / 64 * DIGITS_BYTES);
      if (inside && writes && a.in.out_digits) d.store(a.in.out_digits + c / 64 * DIGITS_BYTES);
    }
    if (!Is<F>::affine && inside) *(uint4*)(row + c * 2) = pack8(v);
    if (writes && c < cols && a.in.out.p) store8(a.in.out.p, v, c, cols, true);
    if (writes && c < cols && a.in.out.twin) *(uint4*)(a.in.out.twin + c) = pack8(v);
  } else {
    u16* slot = (u16*)l.cache + (u64)l.slots[0] * l.cache_width;
    bool stores = head == 0 && half == 0;
    if (c < RANK) {
      *(uint4*)(own + c) = pack8(v);
      if (stores) *(uint4*)(slot + c) = pack8(v);
    } else if (warp == 15) {
      float2 y = rotated(x0, x1, cosine, sine);
      own[RANK + c0] = f32_to_bf16(y.x);
      own[RANK + c1] = f32_to_bf16(y.y);
      if (stores) { slot[RANK + c0] = f32_to_bf16(y.x); slot[RANK + c1] = f32_to_bf16(y.y); }
    }
  }
  cluster_wait();  // the other block is here: its shared memory may be written
  __syncthreads();

  {
    float acc[L::Queries::SUMS] = {};
#pragma unroll 1
    for (u32 j = 0; j < q_count; j += CHUNK) {
      queries.wait();
      tiles<typename L::Queries, F>(queries, acc, queries.ring + queries.take * L::Queries::SLOT, q_count - j < CHUNK ? q_count - j : CHUNK, row, (q_first + j) * 64, a.w_q.cols);
      queries.take = queries.take + 1 == SLOTS ? 0 : queries.take + 1;
      __syncwarp();
      queries.issue();
    }
    queries.put_sums(red + warp * 32, acc);
    queries.stop();
  }
  __syncthreads();
  // The first product's rings are read: keys go there.
  copy_keys(0, parts < L::BATCH ? parts : L::BATCH);
  if (threadIdx.x < q_rows / 2) {
    u32 r = half * (q_rows / 2) + threadIdx.x;
    float y = 0.f;
#pragma unroll 1
    for (u32 s = 0; s < 1u << a.log_slices; s++) y += red[((threadIdx.x / 32 << a.log_slices) + s) * 32 + threadIdx.x % 32];
    y = finish<F>(a.w_q, 0, head * q_rows + r, y);
    query[r] = y;
    send(cluster_address(shared_address(query + r), 1 - half), y);
  }
  cluster_sync();

  auto put_absorbed = [&](u32 column, float x) {
    u16 high, low;
    split_bf16(x, high, low);
    absorbed[column - half * (RANK / 2)] = high;
    absorbed[KEY_STRIDE + column - half * (RANK / 2)] = low;
  };
  if (warp == 0) {
    load8(v, query, lane * 8, nope, true);
    put_form<F>(v, row, lane * 8, lane * 8 < k_tiles * 64);
  } else if (warp == 15 && half == 1) {
    float2 y = rotated(query[nope + c0], query[nope + c1], cosine, sine);
    put_absorbed(RANK + c0, y.x);
    put_absorbed(RANK + c1, y.y);
  }
  __syncthreads();
  One one;
  one.lane = lane;
  barrier_wait(bar, 0);
#pragma unroll 1
  for (u32 unit = warp; unit < k_units; unit += ROW_WARPS) {
    float acc[One::SUMS] = {};
    tiles<One, F>(one, acc, others + unit * k_tiles * L::TILE_BYTES, k_tiles, row, 0, nope);
    one.put_sums(red + unit * 16, acc);
  }
  __syncthreads();
  if (lane == 0 && warp < v_rows / 16)
    copy_bulk(others + warp * (OTHER_TILES * L::TILE_BYTES), a.w_v.codes + head * a.w_v.codes_stride + (warp * (RANK / 64) + half * OTHER_TILES) * (u64)(L::TILE_BYTES / 4), OTHER_TILES * L::TILE_BYTES, bar + 8 + 8 * warp);
  {
    u32 r = k_base * 16 + threadIdx.x;
    if (threadIdx.x < k_units * 16) {
      float y = finish<F>(a.w_k, head, r, 0.f + red[threadIdx.x]);
      put_absorbed(r, y);
    }
  }

  u32 keys_at = shared_address(shared), absorbed_at = shared_address(absorbed), weights_at = shared_address(weights);
  float log_scale = a.attend.scale * LOG2_E;
#pragma unroll 1
  for (u32 first = 0; first < parts; first += L::BATCH) {
    u32 batch = parts - first < L::BATCH ? parts - first : L::BATCH;
    if (first) {
      cluster_sync();  // both have read the scores of the batch before
      copy_keys(first, batch);
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
    // Scores of 16 keys: the first columns of the product are the query's high and low parts.
#pragma unroll 1
    for (u32 job = warp; job < batch * 2; job += ROW_WARPS) {
      u32 a_at = keys_at + job / 2 * L::KEY_BYTES + ((job % 2 * 16 + lane % 16) * KEY_STRIDE + half * (KEY / 2 - RANK / 2) + lane / 16 * 8) * 2;
      u32 b_at = absorbed_at + (lane % 2 * KEY_STRIDE + half * (KEY / 2 - RANK / 2) + lane / 8 % 2 * 8) * 2;
      float dot[4] = {};
#pragma unroll 2
      for (u32 s = 0; s < KEY / 32; s++) {
        u32 x[4], b[2];
        ldmatrix4(x, a_at + s * 32);
        ldmatrix2(b, b_at + s * 32);
        mma_bf16(dot, x, b[0], b[1]);
      }
      if (t == 0) {
        float* to = scores + (half * L::BATCH + job / 2) * KEYS + job % 2 * 16 + g;
        to[0] = dot[0] + dot[1];
        to[8] = dot[2] + dot[3];
        u32 there = cluster_address(shared_address(to), 1 - half);
        send(there, dot[0] + dot[1]);
        send(there + 32, dot[2] + dot[3]);
      }
    }
    cluster_sync();
    if (warp < batch) {
      float s = scores[warp * KEYS + lane] + scores[(L::BATCH + warp) * KEYS + lane];
      s = (first + warp) * KEYS + lane < keys ? s : -INFINITY;
      float from = ceilf(warp_max(s) * log_scale), p = exp2_of(fmaf(s, log_scale, -from)), total = warp_sum(p);
      split_bf16(p, weights[warp * 2 * (KEYS + 8) + lane], weights[(warp * 2 + 1) * (KEYS + 8) + lane]);
      if (lane < 2) parts_at[(first + warp) * PART + lane] = lane ? total : from;
    }
    __syncthreads();
    // Values: 16 columns of a part, transposed; the weights are all columns of the product.
#pragma unroll 1
    for (u32 job = warp; job < batch * (RANK / 32); job += ROW_WARPS) {
      u32 part = job / (RANK / 32), column = job % (RANK / 32) * 16;
      u32 a_at = keys_at + part * L::KEY_BYTES + ((lane / 16 * 8 + lane % 8) * KEY_STRIDE + column + lane / 8 % 2 * 8) * 2;
      u32 b_at = weights_at + (part * 2 * (KEYS + 8) + lane / 8 % 2 * 8) * 2;
      float acc[4] = {};
#pragma unroll
      for (u32 s = 0; s < 2; s++) {
        u32 x[4], high[2], low[2];
        ldmatrix4_transposed(x, a_at + s * 16 * KEY_STRIDE * 2);
        ldmatrix2(high, b_at + s * 32);
        ldmatrix2(low, b_at + (KEYS + 8 + s * 16) * 2);
        mma_bf16(acc, x, high[0], high[1]);
        mma_bf16(acc, x, low[0], low[1]);
      }
      if (t == 0) {
        float* to = parts_at + (first + part) * PART + PART_HEADER + column + g;
        to[0] = acc[0];
        to[8] = acc[2];
      }
    }
  }
  __syncthreads();

  if (threadIdx.x < RANK / 2) red[threadIdx.x] = join_parts(parts_at, parts, threadIdx.x);
  __syncthreads();
  if (warp == 0) {
    load8(v, red, lane * 8, RANK / 2, true);
    put_form<F>(v, row, half * (RANK / 2) + lane * 8, true);
  }
  __syncthreads();
  if (warp < v_rows / 16) {
    float acc[One::SUMS] = {};
    barrier_wait(bar + 8 + 8 * warp, 0);
    tiles<One, F>(one, acc, others + warp * (OTHER_TILES * L::TILE_BYTES), OTHER_TILES, row, half * (RANK / 2), RANK);
    one.put_sums(red + warp * 16, acc);
  }
  __syncthreads();
  // Each block adds both slices of half of the rows.
  if (threadIdx.x < v_rows) {
    u32 to = threadIdx.x / (v_rows / 2);
    send(cluster_address(shared_address(query + half * (MOST_ROWS / 2) + threadIdx.x % (v_rows / 2)), to), red[threadIdx.x]);
  }
  cluster_sync();
  if (threadIdx.x < v_rows / 2) {
    u32 r = half * (v_rows / 2) + threadIdx.x;
    float y = finish<F>(a.w_v, head, r, 0.f + query[threadIdx.x] + query[MOST_ROWS / 2 + threadIdx.x]);
    store(a.out, 0, head * v_rows + r, y);
    query[threadIdx.x] = y;
  }
  if (!a.out_digits) return;
  __syncthreads();
  if (warp == 0) {
    bool inside = lane * 8 < v_rows / 2;
    load8(v, query, lane * 8, v_rows / 2, true);
    digits8(v, inside ? a.out_digits + (head * v_rows + half * (v_rows / 2) + lane * 8) / 64 * DIGITS_BYTES : nullptr);
  }
}

#ifndef NO_KERNELS
// Registers for 896 threads, though 512 are launched: with more, and with more tiles at a time, it is no faster.
#define ROW_HEADS(NAME, F, CHUNK, SLOTS) \
  KERNEL __cluster_dims__(2, 1, 1) __launch_bounds__(896, 1) NAME(const __grid_constant__ RowHeadsArgs a) { row_heads<F, CHUNK, SLOTS>(a); }
ROW_HEADS(row_heads_affine2, AFFINE2, 8, 1)
ROW_HEADS(row_heads_affine3, AFFINE3, 8, 1)
ROW_HEADS(row_heads_affine4, AFFINE4, 8, 1)
ROW_HEADS(row_heads_affine5, AFFINE5, 3, 2)
ROW_HEADS(row_heads_affine6, AFFINE6, 2, 2)
ROW_HEADS(row_heads_affine8, AFFINE8, 1, 3)
ROW_HEADS(row_heads_nvfp4, NVFP4, 8, 1)
ROW_HEADS(row_heads_mxfp4, MXFP4, 8, 1)
ROW_HEADS(row_heads_mxfp8, MXFP8, 1, 3)
ROW_HEADS(row_heads_fp8, FP8, 1, 3)
#endif
#endif
