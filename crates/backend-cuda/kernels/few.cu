// Two to 32 rows of activations: the step of several sequences, or of one whose drafts are verified. Bound by reading weights, then by instructions:
//
// - Weights are streamed once past all rows that want them, a ring a warp (pipe.cuh), by grids as large as what is resident.
// - Rows are shared by the warps of a block (shared_rows.cuh), each of which has two row tiles of weights. A block has neighbouring row
//   tiles of one group of rows, so that it goes from one expert to the next rarely.
// - The choice of experts is sorted once, by the kernel that makes it (`route_plan`), into groups of up to eight rows of one expert.
//   Finding an expert's rows was done by every block of every row tile before, which took longer than the product itself.
// - High and low digits of four rows are the eight columns of one tensor-core product: half of the instructions of two products with
//   eight rows each, where an expert seldom has more than four rows. A lane has one row of activations and two of weights.
//
// Results are those of the kernels in matmul.cu bit for bit: the same sums in the same order.
#include "lots.cuh"
#include "shared_rows.cuh"
#include "route.cuh"
#include "row.cuh"

#define GROUP 8         // rows that share a pass over an expert's weights
#define MAX_CHOICES 256  // rows times top-k
#define MAX_EXPERTS 512
#define TALL 2          // row tiles of a warp
#define LINE_WARPS 4    // warps of a block of `few_line` that multiply

// acc += `count` tiles of the warp's row tiles, which have been issued in this order, times Q lots of the block's rows; `refill` keeps the ring full.
template <int F, int Q, typename P, typename X, typename Refill>
DEVICE void pass(P& pipe, X& rows, float acc[TALL][Q][Lot<F>::sums], u32 count, Refill refill) {
  for (u32 j = 0; j < count; j += P::C) {
    u32 x = rows.wait();
    pipe.wait();
    u32 slot = pipe.ring + pipe.take * P::SLOT;
    pipe.take = pipe.take + 1 == P::D ? 0 : pipe.take + 1;
    if (count - j >= P::C) multiply_tiles<F, TALL, Q, P::C>(pipe, acc, slot, [&](Loaded<Is<F>::affine>& to, int i, int q) { load_lot<F>(to, x + i * X::STEP, X::ROW, q); });
    else
      for (u32 i = 0; i < count - j; i++, x += X::STEP)
        multiply_tiles<F, TALL, Q, 1>(pipe, acc, slot + i * P::TILE, [&](Loaded<Is<F>::affine>& to, int, int q) { load_lot<F>(to, x, X::ROW, q); });
    rows.release();
    refill();
  }
}
// What the warp that copies rows does meanwhile, for tiles `first` to `first + count`; `row(n)` is where row n starts.
template <int C, typename X, typename Row> DEVICE void feed(X& rows, u32 num_rows, u32 first, u32 count, Row row) {
  const u8* from[X::TURNS];
#pragma unroll
  for (int i = 0; i < X::TURNS; i++) from[i] = row(X::row_of(i) < num_rows ? X::row_of(i) : 0) + first * X::STEP;
  for (u32 j = 0; j < count; j += C) {
    rows.put(from, num_rows, count - j < C ? count - j : C);
#pragma unroll
    for (int i = 0; i < X::TURNS; i++) from[i] += C * X::STEP;
  }
}

template <int N> struct Count { static constexpr int n = N; };

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
struct FewPair { Packed gate, up; Mat out; const u8* x; u64 x_bytes; u8* digits; };
struct FewUpArgs {
  FewPair routed, shared;  // shared: all rows, another format, or none (shared_blocks 0)
  const Plan* plan;        // null: nothing is routed
  u32 shared_blocks;       // the first blocks of the grid
  u32 slices, rows, top_k;
  Activation activation;
};

// Tiles of a slot, slots of a warp's ring, slots of the rows' ring: what lets as many blocks fit as there are registers for.
template <int C_, int D_, int X_> struct Size { static constexpr int C = C_, D = D_, X = X_; };
template <int F> using GroupSize = typename Either<(Words<F>::n > 4), Size<2, 2, 3>, Size<4, 2, 3>>::type;
template <int F, int ROWS> using LineSize = typename Either<(Words<F>::n > 4),
    typename Either<ROWS == 32, Size<2, 2, 3>, Size<2, 3, 3>>::type, typename Either<ROWS == 32, Size<2, 3, 3>, Size<4, 2, 3>>::type>::type;

