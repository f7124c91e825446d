// One row of latent attention as one kernel: the second product of the queries, rotations, the queries' product with the keys of the heads, the row of
// the cache, attention over the cache, the product with the values of the heads. As kernels of their own (decode.cu, attention.cu) these are four, and each
// of them waits for the one before, starts cold, and reads its row behind other blocks' weights: 28 us a layer of GLM-5.2-77 for 6 us of bytes.
//
// A cluster has H heads and two blocks a head, each with half of the rows of the head's matrices. What one has for others it writes into their shared memory:
// the head's query, its absorbed form, the parts of attention, each behind a barrier of the cluster. Parts go round among the cluster's blocks, for all of its
// heads, which are the columns of one product: a key is read once a cluster.
//
// Weights do not depend on anything: those of the first product are asked for as far as the ring goes, those of the second as a whole, before the kernel before has
// ended; those of the third when the second is done. The row's own key is not in the cache yet: whoever has its part makes it.
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
  u32 slices_q, slices_k, slices_v, pad;
};

#define RANK 512
#define ROPE_COLUMNS 64
#define KEY (RANK + ROPE_COLUMNS)
#define KEY_STRIDE (KEY + 8)   // elements between two keys in shared memory: rows in different banks
#define KEYS 32                // of a part
#define MOST_PARTS 16
#define PART (PART_HEADER + RANK)
#define ROW_WARPS 16
#define MOST_ROWS 256          // of a head's query, and of its values

// SLOTS: of two tiles of two row tiles, of the ring of the first product. KT: parts of a block at a time.
template <int F, int H, int SLOTS, int KT> struct RowHeads {
  typedef Pipe<F, 2, 2, SLOTS> Queries;
  typedef Pipe<F, 1, 4, 1> Others;
  static constexpr u32 BLOCKS = 2 * H;
  static constexpr u32 KEY_BYTES = KEYS * KEY_STRIDE * 2;
  // Over the first product's ring: keys and parts.
  static constexpr u32 RINGS = ROW_WARPS * Queries::RING, LATER = KT * KEY_BYTES + MOST_PARTS * PART * 4;
  static constexpr u32 PARTS = KT * KEY_BYTES;
  static constexpr u32 OTHERS = ((RINGS > LATER ? RINGS : LATER) + 127) / 128 * 128;
  static constexpr u32 ROW = OTHERS + ROW_WARPS * Others::RING;       // in the form of F
  static constexpr u32 QUERY = ROW + 32 * Form<F>::tile;              // bfloat16: [head][high, low][KEY_STRIDE]
  static constexpr u32 SCORES = QUERY + BLOCKS * KEY_STRIDE * 2;      // [part][halves of the columns][head][KEYS + 1]
  static constexpr u32 WEIGHTS = SCORES + KT * 2 * H * (KEYS + 1) * 4 + (KT * 2 * H * 4) % 16;  // bfloat16: [part][high, low][head][KEYS + 8]
  static constexpr u32 RED = WEIGHTS + KT * 2 * H * (KEYS + 8) * 2;   // [warp][2][16]
  static constexpr u32 HEAD = RED + ROW_WARPS * 2 * 16 * 4;           // [MOST_ROWS]: the head's query
  static constexpr u32 OWN = HEAD + MOST_ROWS * 4;                    // bfloat16: [KEY]
  static constexpr u32 SLOT_OF = OWN + KEY * 2;                       // [parts of a block][KEYS]
  static constexpr u32 SCRATCH = SLOT_OF + (MOST_PARTS + BLOCKS - 1) / BLOCKS * KEYS * 4;
  static constexpr u32 BYTES = SCRATCH + ROW_WARPS * 4;
};

#if __CUDA_ARCH__ >= 900

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
DEVICE void send(u32 to, float x) { asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(to), "f"(x) : "memory"); }
DEVICE void send(u32 to, u32 x) { asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(to), "r"(x) : "memory"); }

// Columns c .. c + 8 of the joined parts of a head, as `join8` of attend.cuh.
DEVICE void join_parts(const float* parts, u32 splits, u32 c, float out[8]) {
  float m = -INFINITY, l = 0.f;
  for (u32 s = 0; s < splits; s++) m = fmaxf(m, parts[s * PART]);
#pragma unroll
  for (int k = 0; k < 8; k++) out[k] = 0.f;
#pragma unroll 2
  for (u32 s = 0; s < splits; s++) {
    const float* part = parts + s * PART;
    float v[8], weight = power_of_two(part[0] - m);
    load8(v, part + PART_HEADER, c, RANK, true);
    l = fmaf(part[1], weight, l);
#pragma unroll
    for (int k = 0; k < 8; k++) out[k] = fmaf(v[k], weight, out[k]);
  }
#pragma unroll
  for (int k = 0; k < 8; k++) out[k] /= l;
}

