// Two to 32 rows of activations: the step of several sequences, or of one whose drafts are verified. Bound by reading weights, then by instructions:
//
// - Weights are streamed once past all rows that want them, through the rings of pipe.cuh, by grids as large as what is resident.
//   A block has a range of neighbouring row tiles, so that it goes from one expert to the next rarely.
// - The choice of experts is sorted once, by the kernel that makes it (`route_plan`), into groups of up to eight rows of one expert.
//   Finding an expert's rows was done by every block of every row tile before, which took longer than the product itself.
// - High and low digits of four rows are the eight columns of one tensor-core product: half of the instructions of two products with
//   eight rows each, where an expert seldom has more than four rows. A lane has one row of activations and two of weights.
//
// Results are those of the kernels in matmul.cu bit for bit: the same sums in the same order.
#include "pipe.cuh"
#include "route.cuh"
#include "row.cuh"

#define GROUP 8         // rows that share a pass over an expert's weights
#define MAX_CHOICES 256  // rows times top-k
#define MAX_EXPERTS 512
#define UP_TILES 3      // neighbouring tiles of a slot of `few_up`, of twelve in all: with two or four it is slower

// Rows of activations that are multiplied at a time, and sums that a lane has of them.
template <int F> struct Lot {
  static constexpr int rows = Is<F>::affine ? 4 : 8;
  static constexpr int sums = Is<F>::affine ? 2 : 4;
  static constexpr int in_group = GROUP / rows;
};

// Where a lane reads its part of a lot, in bytes from the first row: its digits, or its bfloat16; and what is known about the row that its
// sums belong to.
struct Source { u32 x, about; };
// `at(n)`: where row n starts, for n < count. Rows past the end are copies of the first, whose sums nobody reads.
template <int F, typename At> DEVICE Source source_of(u32 lot, u32 count, At at) {
  u32 lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, first = lot * Lot<F>::rows;
  auto row = [&](u32 n) { return (u32)at(n < count ? n : 0); };
  if constexpr (Is<F>::affine) return {row(first + g / 2) + 16 * t + (g & 1) * 64, row(first + t) + 128};
  else return {row(first + g) + 16 * t, 0};
}

// A lane's part of 64 columns of a lot.
template <bool BYTES> struct Loaded { Columns<false> columns; };
template <> struct Loaded<true> { uint4 x; float scale, sum; };
template <int F> DEVICE void load_rows(Loaded<Is<F>::affine>& to, const u8* x, const u8* about, u32 column, u32 cols) {
  if constexpr (Is<F>::affine) {
    to.x = *(const uint4*)x;
    float4 v = *(const float4*)about;  // One load: each touches four lines.
    to.scale = v.x;
    to.sum = v.w;
  } else {
    u32 t = threadIdx.x % 4;
    to.columns.b[0] = to.columns.b[1] = make_uint4(0, 0, 0, 0);
    if (column + 8 * t < cols) to.columns.b[0] = *(const uint4*)x;
    if (column + 32 + 8 * t < cols) to.columns.b[1] = *(const uint4*)(x + 64);
  }
}

// A tile taken apart, and its product with a lot.
template <int F> struct Apart { Taken<F, true> taken; Scales<F, true> scales; };
template <int F> DEVICE void multiply(float acc[Lot<F>::sums], const Apart<F>& w, const Loaded<Is<F>::affine>& x) {
  if constexpr (Is<F>::affine) {
    const int bias[4] = {BIAS_BITS, BIAS_BITS, BIAS_BITS, BIAS_BITS};
    int c[4], d[4];
    const u32* o = w.taken.o;
    const u32 a0[4] = {o[0], o[4], o[1], o[5]}, a1[4] = {o[2], o[6], o[3], o[7]};
    mma_bytes_biased(c, a0, x.x.x, x.x.y, bias);
    mma_bytes_biased(d, a1, x.x.z, x.x.w, c);
#pragma unroll
    for (int k = 0; k < 2; k++) {
      float y = fmaf(__int_as_float(d[2 * k]) - BIAS, 128.f, __int_as_float(d[2 * k + 1]) - BIAS);
      acc[k] = fmaf(w.taken.b[0][k], x.sum, fmaf(w.taken.s[0][k] * x.scale, y, acc[k]));
    }
  } else accumulate<F, true>(acc, w.taken, w.scales, x.columns, false);
}

