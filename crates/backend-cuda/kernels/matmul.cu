// Matrix products with weights. Three kernels a format:
//
//   gemv       up to 16 rows: the step of decoding. A warp streams one slice of one row tile; the slices of a row tile are added in
//              order through shared memory. Fused: gate and up with the activation, down with the weighted sum of experts.
//   gemm       more rows: a block keeps 64 rows of activations in shared memory and streams 256 rows of weights past them.
//   plain      f32, f16 and bf16 weights with f32 activations.
//
// gemv and gemm give the same bits: the same tensor-core instruction on the same fragments in the same order, the same cut
// into slices (a function of the number of columns) and the same order of adding them. So a token's result does not
// depend on how many others share the step.
//
// One piece: all three share the fragments and the order of sums, which is what makes their bits agree.
#include "packed.cuh"

// Rows of the batch that go to one expert (or all of them).
struct Routing {
  const u32* ids;      // [num_tokens, top_k], or null: no experts
  u32 ids_stride, num_tokens, top_k;
  u32 slots_in_x;      // x has a row of `top_k` parts a token (down), not one row a token
  const u32* offsets;  // [num_experts + 1] and
  const u32* sorted;   // [num_tokens * top_k] flat slots by expert; null in gemv
};

struct Part { Packed w; Mat out; };
struct MatmulArgs {
  Part part[4];
  u32 first_block[5];     // of each part, in blocks of row tiles
  u32 num_parts;
  u32 slices;
  u32 x_head_stride;      // columns between the inputs of two matrices of a weight (heads)
  Mat x;                  // with a twin, for formats that are multiplied as bfloat16
  const u8* digits;       // x as digits, for affine formats: a part of a row (head, slot of an expert) after another
  u32 digits_parts, pad;  // parts of a row
  Routing routing;
  Activation activation;
  Mat weights, plus;      // of the weighted sum over experts
};

#define WARPS 8

// c += a b for bytes: a 16x32 unsigned codes, b 32x8 signed digits.
DEVICE void mma_bytes(int c[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// Integer sums start from the bits of 3 * 2^22, so that they are floats once finished: 3 * 2^22 + sum, exact below 2^22.
#define BIAS_BITS 0x4b400000
#define BIAS 12582912.f

// The scales of one tile for the rows g and g + 8 of a lane, as they lie in memory.
template <int F, bool FAST> struct Scales { u32 raw; float s[2]; };
template <> struct Scales<AFFINE2, true> { uint2 v; };
template <> struct Scales<AFFINE3, true> { uint2 v; };
template <> struct Scales<AFFINE4, true> { uint2 v; };
template <> struct Scales<AFFINE5, true> { uint2 v; };
template <> struct Scales<AFFINE6, true> { uint2 v; };
template <> struct Scales<AFFINE8, true> { uint2 v; };
template <int F> struct SlowScales { float s[2][2], b[2][2]; };  // [half][row]
template <> struct Scales<AFFINE2, false> : SlowScales<AFFINE2> {};
template <> struct Scales<AFFINE3, false> : SlowScales<AFFINE3> {};
template <> struct Scales<AFFINE4, false> : SlowScales<AFFINE4> {};
template <> struct Scales<AFFINE5, false> : SlowScales<AFFINE5> {};
template <> struct Scales<AFFINE6, false> : SlowScales<AFFINE6> {};
template <> struct Scales<AFFINE8, false> : SlowScales<AFFINE8> {};

// FAST: scales stand behind the codes of their tile: `p` are the tile's own. Otherwise any affine format: `p` is the row tile's.
template <int F, bool FAST> DEVICE void load_scales(Scales<F, FAST>& out, const Packed& w, const u8* p, u32 j, u32 g, u32 t) {
  if constexpr (F == NVFP4) out.raw = *((const u32*)p + g * 2 + t / 2);
  else if constexpr (Is<F>::e8m0) out.raw = *((const u32*)p + g);
  else if constexpr (F == FP8) { float2 v = *((const float2*)p + g); out.s[0] = v.x; out.s[1] = v.y; }
  else if constexpr (FAST) out.v = *((const uint2*)p + g);
  else {
    affine_scale(w, p, j * 64 / w.group, g, out.s[0], out.b[0]);
    if (w.group == 32 && j * 64 + 32 < w.cols) affine_scale(w, p, j * 2 + 1, g, out.s[1], out.b[1]);
    else
      for (int k = 0; k < 2; k++) { out.s[1][k] = w.group == 32 ? 0.f : out.s[0][k]; out.b[1][k] = w.group == 32 ? 0.f : out.b[0][k]; }
  }
}
template <int F, bool FAST> DEVICE const u8* scales_for(const Packed& w, u32 matrix, u32 row_tile, u32 j) {
  if constexpr (FAST) return tile_scales<F>(w, matrix, row_tile, j);
  else return row_tile_scales(w, matrix, row_tile);
}

// What a tile's 64 columns of 8 rows of activations are to a lane.
template <bool BYTES> struct Columns { uint4 b[2]; };           // bfloat16: the two halves of row g
template <> struct Columns<true> { uint4 high, low; float4 about[2]; };  // digits of row g; scale and sums of rows 2t and 2t + 1

// Fragments of the 16 x 64 weights of a tile, for bfloat16 products: [product][register].
template <int F, bool FAST> DEVICE void fragments(u32 a[4][4], const Codes<F>& c, const Scales<F, FAST>& sc) {
  u32 scale[2][2];  // NVFP4: [half][row], times 2^100
  if constexpr (F == NVFP4) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float s = __uint_as_float(((sc.raw >> (8 * i)) & 0xff) << 20) * 1.329227995784916e36f * 1.2676506002282294e30f;
      scale[i & 1][i >> 1] = __byte_perm(__float_as_uint(s), 0, 0x3232);
    }
  }
#pragma unroll
  for (int s = 0; s < 4; s++) {
    int p = 4 * (s / 2) + 2 * (s % 2);
#pragma unroll
    for (int k = 0; k < 4; k++) {
      u32 v = decode_pair<F>(c, k & 1, p + (k >> 1));
      if constexpr (F == NVFP4) v = fma_bf16x2(v, scale[s / 2][k & 1], 0x80008000u);
      if constexpr (F == MXFP4) v = fma_bf16x2(v, splat(8.507059173023462e37f /* 2^126 */), 0x80008000u);
      a[s][k] = v;
    }
  }
}