// Eight columns in the form of F; all lanes of a warp take part.
template <int F> DEVICE void put_form(const float v[8], u8* row, u32 c, bool inside) {
  if constexpr (Is<F>::affine) digits8(v, inside ? row + c / 64 * DIGITS_BYTES : nullptr);
  else if (inside) *(uint4*)(row + c * 2) = pack8(v);
}

// Rows 16 tile + .. of a product whose slices lie in `red`, a unit of R row tiles each.
template <int R> DEVICE float sum_units(const float* red, u32 slices, u32 row) {
  float sum = 0.f;
  for (u32 s = 0; s < slices; s++) sum += red[(row / (16 * R) * slices + s) * 32 + row % (16 * R)];
  return sum;
}

// Attention of the block's parts from `first` on, `count` of them, for the cluster's heads; what comes of it goes to the blocks of each head.
// KT parts are in shared memory. By all warps.
template <typename L, int H> DEVICE void attend_own_parts(const AttendArgs& a, u8* shared, u32 rank, u32 first, u32 count, u32 keys) {
  u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  float* scores = (float*)(shared + L::SCORES);
  u16* weights = (u16*)(shared + L::WEIGHTS);
  u32 keys_at = shared_address(shared), query_at = shared_address(shared + L::QUERY), weights_at = shared_address(weights);
  constexpr u32 S = KEYS + 1, P = KEYS + 8;
  // Scores of 16 keys, half of the columns: the columns of a product are the heads' high and low parts.
  for (u32 job = warp; job < count * 4; job += ROW_WARPS) {
    u32 part = job / 4, rows = job / 2 % 2 * 16, half = job % 2;
    u32 a_at = keys_at + part * L::KEY_BYTES + ((rows + lane % 16) * KEY_STRIDE + half * (KEY / 2) + lane / 16 * 8) * 2;
    u32 b_at = query_at + (lane % 8 % (2 * H) * KEY_STRIDE + half * (KEY / 2) + lane / 8 % 2 * 8) * 2;
    float sum[4] = {};
#pragma unroll 3
    for (u32 s = 0; s < KEY / 32; s++) {
      u32 x[4], b[2];
      ldmatrix4(x, a_at + s * 32);
      ldmatrix2(b, b_at + s * 32);
      mma_bf16(sum, x, b[0], b[1]);
    }
    if (t < H) {
      float* to = scores + ((part * 2 + half) * H + t) * S + rows + g;
      to[0] = sum[0] + sum[1];
      to[8] = sum[2] + sum[3];
    }
  }
  __syncthreads();
  float scale = a.scale * LOG2_E;
  for (u32 job = warp; job < count * H; job += ROW_WARPS) {
    u32 part = job / H, h = job % H, number = rank + (first + part) * L::BLOCKS;
    float s = scores[(part * 2 * H + h) * S + lane] + scores[((part * 2 + 1) * H + h) * S + lane];
    s = number * KEYS + lane < keys ? s : -INFINITY;
    float from = ceilf(warp_max(s) * scale), p = exp2_of(fmaf(s, scale, -from)), sum = warp_sum(p);
    split_bf16(p, weights[(part * 2 * H + h) * P + lane], weights[((part * 2 + 1) * H + h) * P + lane]);
    if (lane < 4) {
      u32 to = cluster_address(shared_address(shared + L::PARTS) + (number * PART + lane % 2) * 4, 2 * h + lane / 2);
      send(to, lane % 2 ? sum : from);
    }
  }
  __syncthreads();
  // Values: 16 columns of a part, transposed; the columns of a product are heads.
  for (u32 job = warp; job < count * (RANK / 16); job += ROW_WARPS) {
    u32 part = job / (RANK / 16), column = job % (RANK / 16) * 16, number = rank + (first + part) * L::BLOCKS;
    u32 a_at = keys_at + part * L::KEY_BYTES + ((lane / 16 * 8 + lane % 8) * KEY_STRIDE + column + lane / 8 % 2 * 8) * 2;
    u32 b_at = weights_at + ((part * 2 * H + lane % 8 % H) * P + lane / 8 % 2 * 8) * 2;
    float acc[4] = {};
#pragma unroll
    for (u32 s = 0; s < 2; s++) {
      u32 v[4], high[2], low[2];
      ldmatrix4_transposed(v, a_at + s * 16 * KEY_STRIDE * 2);
      ldmatrix2(high, b_at + s * 32);
      ldmatrix2(low, b_at + (H * P + s * 16) * 2);
      mma_bf16(acc, v, high[0], high[1]);
      mma_bf16(acc, v, low[0], low[1]);
    }
    u32 at = shared_address(shared + L::PARTS) + (number * PART + PART_HEADER + column + g) * 4;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      u32 h = 2 * t + i;
      if (h >= H) continue;
#pragma unroll
      for (u32 half = 0; half < 2; half++) {
        u32 to = cluster_address(at, 2 * h + half);
        send(to, acc[i]);
        send(to + 32, acc[2 + i]);
      }
    }
  }
}