// Rows that are read where they lie: any rows, through the first-level cache.
template <int F, int Q> struct FromMemory {
  static constexpr bool EARLY = true;  // may be read before the ring has the weights
  const u8* rows;
  const Source* source;
  u32 column, cols;
  METHOD void load(Loaded<Is<F>::affine>& to, int q, u32 i) const {
    constexpr u32 STEP = Form<F>::tile;
    load_rows<F>(to, rows + source[q].x + i * STEP, rows + source[q].about + i * STEP, column + i * 64, cols);
  }
  METHOD void slot(u32) {}
  METHOD void advance(u32 tiles) { rows += tiles * Form<F>::tile; column += tiles * 64; }
};

// Rows that are all wanted, on their way through a ring of their own beside that of the weights, a bulk copy a row: in memory each row's digits lie
// in other lines, and looking at those took as long as reading the weights.
template <int F, int Q, typename P> struct FromRing {
  static constexpr bool EARLY = false;
  static constexpr u32 STEP = Form<F>::tile, ROWS = Q * Lot<F>::rows, ROW = P::C * STEP, SLOT = ROWS * ROW, RING = P::D * SLOT;
  u32 ring, from, about, at;  // of this warp; this lane's part of a slot; the slot
  METHOD void start(u8* shared) {
    u32 lane = threadIdx.x & 31, g = lane / 4, t = lane % 4;
    ring = (u32)__cvta_generic_to_shared(shared) + threadIdx.x / 32 * RING;
    from = Is<F>::affine ? g / 2 * ROW + 16 * t + (g & 1) * 64 : g * ROW + 16 * t;
    about = t * ROW + 128;
  }
  METHOD void slot(u32 take) { at = ring + take * SLOT; }
  METHOD void load(Loaded<Is<F>::affine>& to, int q, u32 i) const {
    u32 p = at + q * (Lot<F>::rows * ROW) + i * STEP;
    if constexpr (Is<F>::affine) {
      to.x = shared_load<uint4>(p + from);
      uint4 v = shared_load<uint4>(p + about);
      to.scale = __uint_as_float(v.x);
      to.sum = __uint_as_float(v.w);
    } else {
      to.columns.b[0] = shared_load<uint4>(p + from);
      to.columns.b[1] = shared_load<uint4>(p + from + 64);
    }
  }
  METHOD void advance(u32) {}
  // Starts copying tiles `first` to `first + n` of `count` rows, `bytes` apart, into slot `put`, which ends with the barrier's phase.
  METHOD void issue(const u8* rows, u64 bytes, u32 count, u32 first, u32 n, u32 put, u32 bar) {
    u32 lane = threadIdx.x & 31;
    const u8* source = rows + lane * bytes + first * STEP;
    u32 to = ring + put * SLOT + lane * ROW;
    if (lane >= count) return;
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(source), "r"(n * STEP), "r"(bar) : "memory");
#else
    for (u32 b = 0; b < n * STEP; b += 16) copy_async<16>(to + b, source + b);
#endif
  }
};

