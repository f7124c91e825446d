// The ring of tiles that kernels for few rows of activations stream weights through: bulk copies to shared memory, a warp by itself.
#pragma once
#include "product.cuh"

// c = a b + BIAS, exactly; `start` false adds to c.
DEVICE void mma_bytes_biased(int d[4], const u32 a[4], u32 b0, u32 b1, const int c[4]) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}

// The row in the form of F, 64 columns: bytes.
template <int F> struct Form { static constexpr u32 tile = Is<F>::affine ? DIGITS_BYTES : 128; };

// The tiles of one warp on their way through shared memory: D slots of C neighbouring tiles of R matrices, each one bulk copy (TMA) a
// matrix with a barrier of its own. A lane asks for 2 KB with two instructions; copies of 16 bytes a lane and their addresses were a third
// of all instructions.
template <int F, int R, int TILES = 0, int SLOTS = 0> struct Pipe {
  static constexpr int N = Words<F>::n;
  static constexpr int TILE = N * 128 + (Is<F>::e8m0 ? 32 : 64);
  static constexpr int C = TILES ? TILES : R == 2 ? (N > 5 ? 2 : 3) : N > 5 ? 2 : 4;
  static constexpr int D = SLOTS ? SLOTS : R == 2 ? (N > 5 ? 3 : 2) : N > 5 ? 4 : 3;
  static constexpr int SLOT = R * C * TILE;
  static constexpr int RING = D * SLOT + 64;  // and the barriers
  u32 ring, bars, lane;
  u32 put, take, phases;  // next slots; a bit a slot: the parity that its next copy ends
  const u8* code[R];
  u32 left;               // tiles of the unit that are not on their way yet

  METHOD void start(u8* shared) {
    lane = threadIdx.x & 31;
    ring = (u32)__cvta_generic_to_shared(shared) + warp_index() * RING;
    bars = ring + D * SLOT;
    put = take = phases = left = 0;
#if __CUDA_ARCH__ >= 900
    if (lane == 0) {
#pragma unroll
      for (int d = 0; d < D; d++) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(bars + 8 * d) : "memory");
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncwarp();
#endif
  }
  // Nothing is on its way any more: the ring's memory may become something else, once all warps are here.
  METHOD void stop() {
#if __CUDA_ARCH__ >= 900
    if (lane == 0)
#pragma unroll
      for (int d = 0; d < D; d++) asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(bars + 8 * d) : "memory");
#endif
  }
  // Points the cursor at `count` tiles from `first` on, of a row tile of each matrix.
  METHOD void aim(const Packed* const w[R], const u32 matrix[R], const u32 row_tile[R], u32 first, u32 count) {
    left = count;
#pragma unroll
    for (int r = 0; r < R; r++)
      code[r] = (const u8*)(w[r]->codes + matrix[r] * w[r]->codes_stride) + (row_tile[r] * num_tiles(*w[r]) + first) * (u64)TILE;
  }
  // The same row tile of all matrices.
  METHOD void aim(const Packed* const w[R], u32 matrix, u32 row_tile, u32 first, u32 count) {
    u32 matrices[R], row_tiles[R];
#pragma unroll
    for (int r = 0; r < R; r++) { matrices[r] = matrix; row_tiles[r] = row_tile; }
    aim(w, matrices, row_tiles, first, count);
  }
  // Neighbouring row tiles of one matrix, of which `row_tile` is the first; past its end the last one again.
  METHOD void aim(const Packed& w, u32 matrix, u32 row_tile, u32 first, u32 count) {
    const Packed* all[R];
    u32 matrices[R], row_tiles[R], end = (w.rows + 15) / 16;
#pragma unroll
    for (int r = 0; r < R; r++) { all[r] = &w; matrices[r] = matrix; row_tiles[r] = row_tile + r < end ? row_tile + r : end - 1; }
    aim(all, matrices, row_tiles, first, count);
  }
  // Starts copying the next tiles at the cursor, if there are any; `more` bytes are copied by somebody else and end with them.
  METHOD void issue(u32 more = 0) {
    u32 n = left < C ? left : C, slot = ring + put * SLOT;
    if (n) {
#if __CUDA_ARCH__ >= 900
      if (lane == 0) {
        u32 bar = bars + 8 * put;
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(n * (R * TILE) + more) : "memory");
#pragma unroll
        for (int r = 0; r < R; r++)
          asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
              ::"r"(slot + r * (C * TILE)), "l"(code[r]), "r"(n * TILE), "r"(bar) : "memory");
      }
#else
#pragma unroll
      for (int r = 0; r < R; r++)
        for (u32 at = lane * 16; at < n * TILE; at += 512) copy_async<16>(slot + r * (C * TILE) + at, code[r] + at);
#endif
#pragma unroll
      for (int r = 0; r < R; r++) code[r] += n * TILE;
      left -= n;
      put = put + 1 == D ? 0 : put + 1;
    }
#if __CUDA_ARCH__ < 900
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
  }
  // Waits for the oldest slot.
  METHOD void wait() {
#if __CUDA_ARCH__ >= 900
    u32 bar = bars + 8 * take, parity = phases >> take & 1, done = 0;
    while (!done)
      asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }" : "=r"(done) : "r"(bar), "r"(parity) : "memory");
    phases ^= 1u << take;
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(D - 1) : "memory");
    __syncwarp();
