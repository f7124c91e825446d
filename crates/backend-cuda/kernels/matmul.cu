// Matrix products with quantized weights. Two kernels a format:
//
//   gemv       up to 32 rows: the step of decoding. A warp streams one slice of one row tile; the slices of a row tile are added in
//              order through shared memory. Fused: gate and up with the activation, down with the weighted sum of experts.
//   gemm       more rows: a block keeps 64 rows of activations in shared memory and streams 256 rows of weights past them.
//
// gemv and gemm give the same bits: the same tensor-core instruction on the same fragments in the same order, the same cut
// into slices (a function of the number of columns) and the same order of adding them. So a token's result does not
// depend on how many others share the step.
//
// One piece: both share the fragments and the order of sums, which is what makes their bits agree.
#include "product.cuh"

#define DOWN_SLOTS 256  // flat slots (rows times top-k) of `down`, at most the threads of a block

// out = x W for several weights of one format that share x; grid (blocks of row tiles, matrices).
template <int F, bool FAST, int NT> DEVICE void gemv_linear(const MatmulArgs& a) {
  extern __shared__ __align__(16) u8 ring[];
  __shared__ float red[WARPS][16 * 8 * NT];
  pdl_launch();
  u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  u32 k = 0;
  while (k + 1 < a.num_parts && blockIdx.x >= a.first_block[k + 1]) k++;
  const Part& part = a.part[k];
  const Packed* w[1] = {&part.w};
  u32 S = a.slices, per_block = WARPS / S, slice = warp % S;
  u32 row_tile = (blockIdx.x - a.first_block[k]) * per_block + warp / S, matrix = blockIdx.y;
  u32 row_tiles = (part.w.rows + 15) / 16, tiles = num_tiles(part.w);
  Stream<F, FAST, NT, 1> stream;
  bool active = row_tile < row_tiles;
  u32 first = slice_start(slice, S, tiles), last = active ? slice_start(slice + 1, S, tiles) : 0;
  if (!active) row_tile = 0;
  stream.start(ring);
  stream.aim(w, matrix, row_tile, first, last);
#pragma unroll
  for (int i = 0; i < stream.D - 1; i++) stream.issue();
  pdl_wait();
  Row rows[NT];
#pragma unroll
  for (int nt = 0; nt < NT; nt++) rows[nt] = row_of<F>(a, nt, a.x.rows, matrix, [](u32 n) { return n; });
  float acc[1][NT][4] = {};
  const u8* scale_base[1] = {row_tile_scales(part.w, matrix, row_tile)};
  stream.run(acc, w, scale_base, rows, a.x.rows, first, last, [&] { stream.issue(); });
  put<NT>(red[warp], acc[0], lane);
  __syncthreads();
  for (u32 i = threadIdx.x; i < per_block * 16 * a.x.rows; i += blockDim.x) {
    u32 r = i % 16, tile = i / 16 % per_block, n = i / (16 * per_block);
    u32 row = ((blockIdx.x - a.first_block[k]) * per_block + tile) * 16 + r;
    if (row >= part.w.rows) continue;
    float sum = 0.f;
    for (u32 s = 0; s < S; s++) sum += red[tile * S + s][r * (8 * NT) + n];
    store(part.out, n, matrix * part.w.rows + row, finish<F>(part.w, matrix, row, sum));
  }
}

// The members of expert `ids[flat]`: flat slots with the same id, in order; 0 members unless `flat` is the first.
DEVICE u32 members_of(const Routing& r, u32 flat, u16* list) {
  u32 lane = threadIdx.x % 32, total = r.num_tokens * r.top_k, count = 0;
  auto id = [&](u32 f) { return r.ids[(u64)(f / r.top_k) * r.ids_stride + f % r.top_k]; };
  u32 expert = id(flat);
  for (u32 base = 0; base < total; base += 32) {
    u32 f = base + lane;
    bool same = f < total && id(f) == expert;
    u32 mask = __ballot_sync(0xffffffffu, same);
    if (same) list[count + __popc(mask & ((1u << lane) - 1))] = f;
    count += __popc(mask);
  }
  __syncwarp();
  return list[0] == flat ? count : 0;
}