#ifdef STAGES
__device__ u32 stage_clock[128 * 16];
#define STAGE(I) if (threadIdx.x == 0) { u32 now_; asm volatile("mov.u32 %0, %%globaltimer_lo;" : "=r"(now_)); stage_clock[blockIdx.x * 16 + I] = now_; }
#else
#define STAGE(I)
#endif

// Grid: two blocks a head, in clusters of 2 H; 512 threads.
template <int F, int H, int SLOTS, int KT> DEVICE void row_heads(const RowHeadsArgs& a) {
  extern __shared__ __align__(128) u8 shared[];
  typedef RowHeads<F, H, SLOTS, KT> L;
  float* red = (float*)(shared + L::RED);
  float* query = (float*)(shared + L::HEAD);
  float* scratch = (float*)(shared + L::SCRATCH);
  u16* own = (u16*)(shared + L::OWN);
  u32* slot_of = (u32*)(shared + L::SLOT_OF);
  u8* row = shared + L::ROW;
  const Latent& l = a.latent;
  STAGE(0)
  pdl_launch();
  u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, rank = blockIdx.x % L::BLOCKS, h = rank / 2, half = rank % 2;
  u32 head = blockIdx.x / 2, first_head_block = rank & ~1u;
  // A warp has at most one unit of each product.
  u32 q_rows = a.w_q.rows / a.attend.num_heads, v_rows = a.w_v.rows;
  u32 q_slice = warp % a.slices_q, q_unit = warp / a.slices_q, q_tiles = num_tiles(a.w_q), q_first = slice_start(q_slice, a.slices_q, q_tiles);
  u32 k_slice = warp % a.slices_k, k_unit = warp / a.slices_k, k_tiles = num_tiles(a.w_k), k_first = slice_start(k_slice, a.slices_k, k_tiles);
  u32 v_slice = warp % a.slices_v, v_unit = warp / a.slices_v, v_tiles = num_tiles(a.w_v), v_first = slice_start(v_slice, a.slices_v, v_tiles);
  u32 q_count = q_unit < q_rows / 64 ? slice_start(q_slice + 1, a.slices_q, q_tiles) - q_first : 0;
  u32 k_count = k_unit < RANK / 32 ? slice_start(k_slice + 1, a.slices_k, k_tiles) - k_first : 0;
  u32 v_count = v_unit < v_rows / 32 ? slice_start(v_slice + 1, a.slices_v, v_tiles) - v_first : 0;
  typename L::Queries queries;
  typename L::Others others;
  queries.start(shared);
  others.start(shared + L::OTHERS);
  if (q_count) queries.aim(a.w_q, 0, head * (q_rows / 16) + half * (q_rows / 32) + q_unit * 2, q_first, q_count);
#pragma unroll
  for (int i = 0; i < SLOTS; i++) queries.issue();
  if (k_count) others.aim(a.w_k, head, half * (RANK / 32) + k_unit, k_first, k_count);
  auto issue_others = [&] {
    if (others.left == 0 && v_count) {
      others.aim(a.w_v, head, half * (v_rows / 32) + v_unit, v_first, v_count);
      v_count = 0;
    }
    others.issue();
  };
  u32 v_tiles_mine = v_count;
  issue_others();
  // What the host wrote, and weights of norms, do not wait for the operation before either.
  u32 keys = a.attend.paging.positions[0] + 1, parts = (keys + KEYS - 1) / KEYS;
  u32 mine = rank < parts ? (parts - rank - 1) / L::BLOCKS + 1 : 0;
  bool makes_key = (parts - 1) % L::BLOCKS == rank;
  const u32* table = a.attend.paging.block_table + (u64)a.attend.paging.sequences[0] * a.attend.paging.max_blocks;
  for (u32 i = threadIdx.x; i < mine * KEYS; i += blockDim.x) {
    u32 p = (rank + i / KEYS * L::BLOCKS) * KEYS + i % KEYS;
    u32 slot = p < keys ? table[p / a.attend.paging.block_size] * a.attend.paging.block_size + p % a.attend.paging.block_size : 0;
    slot_of[i] = slot;
    const u8* from = (const u8*)a.attend.cache + (u64)slot * a.attend.cache_width * 2;
    if (p + 1 < keys)
#pragma unroll
      for (u32 b = 0; b < KEY * 2; b += 128) asm volatile("prefetch.global.L2 [%0];" ::"l"(from + b));
  }
  bool latent_half = threadIdx.x >= 256;  // threads that have the row's own key
  u32 c = threadIdx.x % 256 * 8, cols = latent_half ? RANK : a.w_q.cols;
  float v[8], weight[8];
  load8(weight, latent_half ? l.weight : a.in.weight, c, cols, true);
  cluster_arrive();
  STAGE(1)
  pdl_wait();
  STAGE(2)

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
  u16* slot = (u16*)l.cache + (u64)l.slots[0] * l.cache_width;
  bool stores = blockIdx.x < L::BLOCKS && makes_key;
  if (!latent_half) {
    put_form<F>(v, row, c, c < q_tiles * 64);
    if (blockIdx.x == 0) {
      if (a.in.out_digits) digits8(v, c < q_tiles * 64 ? a.in.out_digits + c / 64 * DIGITS_BYTES : nullptr);
      if (c < cols && a.in.out.p) store8(a.in.out.p, v, c, cols, true);
      if (c < cols && a.in.out.twin) *(uint4*)(a.in.out.twin + c) = pack8(v);
    }
  } else if (makes_key) {
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
  cluster_wait();  // all blocks are here: their shared memory may be written
  __syncthreads();
  STAGE(3)

  {
    float acc[L::Queries::SUMS] = {};
    queries.unit(acc, row, q_first, q_count, a.w_q.cols, [&] { queries.issue(); });
    queries.put_sums(red + warp * 32, acc);
    queries.stop();
  }
  __syncthreads();
  STAGE(4)
  // The rings of the first product are read: keys go there.
  auto copy_keys = [&](u32 first, u32 count) {
    for (u32 i = threadIdx.x; i < count * KEYS * (KEY / 8); i += blockDim.x) {
      u32 k = i / (KEY / 8), piece = i % (KEY / 8), p = (rank + (first + k / KEYS) * L::BLOCKS) * KEYS + k % KEYS;
      u8* to = shared + k / KEYS * L::KEY_BYTES + (k % KEYS * KEY_STRIDE + piece * 8) * 2;
      if (p + 1 == keys) { *(uint4*)to = *(const uint4*)(own + piece * 8); continue; }
      // Past the end are zeros: their weight is zero, and zero times what lies there may be no number.
      bool valid = p < keys;
      const u16* from = (const u16*)a.attend.cache + (u64)slot_of[first * KEYS + k] * a.attend.cache_width + piece * 8;
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(valid ? from : (const u16*)a.attend.cache), "r"(valid ? 16 : 0));
    }
  };
  u32 batch = mine < KT ? mine : KT;
  copy_keys(0, batch);
  if (threadIdx.x < q_rows / 2) {
    u32 r = half * (q_rows / 2) + threadIdx.x;
    float y = finish<F>(a.w_q, 0, head * q_rows + r, sum_units<2>(red, a.slices_q, threadIdx.x));
    query[r] = y;
    send(cluster_address(shared_address(query + r), first_head_block + 1 - half), y);
  }
  cluster_sync();
  STAGE(5)

  u32 nope = a.w_k.cols;
  if (warp == 0) {
    load8(v, query, lane * 8, nope, true);
    put_form<F>(v, row, lane * 8, lane * 8 < k_tiles * 64);
  } else if (warp == 15 && half == 1) {
    // The rotated part of the query goes to all blocks of the cluster.
    float2 y = rotated(query[nope + c0], query[nope + c1], cosine, sine);
    __syncwarp();
    query[nope + c0] = y.x;
    query[nope + c1] = y.y;
    __syncwarp();
  }
  __syncthreads();
  {
    float acc[L::Others::SUMS] = {};
    others.unit(acc, row, k_first, k_count, nope, issue_others);
    others.put_sums(red + warp * 32, acc);
  }
  __syncthreads();
  STAGE(6)
  {
    auto give = [&](float lo, float hi, u32 column, u32 to) {
      u32 high = pack_bf16(lo, hi), low = pack_bf16(lo - __uint_as_float(high << 16), hi - __uint_as_float(high & 0xffff0000u));
      u32 at = cluster_address(shared_address(shared + L::QUERY) + (2 * h * KEY_STRIDE + column) * 2, to);
      send(at, high);
      send(at + KEY_STRIDE * 2, low);
    };
    u32 i = threadIdx.x % (RANK / 4) * 2, r = half * (RANK / 2) + i;
    float y0 = finish<F>(a.w_k, head, r, sum_units<1>(red, a.slices_k, i)), y1 = finish<F>(a.w_k, head, r + 1, sum_units<1>(red, a.slices_k, i + 1));
    for (u32 to = threadIdx.x / (RANK / 4); to < L::BLOCKS; to += 512 / (RANK / 4)) give(y0, y1, r, to);
    if (half == 1 && warp < L::BLOCKS) give(query[nope + 2 * lane], query[nope + 2 * lane + 1], RANK + 2 * lane, warp);
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
  cluster_sync();
  STAGE(7)

  for (u32 first = 0; first < mine; first += KT) {
    batch = mine - first < KT ? mine - first : KT;
    if (first) {
      __syncthreads();
      copy_keys(first, batch);
      asm volatile("cp.async.wait_all;" ::: "memory");
      __syncthreads();
    }
    attend_own_parts<L, H>(a.attend, shared, rank, first, batch, keys);
  }
  STAGE(8)
  cluster_sync();
  STAGE(9)

  if (warp < RANK / 256) {
    join_parts((const float*)(shared + L::PARTS), parts, threadIdx.x * 8, v);
    put_form<F>(v, row, threadIdx.x * 8, true);
  }
  __syncthreads();
  {
    float acc[L::Others::SUMS] = {};
    others.unit(acc, row, v_first, v_tiles_mine, RANK, [&] { others.issue(); });
    others.put_sums(red + warp * 32, acc);
  }
  __syncthreads();
  if (threadIdx.x < v_rows / 2) {
    u32 r = half * (v_rows / 2) + threadIdx.x;
    float y = finish<F>(a.w_v, head, r, sum_units<1>(red, a.slices_v, threadIdx.x));
    store(a.out, 0, head * v_rows + r, y);
    query[threadIdx.x] = y;
  }
  STAGE(10)
  if (!a.out_digits) return;
  __syncthreads();
  if (warp == 0) {
    bool inside = lane * 8 < v_rows / 2;
    load8(v, query, lane * 8, v_rows / 2, true);
    digits8(v, inside ? a.out_digits + (head * v_rows + half * (v_rows / 2) + lane * 8) / 64 * DIGITS_BYTES : nullptr);
  }
  STAGE(11)
}

#ifndef NO_KERNELS
// Registers for 896 threads, though 512 are launched: so the blocks of the kernel before, which are still there, leave room for one of these and no more.
#define ROW_HEADS(NAME, F, H, SLOTS, KT) \
  KERNEL __cluster_dims__(2 * H, 1, 1) __launch_bounds__(896, 1) NAME(const __grid_constant__ RowHeadsArgs a) { row_heads<F, H, SLOTS, KT>(a); }
#ifdef ROW_HEADS_VARIANTS
ROW_HEADS(row_heads4_2_1_affine4, AFFINE4, 4, 2, 1)
ROW_HEADS(row_heads4_4_1_affine4, AFFINE4, 4, 4, 1)
ROW_HEADS(row_heads2_2_1_affine4, AFFINE4, 2, 2, 1)
ROW_HEADS(row_heads2_4_2_affine4, AFFINE4, 2, 4, 2)
ROW_HEADS(row_heads1_4_3_affine4, AFFINE4, 1, 4, 3)
#else
ROW_HEADS(row_heads_affine2, AFFINE2, 4, 2, 1)
ROW_HEADS(row_heads_affine3, AFFINE3, 4, 2, 1)
ROW_HEADS(row_heads_affine4, AFFINE4, 4, 2, 1)
ROW_HEADS(row_heads_affine5, AFFINE5, 4, 2, 1)
ROW_HEADS(row_heads_affine6, AFFINE6, 4, 2, 1)
ROW_HEADS(row_heads_affine8, AFFINE8, 4, 2, 1)
ROW_HEADS(row_heads_nvfp4, NVFP4, 4, 2, 1)
ROW_HEADS(row_heads_mxfp4, MXFP4, 4, 2, 1)
ROW_HEADS(row_heads_mxfp8, MXFP8, 4, 2, 1)
ROW_HEADS(row_heads_fp8, FP8, 4, 2, 1)
#endif
#endif
#endif