// Multiplies `count` tiles, which have been issued in this order, with Q lots of rows; `refill` keeps the ring full.
template <int F, int R, int Q, typename P, typename X, typename Refill>
DEVICE void pass(P& pipe, float acc[R][Q][Lot<F>::sums], X x, u32 count, Refill refill) {
  // With few lots those of the next tile are on their way while one tile is multiplied; with many the lots are.
  constexpr bool AHEAD = X::EARLY && Q <= 2;
  typedef Loaded<Is<F>::affine> L;
  auto take = [&](Apart<F>& w, u32 at, int r) {
    Codes<F> codes;
    pipe.read(codes, w.scales, at + r * (P::C * P::TILE));
    take_apart<F, true>(w.taken, codes, w.scales);
  };
  // A tile of each matrix, whose columns are in `loaded`.
  auto multiply_loaded = [&](u32 at, const L loaded[Q]) {
#pragma unroll
    for (int r = 0; r < R; r++) {
      Apart<F> w;
      take(w, at, r);
#pragma unroll
      for (int q = 0; q < Q; q++) multiply<F>(acc[r][q], w, loaded[q]);
    }
  };
  // The same, lot after lot.
  auto multiply_loading = [&](u32 at, u32 i) {
    Apart<F> w[R];
#pragma unroll
    for (int r = 0; r < R; r++) take(w[r], at, r);
#pragma unroll
    for (int q = 0; q < Q; q++) {
      L loaded;
      x.load(loaded, q, i);
#pragma unroll
      for (int r = 0; r < R; r++) multiply<F>(acc[r][q], w[r], loaded);
    }
  };
  for (u32 j = 0; j < count; j += P::C) {
    L loaded[2][AHEAD ? Q : 1];
    if constexpr (AHEAD)
#pragma unroll
      for (int q = 0; q < Q; q++) x.load(loaded[0][q], q, 0);
    pipe.wait();
    x.slot(pipe.take);
    u32 slot = pipe.ring + pipe.take * P::SLOT;
    pipe.take = pipe.take + 1 == P::D ? 0 : pipe.take + 1;
    if (count - j >= P::C) {
#pragma unroll
      for (int i = 0; i < P::C; i++) {
        if constexpr (AHEAD) {
          if (i + 1 < P::C)
#pragma unroll
            for (int q = 0; q < Q; q++) x.load(loaded[(i + 1) % 2][q], q, i + 1);
          multiply_loaded(slot + i * P::TILE, loaded[i % 2]);
        } else multiply_loading(slot + i * P::TILE, i);
      }
    } else {
      for (u32 i = 0; i < count - j; i++) {
        if constexpr (AHEAD) {
          if (i)
#pragma unroll
            for (int q = 0; q < Q; q++) x.load(loaded[0][q], q, i);
          multiply_loaded(slot + i * P::TILE, loaded[0]);
        } else multiply_loading(slot + i * P::TILE, i);
      }
    }
    x.advance(P::C);
    __syncwarp();
    refill();
  }
}

// Calls f(row of the tile, row of activations, q, k) for the sums [q][k] of this lane.
template <int F, int Q, typename Each> DEVICE void each_sum(Each f) {
  u32 lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int q = 0; q < Q; q++)
#pragma unroll
    for (int k = 0; k < Lot<F>::sums; k++) {
      if constexpr (Is<F>::affine) f(g + 8 * k, q * 4 + t, q, k);
      else f(g + 8 * (k >> 1), q * 8 + 2 * t + (k & 1), q, k);
    }
}

template <int N> struct Count { static constexpr int n = N; };

// Points the ring at tiles `first` to `first + count` of R row tiles.
template <int R, typename P> DEVICE void aim_at(P& pipe, const Packed* const w[R], u32 matrix, const u32 row_tile[R], u32 first, u32 count) {
  pipe.left = count;
#pragma unroll
  for (int r = 0; r < R; r++)
    pipe.code[r] = (const u8*)(w[r]->codes + matrix * w[r]->codes_stride) + (row_tile[r] * num_tiles(*w[r]) + first) * (u64)pipe.TILE;
}

// ---- the choice of experts, sorted ----

// What the products with experts read: groups of up to eight rows of one expert.
struct Plan {
  u32 num_groups, pad[3];
  u32 groups[MAX_CHOICES];   // expert, first of its choices << 16, choices << 28 less one
  u16 choices[MAX_CHOICES];  // row * top_k + k, group by group
};
DEVICE u32 group_expert(u32 group) { return group & 0xffff; }
DEVICE u32 group_first(u32 group) { return group >> 16 & 0xfff; }
DEVICE u32 group_count(u32 group) { return (group >> 28) + 1; }