// h = f(x gate, x up): part 0 is gate, part 1 up; grid (blocks of row tiles, flat slots or 1).
template <int F, bool FAST, int NT> DEVICE void gemv_gate_up(const MatmulArgs& a) {
  extern __shared__ __align__(16) u8 ring[];
  __shared__ float red[WARPS][2][16 * 8 * NT];
  __shared__ u16 list[8 * NT];
  __shared__ u32 num_members;
  pdl_launch();
  u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Packed* w[2] = {&a.part[0].w, &a.part[1].w};
  u32 S = a.slices, per_block = WARPS / S, slice = warp % S;
  u32 row_tile = blockIdx.x * per_block + warp / S;
  u32 row_tiles = (w[0]->rows + 15) / 16, tiles = num_tiles(*w[0]);
  bool active = row_tile < row_tiles;
  u32 first = slice_start(slice, S, tiles), last = active ? slice_start(slice + 1, S, tiles) : 0;
  if (!active) row_tile = 0;
  Stream<F, FAST, NT, 2> stream;
  stream.start(ring);
  u32 expert = 0, count = a.x.rows;
  auto fill = [&] {
    stream.aim(w, expert, row_tile, first, last);
#pragma unroll
    for (int i = 0; i < stream.D - 1; i++) stream.issue();
  };
  if (a.routing.ids) {
    pdl_wait();
    u32 top_k = a.routing.top_k;
    expert = a.routing.ids[(u64)(blockIdx.y / top_k) * a.routing.ids_stride + blockIdx.y % top_k];
    if (a.x.rows == 1) {
      fill();
      if (threadIdx.x == 0) list[0] = blockIdx.y;
      count = 1;
      __syncthreads();
    } else {
      if (warp == 0) {
        u32 n = members_of(a.routing, blockIdx.y, list);
        if (lane == 0) num_members = n;
      }
      __syncthreads();
      count = num_members;
      if (count == 0) return;
      fill();
    }
  } else {
    fill();
    pdl_wait();
  }
  Row rows[NT];
#pragma unroll
  for (int nt = 0; nt < NT; nt++) rows[nt] = row_of<F>(a, nt, count, 0, [&](u32 n) { return a.routing.ids ? (u32)list[n] : n; });
  float acc[2][NT][4] = {};
  const u8* scale_base[2] = {row_tile_scales(*w[0], expert, row_tile), row_tile_scales(*w[1], expert, row_tile)};
  stream.run(acc, w, scale_base, rows, count, first, last, [&] { stream.issue(); });
  put<NT>(red[warp][0], acc[0], lane);
  put<NT>(red[warp][1], acc[1], lane);
  __syncthreads();
  for (u32 i = threadIdx.x; i < per_block * 16 * count; i += blockDim.x) {
    u32 r = i % 16, tile = i / 16 % per_block, n = i / (16 * per_block);
    u32 row = (blockIdx.x * per_block + tile) * 16 + r;
    if (row >= w[0]->rows) continue;
    float gate = 0.f, up = 0.f;
    for (u32 s = 0; s < S; s++) {
      gate += red[tile * S + s][0][r * (8 * NT) + n];
      up += red[tile * S + s][1][r * (8 * NT) + n];
    }
    gate = finish<F>(*w[0], expert, row, gate);
    up = finish<F>(*w[1], expert, row, up);
    u32 flat = a.routing.ids ? list[n] : n;
    u32 token = a.routing.ids ? flat / a.routing.top_k : n, col = a.routing.ids ? flat % a.routing.top_k * w[0]->rows : 0;
    store(a.part[0].out, token, col + row, activate(a.activation, gate, up));
  }
}