// A group of rows of one expert, or of all rows.
struct Group { u32 expert, first, members; };
struct Groups {
  u32 groups[MAX_CHOICES];
  u16 choices[MAX_CHOICES];
  METHOD void load(const Plan& plan) {
    if (threadIdx.x < MAX_CHOICES) { groups[threadIdx.x] = plan.groups[threadIdx.x]; choices[threadIdx.x] = plan.choices[threadIdx.x]; }
    __syncthreads();
  }
  METHOD Group get(u32 i) const {
    u32 g = groups[i];
    return {group_expert(g), group_first(g), group_count(g)};
  }
};

struct UpShared {
  Groups plan;
  float h[2][WARPS * 16][GROUP + 1];  // of this unit and the one before
};
// A unit is eight row tiles of both matrices for a group's rows, a warp each.
template <int F, bool ROUTED> DEVICE void few_up(const FewUpArgs& a, const FewPair& pair, u32 block, u32 blocks, u8* shared, UpShared& s) {
  typedef GroupSize<F> Size;
  typedef Pipe<F, TALL, Size::C, Size::D> P;
  typedef SharedRows<F, Size::C, Size::X, GROUP> X;
  u32 warp = warp_index(), lane = threadIdx.x % 32, S = a.slices, width = pair.gate.rows, tiles = num_tiles(pair.gate);
  u32 row_tiles = (width + 15) / 16, row_blocks = (row_tiles + WARPS - 1) / WARPS, num_groups = (a.rows + GROUP - 1) / GROUP;
  const Packed* w[TALL] = {&pair.gate, &pair.up};
  P pipe;
  X rows;
  if (warp < WARPS) pipe.start(shared);
  rows.start(shared + WARPS * P::RING, WARPS);
  if constexpr (ROUTED) {
    pdl_wait();
    num_groups = a.plan->num_groups;
    s.plan.load(*a.plan);
  }
  u32 total = num_groups * row_blocks, unit = (u64)block * total / blocks, end = (u64)(block + 1) * total / blocks;
  // All groups of rows of the shared expert after each other: its weights are then in the second-level cache.
  auto group_of = [&](u32 u) -> Group {
    if constexpr (ROUTED) return s.plan.get(u / row_blocks);
    u32 first = u % num_groups * GROUP;
    return {0, first, a.rows - first < GROUP ? a.rows - first : GROUP};
  };
  auto row_block_of = [&](u32 u) { return ROUTED ? u % row_blocks : u / num_groups; };
  auto choice_of = [&](const Group& g, u32 n) { return ROUTED ? (u32)s.plan.choices[g.first + n] : g.first + n; };
  if (warp == WARPS) {
    if constexpr (!ROUTED) pdl_wait();
    for (; unit < end; unit++) {
      Group g = group_of(unit);
      auto row = [&](u32 n) { u32 choice = choice_of(g, n); return pair.x + (ROUTED ? choice / a.top_k : choice) * pair.x_bytes; };
      for (u32 slice = 0; slice < S; slice++) {
        u32 first = slice_start(slice, S, tiles);
        feed<Size::C>(rows, g.members, first, slice_start(slice + 1, S, tiles) - first, row);
      }
    }
    return;
  }
  u32 ahead = unit, ahead_slice = 0;
  auto issue = [&] {
    if (pipe.left == 0) {
      if (ahead_slice == S) { ahead_slice = 0; ahead++; }
      if (ahead < end) {
        u32 row_tile = row_block_of(ahead) * WARPS + warp, first = slice_start(ahead_slice, S, tiles);
        if (row_tile >= row_tiles) row_tile = row_tiles - 1;
        pipe.aim(w, group_of(ahead).expert, row_tile, first, slice_start(ahead_slice + 1, S, tiles) - first);
        ahead_slice++;
      }
    }
    pipe.issue();
  };
#pragma unroll
  for (int i = 0; i < P::D; i++) issue();
  if constexpr (!ROUTED) pdl_wait();
  for (; unit < end; unit++) {
    Group g = group_of(unit);
    u32 row_tile = row_block_of(unit) * WARPS + warp;
    auto run = [&](auto lots) {
      constexpr int Q = decltype(lots)::n;
      float sums[TALL][Q][Lot<F>::sums] = {};
      for (u32 slice = 0; slice < S; slice++) {
        float acc[TALL][Q][Lot<F>::sums] = {};
        pass<F, Q>(pipe, rows, acc, slice_start(slice + 1, S, tiles) - slice_start(slice, S, tiles), issue);
        add_slice<F, TALL, Q>(sums, acc);
      }
      each_sum<F, Q>([&](u32 r, u32 n, int q, int k) {
        u32 row = row_tile * 16 + r;
        if (n >= g.members || row >= width) return;
        float y = activate(a.activation, finish<F>(pair.gate, g.expert, row, sums[0][q][k]), finish<F>(pair.up, g.expert, row, sums[1][q][k]));
        u32 choice = choice_of(g, n);
        u64 at = (ROUTED ? (u64)(choice / a.top_k) * pair.out.stride + choice % a.top_k * width : (u64)choice * pair.out.stride) + row;
        pair.out.p[at] = y;
        if (pair.out.twin) pair.out.twin[at] = f32_to_bf16(y);
        s.h[unit & 1][warp * 16 + r][n] = y;
      });
    };
    if (GROUP <= Lot<F>::rows || g.members <= Lot<F>::rows) run(Count<1>());
    else if constexpr (GROUP > Lot<F>::rows) run(Count<2>());
    if (unit + 1 == end) pdl_launch();
    if (!pair.digits) continue;
    // Four warps have 64 values of each row, and make their digits.
    asm volatile("bar.sync %0, 128;" ::"r"(1 + warp / 4) : "memory");
    u32 n = warp % 4 * 4 + lane / 8, tile = row_tile / 4;
    if (warp % 4 * 4 >= g.members || tile * 64 >= width) continue;
    float v[8];
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = n < g.members ? s.h[unit & 1][warp / 4 * 64 + lane % 8 * 8 + i][n] : 0.f;
    digits8(v, n < g.members ? pair.digits + ((u64)choice_of(g, n) * (width / 64) + tile) * DIGITS_BYTES : nullptr);
  }
}
template <int F, int G> DEVICE void few_up_both(const FewUpArgs& a) {
  extern __shared__ __align__(16) u8 shared[];
  __shared__ UpShared s;
  if (blockIdx.x < a.shared_blocks) few_up<G, false>(a, a.shared, blockIdx.x, a.shared_blocks, shared, s);
  else few_up<F, true>(a, a.routed, blockIdx.x - a.shared_blocks, gridDim.x - a.shared_blocks, shared, s);
}