// The weights of a tile, taken apart.
template <int F, bool FAST> struct Taken { u32 a[4][4]; };
#define TAKEN_AFFINE(F) \
  template <bool FAST> struct Taken<F, FAST> { u32 o[8]; float s[2][2], b[2][2]; };
TAKEN_AFFINE(AFFINE2) TAKEN_AFFINE(AFFINE3) TAKEN_AFFINE(AFFINE4) TAKEN_AFFINE(AFFINE5) TAKEN_AFFINE(AFFINE6) TAKEN_AFFINE(AFFINE8)
template <int F, bool FAST> DEVICE void take(Taken<F, FAST>& to, const Codes<F>& c, const Scales<F, FAST>& sc) {
  if constexpr (Is<F>::affine) {
#pragma unroll
    for (int o = 0; o < 8; o++) to.o[o] = code_bytes<F>(c, o);
    if constexpr (FAST) {
      to.s[0][0] = __uint_as_float(sc.v.x << 16); to.b[0][0] = __uint_as_float(sc.v.x & 0xffff0000u);
      to.s[0][1] = __uint_as_float(sc.v.y << 16); to.b[0][1] = __uint_as_float(sc.v.y & 0xffff0000u);
    } else {
#pragma unroll
      for (int h = 0; h < 2; h++)
#pragma unroll
        for (int r = 0; r < 2; r++) { to.s[h][r] = sc.s[h][r]; to.b[h][r] = sc.b[h][r]; }
    }
  } else fragments<F, FAST>(to.a, c, sc);
}

