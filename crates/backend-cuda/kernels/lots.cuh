// Two to 32 rows of activations times tiles of weights that are in shared memory: what the kernels of few.cu and lines.cu share.
#pragma once
#include "pipe.cuh"

// One of two types.
template <bool, typename, typename T> struct Either { typedef T type; };
template <typename T, typename Other> struct Either<true, T, Other> { typedef T type; };

// out = x W for several weights of one format, or a product a head.
struct DenseArgs {
  Part part[4];
  u32 first_unit[5];  // of each part; a unit is as many row tiles as a kernel takes at a time
  u32 num_parts, slices, rows;
  const u8* x;        // in the form of the format
  u64 x_bytes;        // of a row
  u32 matrices, x_matrix_bytes;  // heads of the only part, and bytes between the inputs of two of them; else 1
  Mat residual;       // the result is added to it too (p null: none)
};

// Rows of activations that are multiplied at a time, and sums that a lane has of them.
template <int F> struct Lot {
  static constexpr int rows = Is<F>::affine ? 4 : 8;
  static constexpr int sums = Is<F>::affine ? 2 : 4;
};

// A lane's part of 64 columns of a lot.
template <bool BYTES> struct Loaded { Columns<false> columns; };
template <> struct Loaded<true> { uint4 x; float scale, sum; };
// Lot q of the tile at `at`, whose rows are `row` bytes apart.
template <int F> DEVICE void load_lot(Loaded<Is<F>::affine>& to, u32 at, u32 row, int q) {
  u32 lane = threadIdx.x & 31, g = lane / 4, t = lane % 4;
  at += q * Lot<F>::rows * row;
  if constexpr (Is<F>::affine) {
    to.x = shared_load<uint4>(at + g / 2 * row + 16 * t + (g & 1) * 64);
    uint4 v = shared_load<uint4>(at + t * row + 128);
    to.scale = __uint_as_float(v.x);
    to.sum = __uint_as_float(v.w);
  } else {
    to.columns.b[0] = shared_load<uint4>(at + g * row + 16 * t);
    to.columns.b[1] = shared_load<uint4>(at + g * row + 16 * t + 64);
  }
}

// The product of a tile with a lot, as integers, and what makes floats of it.
struct Product { int d[4]; float s[2], b[2]; };
template <int F> DEVICE void multiply(Product& p, const Taken<F, true>& w, const Loaded<true>& x) {
  const int bias[4] = {BIAS_BITS, BIAS_BITS, BIAS_BITS, BIAS_BITS};
  int c[4];
  const u32* o = w.o;
  const u32 a0[4] = {o[0], o[4], o[1], o[5]}, a1[4] = {o[2], o[6], o[3], o[7]};
  mma_bytes_biased(c, a0, x.x.x, x.x.y, bias);
  mma_bytes_biased(p.d, a1, x.x.z, x.x.w, c);
#pragma unroll
  for (int k = 0; k < 2; k++) { p.s[k] = w.s[0][k]; p.b[k] = w.b[0][k]; }
}
DEVICE void add_product(float acc[2], const Product& p, const Loaded<true>& x) {
#pragma unroll
  for (int k = 0; k < 2; k++) {
    acc[k] = fmaf(p.b[k], x.sum, fmaf(p.s[k] * x.scale, join_digits(p.d[2 * k], p.d[2 * k + 1]), acc[k]));
  }
}

// acc += N tiles of the warp's R row tiles in the slot at `slot`, times Q lots of rows; load(to, i, q) reads lot q of tile i.
template <int F, int R, int Q, int N, typename P, typename Load> DEVICE void multiply_tiles(P& pipe, float acc[R][Q][Lot<F>::sums], u32 slot, Load load) {
  auto take = [&](Taken<F, true> taken[R], Scales<F, true> scales[R], int i) {
#pragma unroll
    for (int r = 0; r < R; r++) {
      Codes<F> codes;
      pipe.read(codes, scales[r], slot + (r * P::C + i) * P::TILE);
      take_apart<F, true>(taken[r], codes, scales[r]);
    }
  };
  Taken<F, true> w[R];
  Scales<F, true> scales[R];
  if constexpr (Is<F>::affine) {
    // One product is on its way through the tensor cores while the one before becomes floats: one after another they take three times as long.
    Product products[2][R];
    Loaded<true> loaded[2];
#pragma unroll
    for (int step = 0; step <= N * Q; step++) {
      if (step < N * Q) {
        if (step % Q == 0) take(w, scales, step / Q);
        load(loaded[step % 2], step / Q, step % Q);
#pragma unroll
        for (int r = 0; r < R; r++) multiply<F>(products[step % 2][r], w[r], loaded[step % 2]);
      }
      if (step > 0)
#pragma unroll
        for (int r = 0; r < R; r++) add_product(acc[r][(step - 1) % Q], products[(step - 1) % 2][r], loaded[(step - 1) % 2]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) {
      take(w, scales, i);
#pragma unroll
      for (int q = 0; q < Q; q++) {
        Loaded<false> loaded;
        load(loaded, i, q);
#pragma unroll
        for (int r = 0; r < R; r++) accumulate<F, true>(acc[r][q], w[r], scales[r], loaded.columns, false);
      }
    }
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
template <int F, int R, int Q> DEVICE void add_slice(float sums[R][Q][Lot<F>::sums], const float acc[R][Q][Lot<F>::sums]) {
#pragma unroll
  for (int r = 0; r < R; r++)
#pragma unroll
    for (int q = 0; q < Q; q++)
#pragma unroll
      for (int k = 0; k < Lot<F>::sums; k++) sums[r][q][k] += acc[r][q][k];
}