struct PlanArgs { RouteArgs route; Plan* plan; u32 rows, warp_floats; };
// One block; a warp chooses for a row at a time. The order of an expert's rows is arbitrary: rows do not see one another.
KERNEL __launch_bounds__(1024) route_plan(const __grid_constant__ PlanArgs a) {
  extern __shared__ float plan_shared[];
  __shared__ u32 counts[MAX_EXPERTS], starts[MAX_EXPERTS];
  __shared__ u16 ids[MAX_CHOICES], ranks[MAX_CHOICES];
  pdl_launch();
  u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, n = a.route.logits.cols, top_k = a.route.top_k, total = a.rows * top_k;
  for (u32 e = threadIdx.x; e < n; e += blockDim.x) counts[e] = 0;
  pdl_wait();
  for (u32 row = warp; row < a.rows; row += blockDim.x / 32) {
    u32 id;
    float weight;
    route_row(a.route, row, plan_shared + warp * a.warp_floats, id, weight);
    if (lane < top_k) {
      ids[row * top_k + lane] = id;
      a.route.ids[(u64)row * a.route.ids_stride + lane] = id;
      a.route.weights.p[(u64)row * a.route.weights.stride + lane] = weight;
    }
    __syncwarp();
  }
  __syncthreads();
  for (u32 f = threadIdx.x; f < total; f += blockDim.x) ranks[f] = atomicAdd(&counts[ids[f]], 1);
  __syncthreads();
  if (warp == 0) {
    // A lane has neighbouring experts: how many choices and groups stand before them.
    u32 share = (n + 31) / 32, first = lane * share, choices = 0, groups = 0;
    for (u32 e = first; e < first + share && e < n; e++) { choices += counts[e]; groups += (counts[e] + GROUP - 1) / GROUP; }
    u32 choice = choices, group = groups;
#pragma unroll
    for (int d = 1; d < 32; d <<= 1) {
      u32 c = __shfl_up_sync(0xffffffffu, choice, d), g = __shfl_up_sync(0xffffffffu, group, d);
      if (lane >= d) { choice += c; group += g; }
    }
    if (lane == 31) a.plan->num_groups = group;
    choice -= choices;
    group -= groups;
    for (u32 e = first; e < first + share && e < n; e++) {
      starts[e] = choice;
      for (u32 done = 0; done < counts[e]; done += GROUP) {
        u32 count = counts[e] - done < GROUP ? counts[e] - done : GROUP;
        a.plan->groups[group++] = e | (choice + done) << 16 | (count - 1) << 28;
      }
      choice += counts[e];
    }
  }
  __syncthreads();
  for (u32 f = threadIdx.x; f < total; f += blockDim.x) a.plan->choices[starts[ids[f]] + ranks[f]] = f;
}

// ---- latent attention's input ----

// Grid (one block for the norm and some for the rotations, rows).
KERNEL __launch_bounds__(256) latent_rows(const __grid_constant__ Latent a) {
  __shared__ float scratch[32];
  pdl_launch();
  pdl_wait();
  latent_row(a, blockIdx.y, scratch);
}

// ---- gate and up ----