#endif
  }
  METHOD void read_codes(Codes<F>& codes, u32 tile) {
    constexpr int four = N / 4 * 4;
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
  METHOD void read(Codes<F>& codes, Scales<F, true>& scales, u32 tile) {
    read_codes(codes, tile);
    u32 p = tile + N * 128, g = lane / 4, t = lane % 4;
    if constexpr (F == NVFP4) scales.raw = shared_load<u32>(p + (g * 2 + t / 2) * 4);
    else if constexpr (Is<F>::e8m0) scales.raw = shared_load<u32>(p + g * 4);
    else if constexpr (F == FP8) { uint2 v = shared_load<uint2>(p + g * 8); scales.s[0] = __uint_as_float(v.x); scales.s[1] = __uint_as_float(v.y); }
    else scales.v = shared_load<uint2>(p + g * 8);
  }
  // Sums of a lane. Affine formats: rows g and g + 8 of matrix t % R, as every pair of columns of a product holds the same digits. Others:
  // those of all matrices as the tensor cores have them, rows g and g + 8 in the first and third of four where t is 0.
  static constexpr int SUMS = Is<F>::affine ? 2 : 4 * R;
  // acc += a tile of each matrix times 64 columns of the row, which start at `x` (this lane's part of them).
  // WHOLE: the row has all of these columns.
  template <bool WHOLE> METHOD void tile(float acc[SUMS], u32 at, const u8* x, u32 column, u32 cols) {
    u32 g = lane / 4, t = lane % 4;
    if constexpr (Is<F>::affine) {
      // Even columns of the product are the high digits, odd ones the low ones.
      uint4 b = *(const uint4*)(x + 16 * t + (g & 1) * 64);
      const int bias[4] = {BIAS_BITS, BIAS_BITS, BIAS_BITS, BIAS_BITS};
      int d[R][4];
#pragma unroll
      for (int r = 0; r < R; r++) {
        Codes<F> codes;
        read_codes(codes, at + r * (C * TILE));
        u32 a0[4] = {code_bytes<F>(codes, 0), code_bytes<F>(codes, 4), code_bytes<F>(codes, 1), code_bytes<F>(codes, 5)};
        u32 a1[4] = {code_bytes<F>(codes, 2), code_bytes<F>(codes, 6), code_bytes<F>(codes, 3), code_bytes<F>(codes, 7)};
        int c[4];
        mma_bytes_biased(c, a0, b.x, b.y, bias);
        mma_bytes_biased(d[r], a1, b.z, b.w, c);
      }
      // A lane makes floats of one matrix: those of all matrices are in all lanes.
      u32 mine = R == 2 ? t & 1 : 0;
      float4 about = *(const float4*)(x + 128);
      uint2 v = shared_load<uint2>(at + mine * (C * TILE) + N * 128 + g * 8);
      int e[4];
#pragma unroll
      for (int k = 0; k < 4; k++) e[k] = mine ? d[R - 1][k] : d[0][k];
      float s0 = __uint_as_float(v.x << 16), o0 = __uint_as_float(v.x & 0xffff0000u);
      float s1 = __uint_as_float(v.y << 16), o1 = __uint_as_float(v.y & 0xffff0000u);
      acc[0] = fmaf(o0, about.w, fmaf(s0 * about.x, join_digits(e[0], e[1]), acc[0]));
      acc[1] = fmaf(o1, about.w, fmaf(s1 * about.x, join_digits(e[2], e[3]), acc[1]));
    } else {
      Columns<false> columns;
#pragma unroll
      for (int h = 0; h < 2; h++) columns.b[h] = WHOLE || column + 32 * h + 8 * t < cols ? *(const uint4*)(x + 16 * t + 64 * h) : make_uint4(0, 0, 0, 0);
#pragma unroll
      for (int r = 0; r < R; r++) {
        Codes<F> codes;
        Scales<F, true> scales;
        read(codes, scales, at + r * (C * TILE));
        Taken<F, true> taken;
        take_apart<F, true>(taken, codes, scales);
        accumulate<F, true>(acc + 4 * r, taken, scales, columns, false);
      }
    }
  }
  // The sums of a lane into [R][16].
  METHOD void put_sums(float* red, const float acc[SUMS]) {
    u32 g = lane / 4, t = lane % 4;
    if constexpr (Is<F>::affine) {
      if (t < R) { red[t * 16 + g] = acc[0]; red[t * 16 + g + 8] = acc[1]; }
    } else if (t == 0) {
#pragma unroll
      for (int r = 0; r < R; r++) { red[r * 16 + g] = acc[4 * r]; red[r * 16 + g + 8] = acc[4 * r + 2]; }
    }
  }
  // Multiplies `count` tiles from `first` on, which have been issued in this order; `refill` keeps the ring full.
  template <typename Refill>
  METHOD void unit(float acc[SUMS], const u8* x, u32 first, u32 count, u32 cols, Refill refill) {
    x += first * Form<F>::tile;
    u32 column = first * 64;
    for (u32 j = 0; j < count; j += C) {
      wait();
      u32 slot = ring + take * SLOT;
      take = take + 1 == D ? 0 : take + 1;
      // The check of every tile's columns and its zeros were 6 of 108 instructions of a tile in NVFP4.
      if (count - j >= C && (Is<F>::affine || column + C * 64 <= cols)) {
#pragma unroll
        for (int i = 0; i < C; i++) tile<true>(acc, slot + i * TILE, x + i * Form<F>::tile, column + i * 64, cols);
      } else {
        for (u32 i = 0; i < count - j && i < C; i++) tile<false>(acc, slot + i * TILE, x + i * Form<F>::tile, column + i * 64, cols);
      }
      x += C * Form<F>::tile;
      column += C * 64;
      __syncwarp();
      refill();
    }
  }
};

// Threads of a team of `slices` warps wait for each other.
DEVICE void team_barrier(u32 team, u32 slices) {
  if (slices == 1) __syncwarp();
  else asm volatile("bar.sync %0, %1;" ::"r"(1 + team), "r"(slices * 32) : "memory");
}