// out = plus + sum over a token's experts of weight * (h W): a block has one row tile and every distinct expert.
// Shared memory: the ring, then [slices][flat slots][16] results.
template <int F, bool FAST, int NT> DEVICE void gemv_down(const MatmulArgs& a) {
  extern __shared__ __align__(16) u8 ring[];
  __shared__ u16 lists[WARPS][8 * NT];
  __shared__ u16 ids[DOWN_SLOTS], unique[DOWN_SLOTS];
  __shared__ u32 num_unique;
  typedef Stream<F, FAST, NT, 1> S1;
  float* results = (float*)(ring + WARPS * S1::D * S1::SLOT);
  pdl_launch();
  u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const Packed* w[1] = {&a.part[0].w};
  const Routing& r = a.routing;
  u32 S = a.slices, side = WARPS / S, slice = warp % S, total = r.num_tokens * r.top_k;
  u32 tiles = num_tiles(*w[0]), first = slice_start(slice, S, tiles), last = slice_start(slice + 1, S, tiles);
  if (threadIdx.x == 0) num_unique = 0;
  pdl_wait();
  __syncthreads();
  if (threadIdx.x < total) ids[threadIdx.x] = r.ids[(u64)(threadIdx.x / r.top_k) * r.ids_stride + threadIdx.x % r.top_k];
  __syncthreads();
  if (threadIdx.x < total) {
    bool seen = false;
    if (r.num_tokens > 1) for (u32 f = 0; f < threadIdx.x; f++) seen |= ids[f] == ids[threadIdx.x];
    // In any order: each expert's results have a place of their own.
    if (!seen) unique[atomicAdd(&num_unique, 1)] = threadIdx.x;
  }
  __syncthreads();
  u32 count_unique = num_unique, ahead = warp / S;
  S1 stream;
  stream.start(ring);
  // The ring runs on from one expert to the next.
  auto issue = [&] {
    if (stream.left == 0 && ahead < count_unique) {
      stream.aim(w, ids[unique[ahead]], blockIdx.x, first, last);
      ahead += side;
    }
    stream.issue();
  };
#pragma unroll
  for (int i = 0; i < S1::D - 1; i++) issue();
  for (u32 u = warp / S; u < count_unique; u += side) {
    u32 flat = unique[u], expert = ids[flat], count = 0;
    if (r.num_tokens > 1) {
      __syncwarp();
      for (u32 base = 0; base < total; base += 32) {
        bool same = base + lane < total && ids[base + lane] == expert;
        u32 mask = __ballot_sync(0xffffffffu, same);
        if (same) lists[warp][count + __popc(mask & ((1u << lane) - 1))] = base + lane;
        count += __popc(mask);
      }
      __syncwarp();
    } else {
      count = 1;
      __syncwarp();
      if (lane == 0) lists[warp][0] = flat;
      __syncwarp();
    }
    Row rows[NT];
#pragma unroll
    for (int nt = 0; nt < NT; nt++) rows[nt] = row_of<F>(a, nt, count, 0, [&](u32 n) { return (u32)lists[warp][n]; });
    float acc[1][NT][4] = {};
    const u8* scale_base[1] = {row_tile_scales(*w[0], expert, blockIdx.x)};
    stream.run(acc, w, scale_base, rows, count, first, last, issue);
#pragma unroll
    for (int nt = 0; nt < NT; nt++)
#pragma unroll
      for (int k = 0; k < 4; k++) {
        u32 n = nt * 8 + 2 * t + (k & 1);
        if (n < count) results[(slice * total + lists[warp][n]) * 16 + g + 8 * (k >> 1)] = acc[0][nt][k];
      }
  }
  __syncthreads();
  for (u32 i = threadIdx.x; i < 16 * r.num_tokens; i += blockDim.x) {
    u32 row = blockIdx.x * 16 + i % 16, token = i / 16;
    if (row >= w[0]->rows) continue;
    float sum = a.plus.p ? a.plus.p[(u64)token * a.plus.stride + row] : 0.f;
    for (u32 k = 0; k < r.top_k; k++) {
      u32 flat = token * r.top_k + k;
      float y = 0.f;
      for (u32 s = 0; s < S; s++) y += results[(s * total + flat) * 16 + i % 16];
      sum = fmaf(a.weights.p[(u64)token * a.weights.stride + k], finish<F>(*w[0], ids[flat], row, y), sum);
    }
    store(a.part[0].out, token, row, sum);
  }
}