// h = f(x gate, x up) for one group of matrices. `x` in the form that the format wants, rows `x_bytes` apart; digits of h, or null.
struct FewPair { Packed gate, up; Mat out; const u8* x; u64 x_bytes; u8* digits; u32* arrived; };
struct FewUpArgs {
  FewPair routed, shared;  // shared: all rows, another format, or none (shared_blocks 0)
  const Plan* plan;        // null: nothing is routed
  u32 shared_blocks;       // the first blocks of the grid
  u32 slices, rows, top_k;
  Activation activation;
};
// A warp has row tiles of both matrices for a group's rows, slice after slice: waiting for other warps at each row tile took longer than
// what is saved by shorter units.
template <int F, bool ROUTED> DEVICE void few_up(const FewUpArgs& a, const FewPair& pair, u32 block, u32 blocks, u8* shared) {
  __shared__ u32 groups[MAX_CHOICES];
  __shared__ u16 choices[MAX_CHOICES];
  u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, S = a.slices;
  u32 rows = pair.gate.rows, row_tiles = (rows + 15) / 16, tiles = num_tiles(pair.gate);
  const Packed* w[2] = {&pair.gate, &pair.up};
  typedef Pipe<F, 2, (Words<F>::n > 5 ? 2 : UP_TILES), (Words<F>::n > 5 ? 3 : 12 / UP_TILES)> P;
  P pipe;
  pipe.start(shared);
  u32 num_groups = (a.rows + GROUP - 1) / GROUP;
  if constexpr (ROUTED) {
    pdl_wait();
    num_groups = a.plan->num_groups;
    if (threadIdx.x < MAX_CHOICES) { groups[threadIdx.x] = a.plan->groups[threadIdx.x]; choices[threadIdx.x] = a.plan->choices[threadIdx.x]; }
    __syncthreads();
  }
  // Units of this warp, neighbouring ones: neighbouring warps read the same rows.
  u32 warps = blocks * WARPS, mine = block * WARPS + warp, total = num_groups * row_tiles;
  u32 unit = (u64)mine * total / warps, end = (u64)(mine + 1) * total / warps, ahead = unit, ahead_slice = 0;
  auto issue = [&] {
    if (pipe.left == 0) {
      if (ahead_slice == S) { ahead_slice = 0; ahead++; }
      if (ahead < end) {
        u32 row_tile = ahead % row_tiles, first = slice_start(ahead_slice, S, tiles);
        const u32 both[2] = {row_tile, row_tile};
        aim_at<2>(pipe, w, ROUTED ? group_expert(groups[ahead / row_tiles]) : 0, both, first, slice_start(ahead_slice + 1, S, tiles) - first);
        ahead_slice++;
      }
    }
    pipe.issue();
  };
#pragma unroll
  for (int i = 0; i < P::D; i++) issue();
  if constexpr (!ROUTED) pdl_wait();
  for (; unit < end; unit++) {
    u32 group = unit / row_tiles, row_tile = unit % row_tiles, expert = 0, start = group * GROUP, members = a.rows - start < GROUP ? a.rows - start : GROUP;
    if constexpr (ROUTED) { u32 g = groups[group]; expert = group_expert(g); start = group_first(g); members = group_count(g); }
    auto choice_of = [&](u32 n) { return ROUTED ? (u32)choices[start + n] : start + n; };
    auto out_of = [&](u32 choice) { return ROUTED ? (u64)(choice / a.top_k) * pair.out.stride + choice % a.top_k * rows : (u64)choice * pair.out.stride; };
    auto run = [&](auto lots) {
      constexpr int Q = decltype(lots)::n;
      Source source[Q];
#pragma unroll
      for (int q = 0; q < Q; q++) source[q] = source_of<F>(q, members, [&](u32 n) { u32 c = choice_of(n); return (ROUTED ? c / a.top_k : c) * (u32)pair.x_bytes; });
      float sums[2][Q][Lot<F>::sums] = {};
      for (u32 slice = 0; slice < S; slice++) {
        float acc[2][Q][Lot<F>::sums] = {};
        u32 first = slice_start(slice, S, tiles);
        pass<F, 2, Q>(pipe, acc, FromMemory<F, Q>{pair.x + first * Form<F>::tile, source, first * 64, pair.gate.cols}, slice_start(slice + 1, S, tiles) - first, issue);
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
          for (int q = 0; q < Q; q++)
#pragma unroll
            for (int k = 0; k < Lot<F>::sums; k++) sums[r][q][k] += acc[r][q][k];
      }
      each_sum<F, Q>([&](u32 r, u32 n, int q, int k) {
        u32 row = row_tile * 16 + r;
        if (n >= members || row >= rows) return;
        float y = activate(a.activation, finish<F>(pair.gate, expert, row, sums[0][q][k]), finish<F>(pair.up, expert, row, sums[1][q][k]));
        u64 at = out_of(choice_of(n)) + row;
        pair.out.p[at] = y;
        if (pair.out.twin) pair.out.twin[at] = f32_to_bf16(y);
      });
    };
    if (Lot<F>::in_group == 1 || members <= Lot<F>::rows) run(Count<1>());
    else if constexpr (Lot<F>::in_group == 2) run(Count<2>());
    if (unit + 1 == end) pdl_launch();
    if (!pair.digits) continue;
    // The last of the four row tiles of 64 rows makes their digits.
    u32 tile = row_tile / 4, per_row = rows / 64, last = 0;
    __threadfence();
    __syncwarp();
    if (lane == 0) last = atomicInc(pair.arrived + group * per_row + tile, 3) == 3;
    if (!__shfl_sync(0xffffffffu, last, 0)) continue;
    __threadfence();
    for (u32 n = lane / 8; n < (members + 3) / 4 * 4; n += 4) {
      u32 choice = choice_of(n < members ? n : 0);
      const float* h = pair.out.p + out_of(choice) + tile * 64 + lane % 8 * 8;
      float v[8];
#pragma unroll
      for (int i = 0; i < 8; i++) v[i] = *(volatile const float*)(h + i);
      digits8(v, n < members ? pair.digits + ((u64)choice * per_row + tile) * DIGITS_BYTES : nullptr);
    }
  }
}
template <int F, int G> DEVICE void few_up_both(const FewUpArgs& a) {
  extern __shared__ __align__(16) u8 shared[];
  if (blockIdx.x < a.shared_blocks) few_up<G, false>(a, a.shared, blockIdx.x, a.shared_blocks, shared);
  else few_up<F, true>(a, a.routed, blockIdx.x - a.shared_blocks, gridDim.x - a.shared_blocks, shared);
}