// acc += tile x (8 rows of activations). ONE: only row 0 is wanted (registers 0 and 2 of lanes with t = 0).
template <int F, bool FAST, bool ONE> DEVICE void accumulate(float acc[4], const Taken<F, FAST>& w, const Scales<F, FAST>& sc, const Columns<Is<F>::affine>& x, bool halves) {
  if constexpr (Is<F>::affine) {
    const u32 high[4] = {x.high.x, x.high.y, x.high.z, x.high.w}, low[4] = {x.low.x, x.low.y, x.low.z, x.low.w};
    auto add = [&](const int ch[4], const int cl[4], const float s[2], const float b[2], int which) {
#pragma unroll
      for (int k = 0; k < 4; k++) {
        if (ONE && (k & 1)) continue;
        const float4& about = x.about[k & 1];
        float sum = which == 0 ? about.w : which == 1 ? about.y : about.z;
        float c = fmaf(__int_as_float(ch[k]) - BIAS, 128.f, __int_as_float(cl[k]) - BIAS);
        acc[k] = fmaf(b[k >> 1], sum, fmaf(s[k >> 1] * about.x, c, acc[k]));
      }
    };
    int ch[4] = {BIAS_BITS, BIAS_BITS, BIAS_BITS, BIAS_BITS}, cl[4] = {BIAS_BITS, BIAS_BITS, BIAS_BITS, BIAS_BITS};
    mma_bytes(ch, w.o[0], w.o[4], w.o[1], w.o[5], high[0], high[1]);
    mma_bytes(cl, w.o[0], w.o[4], w.o[1], w.o[5], low[0], low[1]);
    if (!FAST && halves) {
      add(ch, cl, w.s[0], w.b[0], 1);
#pragma unroll
      for (int k = 0; k < 4; k++) ch[k] = cl[k] = BIAS_BITS;
    }
    mma_bytes(ch, w.o[2], w.o[6], w.o[3], w.o[7], high[2], high[3]);
    mma_bytes(cl, w.o[2], w.o[6], w.o[3], w.o[7], low[2], low[3]);
    if (!FAST && halves) add(ch, cl, w.s[1], w.b[1], 2);
    else add(ch, cl, w.s[0], w.b[0], 0);
  } else {
    const u32 bw[2][4] = {{x.b[0].x, x.b[0].y, x.b[0].z, x.b[0].w}, {x.b[1].x, x.b[1].y, x.b[1].z, x.b[1].w}};
    if constexpr (F == NVFP4) {
#pragma unroll
      for (int s = 0; s < 4; s++) mma_bf16(acc, w.a[s], bw[s / 2][2 * (s % 2)], bw[s / 2][2 * (s % 2) + 1]);
    } else if constexpr (Is<F>::e8m0) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float c[4] = {0.f, 0.f, 0.f, 0.f};
        mma_bf16(c, w.a[2 * h], bw[h][0], bw[h][1]);
        mma_bf16(c, w.a[2 * h + 1], bw[h][2], bw[h][3]);
        float s0 = e8m0_to_f32((sc.raw >> (8 * h)) & 0xff), s1 = e8m0_to_f32((sc.raw >> (16 + 8 * h)) & 0xff);
        acc[0] = fmaf(s0, c[0], acc[0]); acc[1] = fmaf(s0, c[1], acc[1]);
        acc[2] = fmaf(s1, c[2], acc[2]); acc[3] = fmaf(s1, c[3], acc[3]);
      }
    } else {
      float c[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
      for (int s = 0; s < 4; s++) mma_bf16(c, w.a[s], bw[s / 2][2 * (s % 2)], bw[s / 2][2 * (s % 2) + 1]);
#pragma unroll
      for (int k = 0; k < 4; k++) acc[k] = fmaf(sc.s[k >> 1], c[k], acc[k]);
    }
  }
}

template <int F> DEVICE float finish(const Packed& w, u32 matrix, u32 row, float x) {
  if constexpr (F == NVFP4) x *= 6.7108864e7f;  // 2^26: fragments carry 2^-126 * 2^100
  if (w.global_scales) x *= w.global_scales[matrix];
  if (w.bias) x += w.bias[(u64)matrix * w.rows + row];
  return x;
}

// One row of activations for a lane: where its products read it.
struct Row {
  const u16* twin;   // row g of this group of eight, or null
  const u8* digits;  // the same as digits, or null
  const u8* about[2];  // digits of rows 2t and 2t + 1
};

// A copy to shared memory that passes by the registers: how weights stay on their way while others are multiplied.
template <int BYTES> DEVICE void copy_async(u32 to, const void* from) {
  if constexpr (BYTES == 16) asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from));
  else asm volatile("cp.async.ca.shared.global.L2::128B [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(BYTES));
}
template <typename T> __device__ T shared_load(u32 address);
template <> __device__ __forceinline__ u32 shared_load<u32>(u32 address) {
  u32 v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address));
  return v;
}
template <> __device__ __forceinline__ uint2 shared_load<uint2>(u32 address) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address));
  return v;
}
template <> __device__ __forceinline__ uint4 shared_load<uint4>(u32 address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
  return v;
}

