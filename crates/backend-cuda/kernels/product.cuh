// What all matrix products share: arguments, fragments, the ring of tiles. One row of activations: decode.cu; more: matmul.cu.
#pragma once
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
  u32 x_head_stride;      // columns between the inputs of two matrices of a weight (heads), or of two slots of a token
  Mat x;                  // with a twin, for formats that are multiplied as bfloat16
  const u8* digits;       // x as digits, for affine formats: a part of a row (head, slot of an expert) after another
  u32 digits_parts;       // parts of a row
  u32 num_experts;        // prompt.cu: of `part`'s matrices
  Routing routing;
  Activation activation;
  Mat weights, plus;      // of the weighted sum over experts
};

#define WARPS 8

// First tile of a slice: slices are neighbouring tiles.
DEVICE u32 slice_start(u32 slice, u32 slices, u32 tiles) { return slice * tiles / slices; }

// c += a b for bytes: a 16x32 unsigned codes, b 32x8 signed digits.
DEVICE void mma_bytes(int c[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// Integer sums start from the bits of 3 * 2^22, so that they are floats once finished: 3 * 2^22 + sum, exact below 2^22.
#define BIAS_BITS 0x4b400000
#define BIAS 12582912.f
// 128 high + low of two such sums, rounded once: what stands between the two steps is a multiple of 128 below 2^29, which is a float.
DEVICE float join_digits(int high, int low) { return fmaf(__int_as_float(high), 128.f, -129.f * BIAS) + __int_as_float(low); }

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
    for (int h = 0; h < 2; h++) {
      // Those of both rows are the halves of a register, first times 2^-120.
      u32 s = (h ? sc.raw >> 4 : sc.raw << 4) & 0x07f007f0u;
      s = fma_bf16x2(s, splat(1.329227995784916e36f /* 2^120 */), 0x80008000u);
      s = fma_bf16x2(s, splat(1.2676506002282294e30f /* 2^100 */), 0x80008000u);
      // In these words the halves are operands of the multiplications to come; a permutation of bytes would be an instruction each.
      asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; mov.b32 %0, {l, l}; mov.b32 %1, {h, h}; }" : "=r"(scale[h][0]), "=r"(scale[h][1]) : "r"(s));
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
template <int F, bool FAST> DEVICE void take_apart(Taken<F, FAST>& to, const Codes<F>& c, const Scales<F, FAST>& sc) {
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

// acc += tile x (8 rows of activations).
template <int F, bool FAST> DEVICE void accumulate(float acc[4], const Taken<F, FAST>& w, const Scales<F, FAST>& sc, const Columns<Is<F>::affine>& x, bool halves) {
  if constexpr (Is<F>::affine) {
    const u32 high[4] = {x.high.x, x.high.y, x.high.z, x.high.w}, low[4] = {x.low.x, x.low.y, x.low.z, x.low.w};
    auto add = [&](const int ch[4], const int cl[4], const float s[2], const float b[2], int which) {
#pragma unroll
      for (int k = 0; k < 4; k++) {
        const float4& about = x.about[k & 1];
        float sum = which == 0 ? about.w : which == 1 ? about.y : about.z;
        float c = join_digits(ch[k], cl[k]);
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
        float s0 = e8m0_to_f32(sc.raw >> (8 * h) & 0xff), s1 = e8m0_to_f32(sc.raw >> (16 + 8 * h) & 0xff);
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

// A lane's codes and scales of a tile in shared memory.
template <int F> DEVICE void read_codes(Codes<F>& codes, u32 tile, u32 lane) {
  constexpr int N = Words<F>::n, four = N / 4 * 4;
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
}
template <int F> DEVICE void read_scales(Scales<F, true>& scales, u32 p, u32 lane) {
  u32 g = lane / 4, t = lane % 4;
  if constexpr (F == NVFP4) scales.raw = shared_load<u32>(p + (g * 2 + t / 2) * 4);
  else if constexpr (Is<F>::e8m0) scales.raw = shared_load<u32>(p + g * 4);
  else if constexpr (F == FP8) { uint2 v = shared_load<uint2>(p + g * 8); scales.s[0] = __uint_as_float(v.x); scales.s[1] = __uint_as_float(v.y); }
  else scales.v = shared_load<uint2>(p + g * 8);
}

// The tiles of one warp: slices of row tiles of R weights of one shape, on their way through a ring of D slots of shared memory: D - 1
// are copied while one is multiplied. A lane copies and reads its own codes; scales are shared.
// What changes from tile to tile are a few addresses: instructions, not bytes, were the limit before (138 a tile, 576 bytes).
template <int F, bool FAST, int R>
struct Ring {
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
  // Points the cursor at the tiles from `first` to before `last`.
  METHOD void aim(const Packed* const w[R], u32 matrix, u32 row_tile, u32 first, u32 last) {
    left = first < last ? last - first : 0;
    stride = (u64)w[0]->tile_words * 4;
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
    read_codes<F>(codes, slot, lane);
    if constexpr (FAST) read_scales<F>(scales, slot + N * 128, lane);
    else load_scales<F, FAST>(scales, w, scale_base, j, lane / 4, lane % 4);
  }
  // Waits for the oldest tile and gives its slot.
  METHOD u32 next() {
    asm volatile("cp.async.wait_group %0;" ::"n"(D - 2) : "memory");
    __syncwarp();
    u32 slot = ring + take_at;
    take_at = take_at + R * SLOT == RING ? 0 : take_at + R * SLOT;
    return slot;
  }
};

// A ring whose tiles are multiplied with up to 8 NT rows of activations.
template <int F, bool FAST, int NT, int R>
struct Stream : Ring<F, FAST, R> {
  typedef Ring<F, FAST, R> Base;
  using Base::lane;
  static constexpr bool BYTES = Is<F>::affine;
  // Multiplies the tiles of a slice, which have been issued in this order, with `count` rows; `refill` keeps the ring full.
  template <typename Refill>
  METHOD void run(float acc[R][NT][4], const Packed* const w[R], const u8* const scale_base[R], const Row rows[NT], u32 count, u32 first, u32 last, Refill refill) {
    if (first >= last) return;
    u32 cols = w[0]->cols, t = lane % 4;
    bool halves = w[0]->group == 32;
    // Offsets of this lane's activations, relative to each row.
    u32 at = BYTES ? first * DIGITS_BYTES + 16 * t : first * 64 + 8 * t, step = BYTES ? DIGITS_BYTES : 64;
    auto columns = [&](Columns<BYTES> x[NT]) {
#pragma unroll
      for (int nt = 0; nt < NT; nt++) {
        if (NT > 2 && nt * 8 >= count) continue;
        if constexpr (BYTES) {
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
    auto tile = [&](Columns<BYTES> now[NT], Columns<BYTES>* next) {
      u32 slot = Base::next();
      refill();
      if (next && j + 1 < last) { at += step; columns(next); }
#pragma unroll
      for (int r = 0; r < R; r++) {
        Codes<F> codes;
        Scales<F, FAST> scales;
        Base::read(codes, scales, slot + r * Base::SLOT, *w[r], scale_base[r], j);
        Taken<F, FAST> taken;
        take_apart<F, FAST>(taken, codes, scales);
#pragma unroll
        for (int nt = 0; nt < NT; nt++)
          if (NT <= 2 || nt * 8 < count) accumulate<F, FAST>(acc[r][nt], taken, scales, now[nt], halves);
      }
      j++;
    };
    if constexpr (NT <= 2) {
      // The next columns are on their way while these are multiplied.
      Columns<BYTES> x[2][NT];
      columns(x[0]);
      while (true) {
        tile(x[0], x[1]);
        if (j >= last) break;
        tile(x[1], x[0]);
        if (j >= last) break;
      }
    } else {
      // No registers are left for that.
      Columns<BYTES> x[NT];
      for (; j < last; at += step) {
        columns(x);
        tile(x, nullptr);
      }
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
    return a.x.twin + (u64)(f / r.top_k) * a.x.stride + (r.slots_in_x ? (f % r.top_k) * a.x_head_stride : 0);
  }();
  return row;
}