// ---- down ----

// out = plus + sum over a row's experts of weight * (h W): a block has one row tile, a warp a group of an expert's rows at a time.
struct FewDownArgs {
  Packed w;
  Mat out, weights, plus, residual;
  const Plan* plan;
  const u8* x;     // h in the form of the format, a part a choice
  u64 part_bytes;
  u32 slices, rows, top_k, pad;
};
template <int F> DEVICE void few_down(const FewDownArgs& a) {
  extern __shared__ __align__(16) u8 shared[];
  __shared__ u32 groups[MAX_CHOICES];
  __shared__ u16 choices[MAX_CHOICES];
  Pipe<F, 1> pipe;
  float* results = (float*)(shared + WARPS * pipe.RING);  // [choices][16]
  u32 warp = threadIdx.x / 32, S = a.slices, row_tiles = (a.w.rows + 15) / 16, tiles = num_tiles(a.w);
  const Packed* w[1] = {&a.w};
  pipe.start(shared);
  pdl_wait();
  u32 num_groups = a.plan->num_groups;
  if (threadIdx.x < MAX_CHOICES) { groups[threadIdx.x] = a.plan->groups[threadIdx.x]; choices[threadIdx.x] = a.plan->choices[threadIdx.x]; }
  __syncthreads();
  // A slice at a time.
  u32 ahead_tile = blockIdx.x, ahead_group = warp, ahead_slice = 0;
  auto issue = [&] {
    if (pipe.left == 0) {
      if (ahead_slice == S) { ahead_slice = 0; ahead_group += WARPS; }
      if (ahead_group >= num_groups) { ahead_group = warp; ahead_tile += gridDim.x; }
      if (ahead_tile < row_tiles && ahead_group < num_groups) {
        u32 first = slice_start(ahead_slice, S, tiles);
        const u32 row_tile[1] = {ahead_tile};
        aim_at<1>(pipe, w, group_expert(groups[ahead_group]), row_tile, first, slice_start(ahead_slice + 1, S, tiles) - first);
        ahead_slice++;
      }
    }
    pipe.issue();
  };
#pragma unroll
  for (int i = 0; i < pipe.D; i++) issue();
  for (u32 row_tile = blockIdx.x; row_tile < row_tiles; row_tile += gridDim.x) {
    for (u32 g = warp; g < num_groups; g += WARPS) {
      u32 group = groups[g], start = group_first(group), members = group_count(group), expert = group_expert(group);
      auto run = [&](auto lots) {
        constexpr int Q = decltype(lots)::n;
        Source source[Q];
#pragma unroll
        for (int q = 0; q < Q; q++) source[q] = source_of<F>(q, members, [&](u32 n) { return choices[start + n] * (u32)a.part_bytes; });
        float total[Q][Lot<F>::sums] = {};
        for (u32 slice = 0; slice < S; slice++) {
          float acc[1][Q][Lot<F>::sums] = {};
          u32 first = slice_start(slice, S, tiles);
          pass<F, 1, Q>(pipe, acc, FromMemory<F, Q>{a.x + first * Form<F>::tile, source, first * 64, a.w.cols}, slice_start(slice + 1, S, tiles) - first, issue);
#pragma unroll
          for (int q = 0; q < Q; q++)
#pragma unroll
            for (int k = 0; k < Lot<F>::sums; k++) total[q][k] += acc[0][q][k];
        }
        each_sum<F, Q>([&](u32 r, u32 n, int q, int k) {
          u32 row = row_tile * 16 + r;
          if (n < members && row < a.w.rows) results[choices[start + n] * 16 + r] = finish<F>(a.w, expert, row, total[q][k]);
        });
      };
      if (Lot<F>::in_group == 1 || members <= Lot<F>::rows) run(Count<1>());
      else if constexpr (Lot<F>::in_group == 2) run(Count<2>());
    }
    if (row_tile + gridDim.x >= row_tiles) pdl_launch();
    __syncthreads();
    for (u32 i = threadIdx.x; i < 16 * a.rows; i += blockDim.x) {
      u32 row = row_tile * 16 + i % 16, token = i / 16;
      if (row >= a.w.rows) continue;
      float sum = a.plus.p ? a.plus.p[(u64)token * a.plus.stride + row] : 0.f;
      for (u32 k = 0; k < a.top_k; k++)
        sum = fmaf(a.weights.p[(u64)token * a.weights.stride + k], results[(token * a.top_k + k) * 16 + i % 16], sum);
      store(a.out, token, row, sum);
      if (a.residual.p) a.residual.p[(u64)token * a.residual.stride + row] += sum;
    }
    if (row_tile + gridDim.x < row_tiles) __syncthreads();
  }
}

