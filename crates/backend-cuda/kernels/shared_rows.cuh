// Rows of activations that all warps of a block multiply with, on their way through a ring in shared memory.
//
// One warp of the block copies them, some tiles of each row at a time, and does nothing else; the others say when they are done with a slot.
// What a block reads of the rows does not grow with its warps, so that row tiles of weights no longer read their rows again each, which
// was as many bytes as the weights and more; and rows are asked for long before they are multiplied.
#pragma once
#include "barriers.cuh"
#include "pipe.cuh"

// D slots of C tiles of up to ROWS rows, in the form that F wants.
template <int F, int C, int D, int ROWS> struct SharedRows {
  static constexpr u32 STEP = Form<F>::tile;
  // bfloat16: neighbouring rows in different banks. Digits are so by themselves.
  static constexpr u32 ROW = C * STEP + (Is<F>::affine ? 0 : 64), SLOT = ROWS * ROW, BYTES = D * (SLOT + 16);
  // Lanes that copy a row, 16 bytes each: at least a sector of 32 bytes. With whole lines of 128 bytes a turn copies fewer rows, and is slower.
  static constexpr u32 LANES = ROWS == 32 ? 2 : 32 / ROWS, TURNS = ROWS * LANES / 32;
  u32 ring, full, empty;  // shared memory; barriers of slots that are full, and that are free again
  u32 at, parity;         // next slot, and the parity that its barrier ends

  // By all threads. The last warp copies, `warps` before it multiply.
  METHOD void start(u8* shared, u32 warps) {
    ring = (u32)__cvta_generic_to_shared(shared);
    full = ring + D * SLOT;
    empty = full + 8 * D;
    at = 0;
    parity = threadIdx.x / 32 == warps ? 1 : 0;  // slots are free at first
    if (threadIdx.x == 0) {
#pragma unroll
      for (int d = 0; d < D; d++) {
        barrier_init(full + 8 * d, 32);
        barrier_init(empty + 8 * d, warps * WARP_ARRIVALS);
      }
    }
    __syncthreads();
  }
  METHOD void next() {
    at++;
    if (at == D) { at = 0; parity ^= 1; }
  }
  // Which row a lane copies, turn after turn.
  static METHOD u32 row_of(u32 turn) { return (threadIdx.x & 31) / LANES + turn * (32 / LANES); }
  // Copies `n` tiles of `rows` rows; this lane's start at `from`. Not in bulk: a bulk copy takes 36 ns of its multiprocessor's copy engine
  // however short it is, which with 32 rows was the whole time of a product.
  METHOD void put(const u8* const from[TURNS], u32 rows, u32 n) {
    u32 piece = (threadIdx.x & 31) % LANES * 16, to = ring + at * SLOT + piece;
    barrier_wait(empty + 8 * at, parity);
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
      u32 row = row_of(turn);
      if (row >= rows) continue;
      if (n == C) {
#pragma unroll
        for (u32 b = 0; b < C * STEP; b += LANES * 16)
          if (C * STEP % (LANES * 16) == 0 || b + piece < C * STEP) copy_async<16>(to + row * ROW + b, from[turn] + piece + b);
      } else
        for (u32 b = 0; b + piece < n * STEP; b += LANES * 16) copy_async<16>(to + row * ROW + b, from[turn] + piece + b);
    }
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(full + 8 * at) : "memory");
    next();
  }
  // Waits for the next slot.
  METHOD u32 wait() {
    barrier_wait(full + 8 * at, parity);
    return ring + at * SLOT;
  }
  // The warp is done with it.
  METHOD void release() {
    warp_arrives(empty + 8 * at);
    next();
  }
};