// ---- more than 32 rows ----

struct SortArgs { Routing routing; u32* offsets; u32* sorted; u32 num_experts, pad; };
// Flat slots by expert. One block; the order within an expert is arbitrary (rows do not see one another).
KERNEL sort_by_expert(const __grid_constant__ SortArgs a) {
  extern __shared__ u32 counts[];
  pdl_launch();
  pdl_wait();
  u32 total = a.routing.num_tokens * a.routing.top_k, n = a.num_experts;
  auto id = [&](u32 f) { return a.routing.ids[(u64)(f / a.routing.top_k) * a.routing.ids_stride + f % a.routing.top_k]; };
  for (u32 e = threadIdx.x; e < n; e += blockDim.x) counts[e] = 0;
  __syncthreads();
  for (u32 f = threadIdx.x; f < total; f += blockDim.x) atomicAdd(&counts[id(f)], 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    u32 at = 0;
    for (u32 e = 0; e < n; e++) { u32 c = counts[e]; a.offsets[e] = at; counts[e] = at; at += c; }
    a.offsets[n] = at;
  }
  __syncthreads();
  for (u32 f = threadIdx.x; f < total; f += blockDim.x) a.sorted[atomicAdd(&counts[id(f)], 1)] = f;
}

// Tokens of a tile, row tiles a warp has, warps.
#define GEMM_TOKENS 64
#define GEMM_R 2
#define GEMM_STAGES 3

DEVICE void cp_async16(u32 to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0));
}