// ---- out = x W for several weights of one format, or a product a head ----

struct FewLineArgs {
  Part part[4];
  u32 first_unit[5];  // of each part, in units of R row tiles
  u32 num_parts, slices, rows;
  const u8* x;        // in the form of the format
  u64 x_bytes;        // of a row
  u32 matrices, x_matrix_bytes;  // heads of the only part, and bytes between the inputs of two of them; else 1
  Mat residual;       // the result is added to it too (p null: none)
};
// STAGED: the rows too go through shared memory, with rings of C tiles and D slots.
template <int F, int R, int Q, bool STAGED, int C = 0, int D = 0> DEVICE void few_line(const FewLineArgs& a) {
  extern __shared__ __align__(16) u8 shared[];
  constexpr u32 W = Q * Lot<F>::rows + 1;
  __shared__ float red[WARPS][R * 16 * W];
  u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  u32 S = a.slices, side = WARPS / S, team = warp / S, slice = warp % S;
  u32 cols = a.part[0].w.cols, tiles = num_tiles(a.part[0].w);
  u32 first = slice_start(slice, S, tiles), count = slice_start(slice + 1, S, tiles) - first;
  u32 teams = gridDim.x * side, mine = blockIdx.x * side + team, per_matrix = a.first_unit[a.num_parts], total = per_matrix * a.matrices;
  u32 unit = (u64)mine * total / teams, end = (u64)(mine + 1) * total / teams, ahead = unit;
  typedef Pipe<F, R, C, D> P;
  P pipe;
  pipe.start(shared);
  FromRing<F, Q, P> staged;
  staged.start(shared + WARPS * P::RING);
  auto part_of = [&](u32 u) {
    u32 k = 0;
    while (k + 1 < a.num_parts && u >= a.first_unit[k + 1]) k++;
    return k;
  };
  // Points the ring at the next unit when the last one is on its way. Returns the tiles of the next slot, where they start, and their rows.
  struct Next { u32 n, tile; const u8* rows; };
  const u8* rows_from = a.x;
  auto next = [&]() -> Next {
    if (pipe.left == 0 && ahead < end) {
      u32 matrix = ahead / per_matrix, u = ahead % per_matrix, k = part_of(u), row_tiles = (a.part[k].w.rows + 15) / 16;
      const Packed* w[R];
      u32 row_tile[R];
#pragma unroll
      for (u32 r = 0; r < R; r++) {
        w[r] = &a.part[k].w;
        row_tile[r] = (u - a.first_unit[k]) * R + r;
        if (row_tile[r] >= row_tiles) row_tile[r] = row_tiles - 1;
      }
      aim_at<R>(pipe, w, matrix, row_tile, first, count);
      rows_from = a.x + (u64)matrix * a.x_matrix_bytes;
      ahead++;
    }
    return {pipe.left < P::C ? pipe.left : P::C, first + count - pipe.left, rows_from};
  };
  auto issue_rows = [&](const Next& t, u32 put) {
    if (STAGED && t.n) staged.issue(t.rows, a.x_bytes, a.rows, t.tile, t.n, put, pipe.bars + 8 * put);
  };
  auto issue_weights = [&](const Next& t) { pipe.issue(STAGED ? t.n * a.rows * Form<F>::tile : 0); };
  auto issue = [&] {
    Next t = next();
    issue_rows(t, pipe.put);
    issue_weights(t);
  };
#if __CUDA_ARCH__ >= 900
  // Weights do not wait for the operation before, rows do.
  Next started[P::D];
#pragma unroll
  for (int i = 0; i < P::D; i++) { started[i] = next(); issue_weights(started[i]); }
  pdl_wait();
#pragma unroll
  for (int i = 0; i < P::D; i++) issue_rows(started[i], i);
#else
#pragma unroll
  for (int i = 0; i < P::D; i++) issue();
#endif
  Source source[Q];
#pragma unroll
  for (int q = 0; q < Q; q++) source[q] = source_of<F>(q, a.rows, [&](u32 n) { return n * (u32)a.x_bytes; });
  for (; unit < end; unit++) {
    u32 matrix = unit / per_matrix, u = unit % per_matrix, k = part_of(u), first_row = (u - a.first_unit[k]) * R * 16;
    const Part& part = a.part[k];
    float acc[R][Q][Lot<F>::sums] = {};
    if constexpr (STAGED) pass<F, R, Q>(pipe, acc, staged, count, issue);
    else pass<F, R, Q>(pipe, acc, FromMemory<F, Q>{a.x + (u64)matrix * a.x_matrix_bytes + first * Form<F>::tile, source, first * 64, cols}, count, issue);
    if (unit + 1 >= end) pdl_launch();
    team_barrier(team, S);
#pragma unroll
    for (u32 r = 0; r < R; r++) each_sum<F, Q>([&](u32 row, u32 n, int q, int k) { red[warp][(r * 16 + row) * W + n] = acc[r][q][k]; });
    team_barrier(team, S);
    for (u32 i = slice * 32 + lane; i < R * 16 * a.rows; i += S * 32) {
      u32 r = i % (R * 16), n = i / (R * 16), row = first_row + r;
      if (row >= part.w.rows) continue;
      float sum = 0.f;
      for (u32 s = 0; s < S; s++) sum += red[team * S + s][r * W + n];
      sum = finish<F>(part.w, matrix, row, sum);
      store(part.out, n, matrix * part.w.rows + row, sum);
      if (a.residual.p) a.residual.p[(u64)n * a.residual.stride + row] += sum;
    }
  }
}