// One warp: slices of row tiles of R weights of one shape, for up to 8 NT rows of activations. Tiles go through a ring of D slots of
// shared memory: D - 1 are on their way while one is multiplied. A lane copies and reads its own codes; scales are shared.
// What changes from tile to tile are a few addresses: instructions, not bytes, were the limit before (138 a tile, 576 bytes).
template <int F, bool FAST, int NT, int R, bool ONE>
struct Stream {
  static constexpr bool BYTES = Is<F>::affine;
  static constexpr int N = Words<F>::n;
  static constexpr int D = R == 2 || N > 5 ? 4 : 8;
  static constexpr int SLOT = N * 128 + 64;
  static constexpr int RING = D * R * SLOT;
  static constexpr int SCALE_BYTES = FAST ? (Is<F>::e8m0 ? 32 : 64) : 0;  // others are read from memory when they are used
  u32 ring, put_at, take_at;  // shared memory: of this warp; offsets of the slots to fill and to read
  const u8* code[R];          // this lane's part of the next tile
  u64 stride;                 // bytes to the tile after it
  u32 left;                   // tiles of the slice that are not on their way yet
  u32 lane;

  METHOD void start(u8* shared) {
    lane = threadIdx.x & 31;
    ring = (u32)__cvta_generic_to_shared(shared) + threadIdx.x / 32 * RING;
    put_at = take_at = left = 0;
  }
  // Points the cursor at the slice of the tiles first, first + slices, .. before `last`.
  METHOD void aim(const Packed* const w[R], u32 matrix, u32 row_tile, u32 first, u32 last, u32 slices) {
    left = first < last ? (last - first + slices - 1) / slices : 0;
    stride = (u64)slices * w[0]->tile_words * 4;
#pragma unroll
    for (int r = 0; r < R; r++) code[r] = (const u8*)tile_at(*w[r], matrix, row_tile, first);
  }
  // Starts copying the tile at the cursor, if there is one; counts in any case.
  METHOD void issue() {
    if (left) {
#pragma unroll
      for (int r = 0; r < R; r++) {
        u32 slot = ring + put_at + r * SLOT;
        constexpr int four = N / 4 * 4;
        if constexpr (four > 0) {
          const u8* from = code[r] + lane * 16;
          u32 to = slot + lane * 16;
#pragma unroll
          for (int k = 0; k < four; k += 4) copy_async<16>(to + k * 128, from + k * 128);
          if constexpr (SCALE_BYTES > 0) if (lane < SCALE_BYTES / 16) copy_async<16>(to + N * 128, from + N * 128);
        } else if constexpr (SCALE_BYTES > 0) {
          if (lane < SCALE_BYTES / 16) copy_async<16>(slot + N * 128 + lane * 16, code[r] + N * 128 + lane * 16);
        }
        if constexpr (N % 4 >= 2) copy_async<8>(slot + four * 128 + lane * 8, code[r] + four * 128 + lane * 8);
        if constexpr (N % 2 == 1) copy_async<4>(slot + (N - 1) * 128 + lane * 4, code[r] + (N - 1) * 128 + lane * 4);
        code[r] += stride;
      }
      left--;
    }
    asm volatile("cp.async.commit_group;");
    put_at = put_at + R * SLOT == RING ? 0 : put_at + R * SLOT;
  }
  METHOD void read(Codes<F>& codes, Scales<F, FAST>& scales, u32 slot, const Packed& w, const u8* scale_base, u32 j) {
    constexpr int four = N / 4 * 4;
#pragma unroll
    for (int k = 0; k < four; k += 4) {
      uint4 v = shared_load<uint4>(slot + lane * 16 + k * 128);
      codes.w[k] = v.x; codes.w[k + 1] = v.y; codes.w[k + 2] = v.z; codes.w[k + 3] = v.w;
    }
    if constexpr (N % 4 >= 2) {
      uint2 v = shared_load<uint2>(slot + lane * 8 + four * 128);
      codes.w[four] = v.x; codes.w[four + 1] = v.y;
    }
    if constexpr (N % 2 == 1) codes.w[N - 1] = shared_load<u32>(slot + lane * 4 + (N - 1) * 128);
    u32 p = slot + N * 128, g = lane / 4, t = lane % 4;
    if constexpr (!FAST) load_scales<F, FAST>(scales, w, scale_base, j, g, t);
    else if constexpr (F == NVFP4) scales.raw = shared_load<u32>(p + (g * 2 + t / 2) * 4);
    else if constexpr (Is<F>::e8m0) scales.raw = shared_load<u32>(p + g * 4);
    else if constexpr (F == FP8) { uint2 v = shared_load<uint2>(p + g * 8); scales.s[0] = __uint_as_float(v.x); scales.s[1] = __uint_as_float(v.y); }
    else scales.v = shared_load<uint2>(p + g * 8);
  }
  // Multiplies the tiles of a slice, which have been issued in this order; `refill` keeps the ring full.
  template <typename Refill>
  METHOD void run(float acc[R][NT][4], const Packed* const w[R], const u8* const scale_base[R], const Row rows[NT], u32 first, u32 last, u32 slices, Refill refill) {
    if (first >= last) return;
    u32 cols = w[0]->cols, t = lane % 4;
    bool halves = w[0]->group == 32;
    // Offsets of this lane's activations, relative to each row.
    u32 at = BYTES ? first * DIGITS_BYTES + 16 * t : first * 64 + 8 * t, step = BYTES ? slices * DIGITS_BYTES : slices * 64;
    auto columns = [&](Columns<BYTES> x[NT]) {
#pragma unroll
      for (int nt = 0; nt < NT; nt++) {
        if constexpr (BYTES && ONE) {
          // Every lane reads the one row: the columns of the product that nobody wants may hold anything.
          x[nt].high = *(const uint4*)(rows[0].about[0] + at);
          x[nt].low = *(const uint4*)(rows[0].about[0] + at + 64);
          x[nt].about[0] = *(const float4*)(rows[0].about[0] + (at - 16 * t) + 128);
        } else if constexpr (BYTES) {
          const uint4 zero = make_uint4(0, 0, 0, 0);
          x[nt].high = rows[nt].digits ? *(const uint4*)(rows[nt].digits + at) : zero;
          x[nt].low = rows[nt].digits ? *(const uint4*)(rows[nt].digits + at + 64) : zero;
#pragma unroll
          for (int k = 0; k < 2; k++) x[nt].about[k] = *(const float4*)(rows[nt].about[k] + (at - 16 * t) + 128);
        } else {
#pragma unroll
          for (int h = 0; h < 2; h++)
            x[nt].b[h] = rows[nt].twin && at + 32 * h < cols ? *(const uint4*)(rows[nt].twin + at + 32 * h) : make_uint4(0, 0, 0, 0);
        }
      }
    };
    u32 j = first;
    Columns<BYTES> x[2][NT];
    columns(x[0]);
    auto tile = [&](Columns<BYTES> now[NT], Columns<BYTES> next[NT]) {
      asm volatile("cp.async.wait_group %0;" ::"n"(D - 2));
      __syncwarp();
      u32 slot = ring + take_at;
      take_at = take_at + R * SLOT == RING ? 0 : take_at + R * SLOT;
      refill();
      if (j + slices < last) { at += step; columns(next); }
#pragma unroll
      for (int r = 0; r < R; r++) {
        Codes<F> codes;
        Scales<F, FAST> scales;
        read(codes, scales, slot + r * SLOT, *w[r], scale_base[r], j);
        Taken<F, FAST> taken;
        take<F, FAST>(taken, codes, scales);
#pragma unroll
        for (int nt = 0; nt < NT; nt++) accumulate<F, FAST, ONE>(acc[r][nt], taken, scales, now[nt], halves);
      }
      j += slices;
    };
    while (true) {
      tile(x[0], x[1]);
      if (j >= last) break;
      tile(x[1], x[0]);
      if (j >= last) break;
    }
  }
};