// ---- down ----

// results = h W for all choices; `few_sum` makes a row's weighted sum of them.
struct FewDownArgs {
  Packed w;
  const Plan* plan;
  const u8* x;     // h in the form of the format, a part a choice
  u64 part_bytes;
  float* results;  // [choices, rows of w]
  u32 slices, pad;
};
// A unit is 16 row tiles for a group's rows, two a warp.
template <int F> DEVICE void few_down(const FewDownArgs& a) {
  extern __shared__ __align__(16) u8 shared[];
  __shared__ Groups plan;
  typedef GroupSize<F> Size;
  typedef Pipe<F, TALL, Size::C, Size::D> P;
  typedef SharedRows<F, Size::C, Size::X, GROUP> X;
  u32 warp = warp_index(), S = a.slices, tiles = num_tiles(a.w);
  u32 row_tiles = (a.w.rows + 15) / 16, row_blocks = (row_tiles + WARPS * TALL - 1) / (WARPS * TALL);
  P pipe;
  X rows;
  if (warp < WARPS) pipe.start(shared);
  rows.start(shared + WARPS * P::RING, WARPS);
  pdl_wait();
  u32 total = a.plan->num_groups * row_blocks, unit = (u64)blockIdx.x * total / gridDim.x, end = (u64)(blockIdx.x + 1) * total / gridDim.x;
  plan.load(*a.plan);
  if (warp == WARPS) {
    for (; unit < end; unit++) {
      Group g = plan.get(unit / row_blocks);
      auto row = [&](u32 n) { return a.x + plan.choices[g.first + n] * a.part_bytes; };
      for (u32 slice = 0; slice < S; slice++) {
        u32 first = slice_start(slice, S, tiles);
        feed<Size::C>(rows, g.members, first, slice_start(slice + 1, S, tiles) - first, row);
      }
    }
    return;
  }
  u32 ahead = unit, ahead_slice = 0;
  auto issue = [&] {
    if (pipe.left == 0) {
      if (ahead_slice == S) { ahead_slice = 0; ahead++; }
      if (ahead < end) {
        u32 first = slice_start(ahead_slice, S, tiles), row_tile = (ahead % row_blocks * WARPS + warp) * TALL;
        pipe.aim(a.w, plan.get(ahead / row_blocks).expert, row_tile, first, slice_start(ahead_slice + 1, S, tiles) - first);
        ahead_slice++;
      }
    }
    pipe.issue();
  };
#pragma unroll
  for (int i = 0; i < P::D; i++) issue();
  for (; unit < end; unit++) {
    Group g = plan.get(unit / row_blocks);
    u32 first_row = (unit % row_blocks * WARPS + warp) * TALL * 16;
    auto run = [&](auto lots) {
      constexpr int Q = decltype(lots)::n;
      float sums[TALL][Q][Lot<F>::sums] = {};
      for (u32 slice = 0; slice < S; slice++) {
        float acc[TALL][Q][Lot<F>::sums] = {};
        pass<F, Q>(pipe, rows, acc, slice_start(slice + 1, S, tiles) - slice_start(slice, S, tiles), issue);
        add_slice<F, TALL, Q>(sums, acc);
      }
#pragma unroll
      for (int i = 0; i < TALL; i++)
        each_sum<F, Q>([&](u32 r, u32 n, int q, int k) {
          u32 row = first_row + i * 16 + r;
          if (n < g.members && row < a.w.rows) a.results[(u64)plan.choices[g.first + n] * a.w.rows + row] = finish<F>(a.w, g.expert, row, sums[i][q][k]);
        });
    };
    if (GROUP <= Lot<F>::rows || g.members <= Lot<F>::rows) run(Count<1>());
    else if constexpr (GROUP > Lot<F>::rows) run(Count<2>());
    if (unit + 1 == end) pdl_launch();
  }
}