#define UP(NAME, F, OTHER, G) KERNEL __launch_bounds__(256, 2) few_up_##NAME##_##OTHER(const __grid_constant__ FewUpArgs a) { few_up_both<F, G>(a); }
#define KERNELS(NAME, F) \
  UP(NAME, F, NAME, F) \
  KERNEL __launch_bounds__(256, 2) few_down_##NAME(const __grid_constant__ FewDownArgs a) { few_down<F>(a); } \
  KERNEL __launch_bounds__(256, 2) few_line4_##NAME(const __grid_constant__ FewLineArgs a) { few_line<F, 1, 1, true, (Words<F>::n > 5 ? 2 : 4), 3>(a); } \
  KERNEL __launch_bounds__(256, 2) few_line8_##NAME(const __grid_constant__ FewLineArgs a) { few_line<F, 1, Lot<F>::in_group, true, (Words<F>::n > 5 ? 2 : 4), 2>(a); } \
  KERNEL __launch_bounds__(256, 2) few_wide8_##NAME(const __grid_constant__ FewLineArgs a) { few_line<F, 2, Lot<F>::in_group, true, 2, 2>(a); } \
  KERNEL __launch_bounds__(256, 2) few_line16_##NAME(const __grid_constant__ FewLineArgs a) { few_line<F, 2, 2 * Lot<F>::in_group, true, 2, 2>(a); } \
  KERNEL __launch_bounds__(256, 2) few_line32_##NAME(const __grid_constant__ FewLineArgs a) { few_line<F, 2, 4 * Lot<F>::in_group, false>(a); }
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
UP(affine2, AFFINE2, affine4, AFFINE4)
UP(affine3, AFFINE3, affine4, AFFINE4)
UP(affine3, AFFINE3, affine6, AFFINE6)
UP(affine4, AFFINE4, affine6, AFFINE6)
UP(affine4, AFFINE4, affine8, AFFINE8)
UP(nvfp4, NVFP4, fp8, FP8)