// Partial sums of a warp into shared memory [row 16][8 NT].
template <int NT> DEVICE void put(float* red, const float acc[NT][4], u32 lane) {
  u32 g = lane / 4, t = lane % 4;
#pragma unroll
  for (int nt = 0; nt < NT; nt++) {
    float* p = red + nt * 8 + 2 * t;
    *(float2*)(p + g * (8 * NT)) = make_float2(acc[nt][0], acc[nt][1]);
    *(float2*)(p + (g + 8) * (8 * NT)) = make_float2(acc[nt][2], acc[nt][3]);
  }
}

// Where a lane reads its rows of activations: `flat(n)` is row n of the group of rows, for n < count.
template <int F, typename Flat> DEVICE Row row_of(const MatmulArgs& a, u32 nt, u32 count, u32 matrix, Flat flat) {
  const Routing& r = a.routing;
  u32 lane = threadIdx.x % 32, n = nt * 8 + lane / 4;
  Row row = {nullptr, nullptr, {nullptr, nullptr}};
  if constexpr (Is<F>::affine) {
    u64 bytes = (u64)num_tiles(a.part[0].w) * DIGITS_BYTES;
    auto digits = [&](u32 n) {
      u32 f = flat(n);
      // Down: a part a slot. Gate and up: a row a token. Otherwise a row, or its part for this head.
      u64 at = r.ids ? (r.slots_in_x ? f : f / r.top_k) : (u64)f * a.digits_parts + (a.digits_parts > 1 ? matrix : 0);
      return a.digits + at * bytes;
    };
    if (n < count) row.digits = digits(n);
    for (u32 k = 0; k < 2; k++) { u32 m = nt * 8 + 2 * (lane % 4) + k; row.about[k] = digits(m < count ? m : 0); }
  } else if (n < count) row.twin = [&] {
    u32 f = flat(n);
    if (!r.ids) return a.x.twin + (u64)f * a.x.stride + matrix * a.x_head_stride;
    return a.x.twin + (u64)(f / r.top_k) * a.x.stride + (r.slots_in_x ? (f % r.top_k) * a.part[0].w.cols : 0);
  }();
  return row;
}