// out = plus + sum over a row's experts of weight * result. Grid (columns / 256, rows).
struct FewSumArgs { Mat out, weights, plus, residual; const float* results; u32 top_k, pad; };
KERNEL __launch_bounds__(256) few_sum(const __grid_constant__ FewSumArgs a) {
  pdl_launch();
  pdl_wait();
  u32 token = blockIdx.y, column = blockIdx.x * 256 + threadIdx.x;
  if (column >= a.out.cols) return;
  float sum = a.plus.p ? a.plus.p[(u64)token * a.plus.stride + column] : 0.f, old = 0.f;
  float* residual = a.residual.p + (u64)token * a.residual.stride + column;
  if (a.residual.p) old = *residual;
  const float* weights = a.weights.p + (u64)token * a.weights.stride;
  const float* results = a.results + (u64)token * a.top_k * a.out.cols + column;
#pragma unroll 8
  for (u32 k = 0; k < a.top_k; k++) sum = fmaf(weights[k], results[(u64)k * a.out.cols], sum);
  store(a.out, token, column, sum);
  if (a.residual.p) *residual = old + sum;
}

// ---- out = x W for several weights of one format, or a product a head ----

// Units in row tiles of a block.
struct FewLineArgs : DenseArgs {
  u32 shares, pad;    // blocks that share the slices of a row tile
  float* sums;        // shares > 1: of each slice, as the warps have them; and
  u32* arrived;       // a counter a warp
};
template <int N> struct __align__(4 * N) Floats { float v[N]; };
// From the second-level cache: other multiprocessors wrote it.
DEVICE Floats<2> load_shared_sums(const Floats<2>* p) {
  Floats<2> x;
  asm volatile("ld.global.cg.v2.f32 {%0,%1}, [%2];" : "=f"(x.v[0]), "=f"(x.v[1]) : "l"(p));
  return x;
}
DEVICE Floats<4> load_shared_sums(const Floats<4>* p) {
  Floats<4> x;
  asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(x.v[0]), "=f"(x.v[1]), "=f"(x.v[2]), "=f"(x.v[3]) : "l"(p));
  return x;
}
// A unit is eight row tiles, two a warp, and a share of the slices: products with few row tiles would leave most of the device idle otherwise.
// The last warp of a row tile adds all slices.
template <int F, int ROWS> DEVICE void few_line(const FewLineArgs& a) {
  extern __shared__ __align__(16) u8 shared[];
  typedef LineSize<F, ROWS> Size;
  constexpr int C = Size::C, N = Lot<F>::sums, Q = (ROWS + Lot<F>::rows - 1) / Lot<F>::rows;
  typedef Pipe<F, TALL, C, Size::D> P;
  typedef SharedRows<F, C, Size::X, Q * Lot<F>::rows> X;
  typedef Floats<N> Sums;
  // Sums of the slices so far of this thread, where registers would hold half as many products on their way.
  float* kept = (float*)(shared + LINE_WARPS * P::RING + X::BYTES) + threadIdx.x;
  u32 warp = warp_index(), lane = threadIdx.x % 32, S = a.slices, slices = S / a.shares, tiles = num_tiles(a.part[0].w);
  u32 per_matrix = a.first_unit[a.num_parts], total = per_matrix * a.matrices * a.shares;
  u32 unit = (u64)blockIdx.x * total / gridDim.x, end = (u64)(blockIdx.x + 1) * total / gridDim.x;
  P pipe;
  X rows;
  if (warp < LINE_WARPS) pipe.start(shared);
  rows.start(shared + LINE_WARPS * P::RING, LINE_WARPS);
  if (warp == LINE_WARPS) {
    pdl_wait();
    for (; unit < end; unit++) {
      auto row = [&](u32 n) { return a.x + (u64)(unit / a.shares / per_matrix) * a.x_matrix_bytes + n * a.x_bytes; };
      for (u32 i = 0; i < slices; i++) {
        u32 slice = unit % a.shares * slices + i, first = slice_start(slice, S, tiles);
        feed<C>(rows, a.rows, first, slice_start(slice + 1, S, tiles) - first, row);
      }
    }
    return;
  }
  struct Place { u32 matrix, part, row_tile; };
  auto place_of = [&](u32 u) -> Place {
    u32 group = u / a.shares, at = group % per_matrix, k = 0;
    while (k + 1 < a.num_parts && at >= a.first_unit[k + 1]) k++;
    return {group / per_matrix, k, ((at - a.first_unit[k]) * LINE_WARPS + warp) * TALL};
  };
  u32 ahead = unit, ahead_slice = 0;
  auto issue = [&] {
    if (pipe.left == 0) {
      if (ahead_slice == slices) { ahead_slice = 0; ahead++; }
      if (ahead < end) {
        Place p = place_of(ahead);
        u32 slice = ahead % a.shares * slices + ahead_slice, first = slice_start(slice, S, tiles);
        pipe.aim(a.part[p.part].w, p.matrix, p.row_tile, first, slice_start(slice + 1, S, tiles) - first);
        ahead_slice++;
      }
    }
    pipe.issue();
  };
#pragma unroll
  for (int i = 0; i < P::D; i++) issue();
  pdl_wait();
  for (; unit < end; unit++) {
    Place p = place_of(unit);
    const Part& part = a.part[p.part];
    float sums[TALL][Q][N];
    u32 group = unit / a.shares;
    auto place_of_sums = [&](u32 slice) { return (Sums*)a.sums + ((u64)(group * S + slice) * LINE_WARPS + warp) * (TALL * Q * 32) + lane; };
    for (u32 i = 0; i < slices; i++) {
      u32 slice = unit % a.shares * slices + i;
#pragma unroll
      for (int r = 0; r < TALL; r++)
#pragma unroll
        for (int q = 0; q < Q; q++)
#pragma unroll
          for (int k = 0; k < N; k++) sums[r][q][k] = 0.f;
      pass<F, Q>(pipe, rows, sums, slice_start(slice + 1, S, tiles) - slice_start(slice, S, tiles), issue);
      Sums* to = place_of_sums(slice);
#pragma unroll
      for (int r = 0; r < TALL; r++)
#pragma unroll
        for (int q = 0; q < Q; q++) {
          if (a.shares > 1) to[(r * Q + q) * 32] = *(const Sums*)sums[r][q];
          else
#pragma unroll
            for (int k = 0; k < N; k++) {
              float* p = kept + ((r * Q + q) * N + k) * (32 * LINE_WARPS);
              sums[r][q][k] += i ? *p : 0.f;
              if (i + 1 < slices) *p = sums[r][q][k];
            }
        }
    }
    if (unit + 1 == end) pdl_launch();
    if (a.shares > 1) {
      u32 last = 0;
      __threadfence();
      __syncwarp();
      if (lane == 0) last = atomicInc(a.arrived + group * LINE_WARPS + warp, a.shares - 1) == a.shares - 1;
      if (!__shfl_sync(0xffffffffu, last, 0)) continue;
      __threadfence();
#pragma unroll
      for (int r = 0; r < TALL; r++)
#pragma unroll
        for (int q = 0; q < Q; q++)
#pragma unroll
          for (int k = 0; k < N; k++) sums[r][q][k] = 0.f;
      // Some slices at a time: each waits for the second-level cache (64.4 us of a layer's products for eight rows, 60.6 so). With 32 rows there
      // are no registers for it.
      constexpr u32 AT_ONCE = Q * N >= 16 ? 1 : 4;
#pragma unroll 1
      for (u32 slice = 0; slice < S; slice += AT_ONCE) {
        float acc[AT_ONCE][TALL][Q][N];
#pragma unroll
        for (u32 i = 0; i < AT_ONCE; i++) {
          const Sums* from = place_of_sums(slice + i < S ? slice + i : slice);
#pragma unroll
          for (int r = 0; r < TALL; r++)
#pragma unroll
            for (int q = 0; q < Q; q++) *(Sums*)acc[i][r][q] = load_shared_sums(from + (r * Q + q) * 32);
        }
#pragma unroll
        for (u32 i = 0; i < AT_ONCE; i++)
          if (slice + i < S) add_slice<F, TALL, Q>(sums, acc[i]);
      }
    }
    auto each = [&](auto f) {
#pragma unroll
      for (int i = 0; i < TALL; i++)
        each_sum<F, Q>([&](u32 r, u32 n, int q, int k) {
          u32 row = (p.row_tile + i) * 16 + r;
          if (n < a.rows && row < part.w.rows) f(row, n, sums[i][q][k]);
        });
    };
    each([&](u32 row, u32 n, float& sum) { sum = finish<F>(part.w, p.matrix, row, sum); });
    if (a.residual.p) {
      // All of it is read before any of it is written: one read after another would take as long as the product.
      float old[TALL][Q][N];
#pragma unroll
      for (int i = 0; i < TALL; i++)
        each_sum<F, Q>([&](u32 r, u32 n, int q, int k) {
          u32 row = (p.row_tile + i) * 16 + r;
          old[i][q][k] = n < a.rows && row < part.w.rows ? a.residual.p[(u64)n * a.residual.stride + row] : 0.f;
        });
#pragma unroll
      for (int i = 0; i < TALL; i++)
        each_sum<F, Q>([&](u32 r, u32 n, int q, int k) {
          u32 row = (p.row_tile + i) * 16 + r;
          if (n < a.rows && row < part.w.rows) a.residual.p[(u64)n * a.residual.stride + row] = old[i][q][k] + sums[i][q][k];
        });
    }
    each([&](u32 row, u32 n, float& sum) { store(part.out, n, p.matrix * part.w.rows + row, sum); });
  }
}

#ifndef NO_KERNELS  // programs under bench/ want the arguments alone
// Threads of a block: the warps that multiply, and the one that copies rows.
#define UP(NAME, F, OTHER, G) KERNEL __launch_bounds__(32 * WARPS + 32, 2) few_up_##NAME##_##OTHER(const __grid_constant__ FewUpArgs a) { few_up_both<F, G>(a); }
#define LINE(NAME, F, ROWS) \
  KERNEL __launch_bounds__(32 * LINE_WARPS + 32, 3) few_line##ROWS##_##NAME(const __grid_constant__ FewLineArgs a) { few_line<F, ROWS>(a); }
#define KERNELS(NAME, F) \
  UP(NAME, F, NAME, F) \
  KERNEL __launch_bounds__(32 * WARPS + 32, 2) few_down_##NAME(const __grid_constant__ FewDownArgs a) { few_down<F>(a); } \
  LINE(NAME, F, 4) LINE(NAME, F, 8) LINE(NAME, F, 16) LINE(NAME, F, 32)
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
#endif