// out[flat] = x[flat] W (raw: neither activation nor weighted sum). Grid: (blocks of 256 rows, experts or heads, tiles of 64 rows of x).
template <int F, bool FAST> DEVICE void gemm(const MatmulArgs& a) {
  constexpr int NT = GEMM_TOKENS / 8, R = GEMM_R;
  constexpr bool BYTES = Is<F>::affine;
  // bfloat16: 8 pieces of 16 bytes a row, digits: 9.
  constexpr u32 PIECES = BYTES ? 9 : 8;
  __shared__ __align__(16) uint4 tile_b[GEMM_STAGES][GEMM_TOKENS * PIECES];
  __shared__ u32 flats[GEMM_TOKENS];
  pdl_launch();
  pdl_wait();
  const Routing& routing = a.routing;
  const Packed& w = a.part[0].w;
  u32 matrix = blockIdx.y, first = blockIdx.z * GEMM_TOKENS, count = a.x.rows;
  if (routing.ids) {
    u32 begin = routing.offsets[matrix];
    count = routing.offsets[matrix + 1] - begin;
    if (first >= count) return;
    if (threadIdx.x < GEMM_TOKENS) flats[threadIdx.x] = first + threadIdx.x < count ? routing.sorted[begin + first + threadIdx.x] : 0xffffffffu;
  } else if (threadIdx.x < GEMM_TOKENS) flats[threadIdx.x] = first + threadIdx.x < count ? first + threadIdx.x : 0xffffffffu;
  __syncthreads();
  u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  u32 row_tiles = (w.rows + 15) / 16, tiles = num_tiles(w), S = a.slices;
  u32 row_tile = (blockIdx.x * WARPS + warp) * R;
  bool halves = w.group == 32;
  // Pieces of the tile of x that this thread copies.
  constexpr u32 MINE = (GEMM_TOKENS * PIECES + 255) / 256;
  const u8* source[MINE];
#pragma unroll
  for (u32 i = 0; i < MINE; i++) {
    u32 piece = threadIdx.x + 256 * i, row = piece / PIECES;
    u32 flat = row < GEMM_TOKENS ? flats[row] : 0xffffffffu;
    source[i] = nullptr;
    if (flat == 0xffffffffu) continue;
    if constexpr (BYTES) {
      u64 at = routing.ids ? (routing.slots_in_x ? flat : flat / routing.top_k) : (u64)flat * a.digits_parts + (a.digits_parts > 1 ? matrix : 0);
      source[i] = a.digits + at * tiles * DIGITS_BYTES + piece % PIECES * 16;
    } else {
      const u16* twin = routing.ids ? a.x.twin + (u64)(flat / routing.top_k) * a.x.stride + (routing.slots_in_x ? flat % routing.top_k * a.x_head_stride : 0)
                                    : a.x.twin + (u64)flat * a.x.stride + matrix * a.x_head_stride;
      source[i] = (const u8*)(twin + piece % PIECES * 8);
    }
  }
  auto copy = [&](u32 q, u32 j) {
    if (j < tiles) {
#pragma unroll
      for (u32 i = 0; i < MINE; i++) {
        u32 piece = threadIdx.x + 256 * i, row = piece / PIECES, column = piece % PIECES;
        if (row >= GEMM_TOKENS) continue;
        // Swizzled (bfloat16) or with an odd number of pieces a row (digits): rows g and g + 1 lie in different banks.
        u32 at = BYTES ? piece : row * 8 + (column ^ (row & 1) * 4);
        bool valid = source[i] && (BYTES || j * 64 + column * 8 < w.cols);
        cp_async16((u32)__cvta_generic_to_shared(&tile_b[q % GEMM_STAGES][at]), valid ? source[i] + (u64)j * (BYTES ? DIGITS_BYTES : 128) : (const u8*)w.codes, valid);
      }
    }
    asm volatile("cp.async.commit_group;");
  };
  float acc[R][NT][4] = {}, total[R][NT][4] = {};
  Codes<F> codes[R];
  Scales<F, FAST> scales[R];
  auto fetch = [&](u32 j) {
    if (j >= tiles) return;
#pragma unroll
    for (int r = 0; r < R; r++) {
      u32 tile = row_tile + r < row_tiles ? row_tile + r : 0;
      codes[r] = load_codes<F>(tile_at(w, matrix, tile, j), lane);
      load_scales<F, FAST>(scales[r], w, scales_for<F, FAST>(w, matrix, tile, j), j, g, t);
    }
  };
#pragma unroll
  for (int s = 0; s < GEMM_STAGES - 1; s++) copy(s, s);
  fetch(0);
  // Slice after slice, as gemv's warps add them.
  u32 slice = 0, end = slice_start(1, S, tiles);
  for (u32 j = 0; j < tiles; j++) {
    asm volatile("cp.async.wait_group %0;" ::"n"(GEMM_STAGES - 2));
    __syncthreads();
    const uint4* tile = tile_b[j % GEMM_STAGES];
    copy(j + GEMM_STAGES - 1, j + GEMM_STAGES - 1);
    Taken<F, FAST> taken[R];
    Scales<F, FAST> used[R];
#pragma unroll
    for (int r = 0; r < R; r++) { take_apart<F, FAST>(taken[r], codes[r], scales[r]); used[r] = scales[r]; }
    fetch(j + 1);
#pragma unroll
    for (int nt = 0; nt < NT; nt++) {
      Columns<BYTES> x;
      u32 row = nt * 8 + g;
      if constexpr (BYTES) {
        x.high = tile[row * 9 + t];
        x.low = tile[row * 9 + 4 + t];
        x.about[0] = *(const float4*)&tile[(nt * 8 + 2 * t) * 9 + 8];
        x.about[1] = *(const float4*)&tile[(nt * 8 + 2 * t + 1) * 9 + 8];
      } else {
        x.b[0] = tile[row * 8 + (t ^ (row & 1) * 4)];
        x.b[1] = tile[row * 8 + ((4 + t) ^ (row & 1) * 4)];
      }
#pragma unroll
      for (int r = 0; r < R; r++) accumulate<F, FAST>(acc[r][nt], taken[r], used[r], x, halves);
    }
    if (j + 1 == end) {
      slice++;
      end = slice_start(slice + 1, S, tiles);
#pragma unroll
      for (int r = 0; r < R; r++)
#pragma unroll
        for (int nt = 0; nt < NT; nt++)
#pragma unroll
          for (int k = 0; k < 4; k++) { total[r][nt][k] += acc[r][nt][k]; acc[r][nt][k] = 0.f; }
    }
  }
#pragma unroll
  for (int r = 0; r < R; r++)
#pragma unroll
    for (int nt = 0; nt < NT; nt++)
#pragma unroll
      for (int k = 0; k < 4; k++) {
        u32 row = (row_tile + r) * 16 + g + 8 * (k >> 1), flat = flats[nt * 8 + 2 * t + (k & 1)];
        if (row >= w.rows || flat == 0xffffffffu) continue;
        float y = finish<F>(w, matrix, row, total[r][nt][k]);
        store(a.part[0].out, flat, routing.ids ? row : matrix * w.rows + row, y);
      }
}