// out = x W for several weights of one format that share x; grid (blocks of row tiles, matrices).
template <int F, bool FAST, int NT, bool ONE> DEVICE void gemv_linear(const MatmulArgs& a) {
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
  Stream<F, FAST, NT, 1, ONE> stream;
  bool active = row_tile < row_tiles;
  u32 first = slice, last = active ? tiles : 0;
  if (!active) row_tile = 0;
  stream.start(ring);
  stream.aim(w, matrix, row_tile, first, last, S);
#pragma unroll
  for (int i = 0; i < stream.D - 1; i++) stream.issue();
  pdl_wait();
  Row rows[NT];
#pragma unroll
  for (int nt = 0; nt < NT; nt++) rows[nt] = row_of<F>(a, nt, a.x.rows, matrix, [](u32 n) { return n; });
  float acc[1][NT][4] = {};
  const u8* scale_base[1] = {row_tile_scales(part.w, matrix, row_tile)};
  stream.run(acc, w, scale_base, rows, first, last, S, [&] { stream.issue(); });
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
template <int F, bool FAST, int NT, bool ONE> DEVICE void gemv_gate_up(const MatmulArgs& a) {
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
  u32 first = slice, last = active ? tiles : 0;
  if (!active) row_tile = 0;
  Stream<F, FAST, NT, 2, ONE> stream;
  stream.start(ring);
  u32 expert = 0, count = a.x.rows;
  auto fill = [&] {
    stream.aim(w, expert, row_tile, first, last, S);
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
  stream.run(acc, w, scale_base, rows, first, last, S, [&] { stream.issue(); });
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
// Shared memory: the ring, then [slices][flat slots][16] results. At most 128 flat slots.
template <int F, bool FAST, int NT, bool ONE> DEVICE void gemv_down(const MatmulArgs& a) {
  extern __shared__ __align__(16) u8 ring[];
  __shared__ u16 lists[WARPS][8 * NT];
  __shared__ u16 ids[128], unique[128];
  __shared__ u32 num_unique;
  typedef Stream<F, FAST, NT, 1, ONE> S1;
  float* results = (float*)(ring + WARPS * S1::D * S1::SLOT);
  pdl_launch();
  u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const Packed* w[1] = {&a.part[0].w};
  const Routing& r = a.routing;
  u32 S = a.slices, side = WARPS / S, slice = warp % S, total = r.num_tokens * r.top_k;
  u32 first = slice, last = num_tiles(*w[0]);
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
      stream.aim(w, ids[unique[ahead]], blockIdx.x, first, last, S);
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
    stream.run(acc, w, scale_base, rows, first, last, S, issue);
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

// ---- more than 16 rows ----

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
      const u16* twin = routing.ids ? a.x.twin + (u64)(flat / routing.top_k) * a.x.stride + (routing.slots_in_x ? flat % routing.top_k * w.cols : 0)
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
  // Slice after slice, as gemv's warps add them; `tiles` past the end.
  auto after = [&](u32 j) { return j >= tiles ? tiles : j + S < tiles ? j + S : j % S + 1 < S && j % S + 1 < tiles ? j % S + 1 : tiles; };
  u32 ahead = 0;
#pragma unroll
  for (int s = 0; s < GEMM_STAGES - 1; s++) { copy(s, ahead); ahead = after(ahead); }
  fetch(0);
  for (u32 j = 0, q = 0; j < tiles; j = after(j), q++) {
    asm volatile("cp.async.wait_group %0;" ::"n"(GEMM_STAGES - 2));
    __syncthreads();
    const uint4* tile = tile_b[q % GEMM_STAGES];
    copy(q + GEMM_STAGES - 1, ahead);
    ahead = after(ahead);
    Taken<F, FAST> taken[R];
    Scales<F, FAST> used[R];
#pragma unroll
    for (int r = 0; r < R; r++) { take<F, FAST>(taken[r], codes[r], scales[r]); used[r] = scales[r]; }
    fetch(after(j));
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
      for (int r = 0; r < R; r++) accumulate<F, FAST, false>(acc[r][nt], taken[r], used[r], x, halves);
    }
    if (j + S >= tiles) {
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

// ---- plain weights ----

struct PlainArgs {
  const u8* weights;
  const float* bias;
  Mat x, out;
  Routing routing;         // offsets and sorted where ids is not null
  u64 matrix_elements;
  u32 rows, cols, x_head_stride, warps;
};
// KIND 0 f32, 1 f16, 2 bf16. `warps` warps (a power of two that depends on the columns alone) have one row of weights, eight rows of x at a time;
// their parts are added in order. Grid: (rows / (8 / warps), experts or heads).
template <int KIND> DEVICE void plain(const PlainArgs& a) {
  __shared__ float parts[8][8];
  pdl_launch();
  pdl_wait();
  u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, matrix = blockIdx.y;
  u32 row = blockIdx.x * (8 / a.warps) + warp / a.warps, share = warp % a.warps;
  bool active = row < a.rows;
  if (!active) row = 0;
  u32 begin = 0, count = a.x.rows;
  if (a.routing.ids) { begin = a.routing.offsets[matrix]; count = a.routing.offsets[matrix + 1] - begin; }
  u64 first = matrix * a.matrix_elements + (u64)row * a.cols;
  bool aligned = a.cols % 8 == 0;
  bool wide = aligned && a.x.stride % 4 == 0 && (u64)a.x.p % 16 == 0 && a.x_head_stride % 4 == 0;
  for (u32 n0 = 0; n0 < count; n0 += 8) {
    const float* x[8];
    u32 flat[8];
#pragma unroll
    for (int n = 0; n < 8; n++) {
      u32 m = n0 + n < count ? n0 + n : n0;
      flat[n] = a.routing.ids ? a.routing.sorted[begin + m] : m;
      if (a.routing.ids) {
        u32 token = flat[n] / a.routing.top_k;
        x[n] = a.x.p + (u64)token * a.x.stride + (a.routing.slots_in_x ? flat[n] % a.routing.top_k * a.cols : 0);
      } else x[n] = a.x.p + (u64)m * a.x.stride + matrix * a.x_head_stride;
    }
    u32 here = count - n0 < 8 ? count - n0 : 8;
    float acc[8] = {};
    auto element = [&](u32 c) {
      return KIND == 0 ? ((const float*)a.weights)[first + c] : KIND == 1 ? f16_to_f32(((const u16*)a.weights)[first + c]) : bf16_to_f32(((const u16*)a.weights)[first + c]);
    };
#pragma unroll 2
    for (u32 c0 = (share * 32 + lane) * 8; c0 < a.cols; c0 += a.warps * 256) {
      float v[8];
      if (aligned && KIND != 0) {
        uint4 q = *(const uint4*)((const u16*)a.weights + first + c0);
        u32 words[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
          if (KIND == 2) { v[2 * i] = __uint_as_float(words[i] << 16); v[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u); }
          else { v[2 * i] = f16_to_f32(words[i] & 0xffff); v[2 * i + 1] = f16_to_f32(words[i] >> 16); }
        }
      } else {
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = c0 + i < a.cols ? element(c0 + i) : 0.f;
      }
#pragma unroll
      for (int n = 0; n < 8; n++) {
        if (n < here) {
          if (wide) {
            float4 lo = *(const float4*)(x[n] + c0), hi = *(const float4*)(x[n] + c0 + 4);
            acc[n] = fmaf(v[0], lo.x, acc[n]); acc[n] = fmaf(v[1], lo.y, acc[n]); acc[n] = fmaf(v[2], lo.z, acc[n]); acc[n] = fmaf(v[3], lo.w, acc[n]);
            acc[n] = fmaf(v[4], hi.x, acc[n]); acc[n] = fmaf(v[5], hi.y, acc[n]); acc[n] = fmaf(v[6], hi.z, acc[n]); acc[n] = fmaf(v[7], hi.w, acc[n]);
          } else {
#pragma unroll
            for (int i = 0; i < 8; i++) if (c0 + i < a.cols) acc[n] = fmaf(v[i], x[n][c0 + i], acc[n]);
          }
        }
      }
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < 8; n++) {
      if (n < here) {
        float y = warp_sum(acc[n]);
        if (lane == 0) parts[warp][n] = y;
      }
    }
    __syncthreads();
    if (active && share == 0 && lane < here) {
      float y = 0.f;
      for (u32 k = 0; k < a.warps; k++) y += parts[warp + k][lane];
      if (a.bias) y += a.bias[(u64)matrix * a.rows + row];
      u32 mine = a.routing.ids ? a.routing.sorted[begin + n0 + lane] : n0 + lane;
      store(a.out, mine, a.routing.ids ? row : matrix * a.rows + row, y);
    }
  }
}
KERNEL __launch_bounds__(256) plain_f32(const __grid_constant__ PlainArgs a) { plain<0>(a); }
KERNEL __launch_bounds__(256) plain_f16(const __grid_constant__ PlainArgs a) { plain<1>(a); }
KERNEL __launch_bounds__(256) plain_bf16(const __grid_constant__ PlainArgs a) { plain<2>(a); }

#define KERNELS(NAME, F, FAST) \
  KERNEL __launch_bounds__(256, 3) linear0_##NAME(const __grid_constant__ MatmulArgs a) { gemv_linear<F, FAST, 1, true>(a); } \
  KERNEL __launch_bounds__(256, 3) linear1_##NAME(const __grid_constant__ MatmulArgs a) { gemv_linear<F, FAST, 1, false>(a); } \
  KERNEL __launch_bounds__(256) linear2_##NAME(const __grid_constant__ MatmulArgs a) { gemv_linear<F, FAST, 2, false>(a); } \
  KERNEL __launch_bounds__(256, 3) gate_up0_##NAME(const __grid_constant__ MatmulArgs a) { gemv_gate_up<F, FAST, 1, true>(a); } \
  KERNEL __launch_bounds__(256) gate_up1_##NAME(const __grid_constant__ MatmulArgs a) { gemv_gate_up<F, FAST, 1, false>(a); } \
  KERNEL __launch_bounds__(256) gate_up2_##NAME(const __grid_constant__ MatmulArgs a) { gemv_gate_up<F, FAST, 2, false>(a); } \
  KERNEL __launch_bounds__(256, 3) down0_##NAME(const __grid_constant__ MatmulArgs a) { gemv_down<F, FAST, 1, true>(a); } \
  KERNEL __launch_bounds__(256, 3) down1_##NAME(const __grid_constant__ MatmulArgs a) { gemv_down<F, FAST, 1, false>(a); } \
  KERNEL __launch_bounds__(256) down2_##NAME(const __grid_constant__ MatmulArgs a) { gemv_down<F, FAST, 2, false>(a); } \
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