#define KERNELS(NAME, F, FAST) \
  KERNEL __launch_bounds__(256, 3) linear1_##NAME(const __grid_constant__ MatmulArgs a) { gemv_linear<F, FAST, 1>(a); } \
  KERNEL __launch_bounds__(256) linear2_##NAME(const __grid_constant__ MatmulArgs a) { gemv_linear<F, FAST, 2>(a); } \
  KERNEL __launch_bounds__(256) linear4_##NAME(const __grid_constant__ MatmulArgs a) { gemv_linear<F, FAST, 4>(a); } \
  KERNEL __launch_bounds__(256) gate_up1_##NAME(const __grid_constant__ MatmulArgs a) { gemv_gate_up<F, FAST, 1>(a); } \
  KERNEL __launch_bounds__(256) gate_up2_##NAME(const __grid_constant__ MatmulArgs a) { gemv_gate_up<F, FAST, 2>(a); } \
  KERNEL __launch_bounds__(256) gate_up4_##NAME(const __grid_constant__ MatmulArgs a) { gemv_gate_up<F, FAST, 4>(a); } \
  KERNEL __launch_bounds__(256, 3) down1_##NAME(const __grid_constant__ MatmulArgs a) { gemv_down<F, FAST, 1>(a); } \
  KERNEL __launch_bounds__(256) down2_##NAME(const __grid_constant__ MatmulArgs a) { gemv_down<F, FAST, 2>(a); } \
  KERNEL __launch_bounds__(256) down4_##NAME(const __grid_constant__ MatmulArgs a) { gemv_down<F, FAST, 4>(a); } \
  KERNEL __launch_bounds__(256, 1) gemm_##NAME(const __grid_constant__ MatmulArgs a) { gemm<F, FAST>(a); }
#define AFFINE(NAME, F) KERNELS(NAME, F, true) KERNELS(NAME##_any, F, false)
AFFINE(affine2, AFFINE2)
AFFINE(affine3, AFFINE3)
AFFINE(affine4, AFFINE4)
AFFINE(affine5, AFFINE5)
AFFINE(affine6, AFFINE6)
AFFINE(affine8, AFFINE8)
KERNELS(nvfp4, NVFP4, true)
KERNELS(mxfp4, MXFP4, true)
KERNELS(mxfp8, MXFP8, true)
KERNELS(fp8, FP8, true)
