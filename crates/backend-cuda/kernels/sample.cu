// A draw of a token from a row of logits: `Sample` of crates/ops, bit for bit. One block a row. Weights are integers, so that threads may
// add them in any order; the row stays in the second-level cache, from which every pass reads it again.
#include "common.cuh"

#define THREADS 1024
#define WARPS (THREADS / 32)
#define BINS 2048
// Bins of the first round of `select` are so much of a logit wide, from the largest on: the many small logits fall into many of them.
#define BINS_A_LOGIT 64.f

struct SampleArgs {
  Mat logits;
  const u32* draws;  // temperature, top-k, top-p in parts of 2^32 or 0, min-p, low and high random bits
  u32* out;          // token, certainty
  u32 draws_stride, out_stride;
};

struct Scratch {
  u32 low[BINS], high[BINS];
  u64 sums[WARPS];
  u64 before;  // what the bins before `bin` add up to
  u32 bin;
};

// What is kept is up to here in the order of logits descending, tokens ascending.
struct Limit { u32 key, id; };

struct Row {
  const float* x;
  u32 cols;
  bool wide;
  float max, temperature;
};

// The total order of `f32::total_cmp` for numbers.
DEVICE u32 order_key(float x) {
  u32 b = __float_as_uint(x);
  return b ^ ((b >> 31) ? 0xffffffffu : 0x80000000u);
}
DEVICE float of_key(u32 key) { return __uint_as_float(key ^ ((key >> 31) ? 0x80000000u : 0xffffffffu)); }

DEVICE float exp_of_negative(float x) {
  if (x != x || x < -80.f) return 0.f;
  const float magic = 12582912.f;
  float n = __fsub_rn(__fadd_rn(__fmul_rn(x, 1.44269504088896340736f), magic), magic);
  float r = __fsub_rn(__fsub_rn(x, __fmul_rn(n, 0.6933594f)), __fmul_rn(n, -2.1219444e-4f));
  float p = 1.9875691e-4f;
  p = __fadd_rn(__fmul_rn(p, r), 1.3981999e-3f);
  p = __fadd_rn(__fmul_rn(p, r), 8.333452e-3f);
  p = __fadd_rn(__fmul_rn(p, r), 4.1665796e-2f);
  p = __fadd_rn(__fmul_rn(p, r), 1.6666665e-1f);
  p = __fadd_rn(__fmul_rn(p, r), 0.5f);
  float y = __fadd_rn(__fadd_rn(__fmul_rn(p, __fmul_rn(r, r)), r), 1.f);
  return __fmul_rn(y, __int_as_float(((int)n + 127) << 23));
}
DEVICE float weight(const Row& r, float x) {
  return x == r.max ? 1.f : exp_of_negative(__fdiv_rn(__fsub_rn(x, r.max), r.temperature));
}
DEVICE u64 units(float weight) { return __float2ull_rz(__fmul_rn(weight, 17592186044416.f)); }

DEVICE bool within(Limit limit, float x, u32 id) {
  u32 key = order_key(x);
  return key > limit.key || (key == limit.key && id <= limit.id);
}

DEVICE u64 warp_sum(u64 x) {
  for (int d = 16; d > 0; d >>= 1) x += __shfl_xor_sync(0xffffffffu, x, d);
  return x;
}
DEVICE u64 warp_scan(u64 x) {
  for (int d = 1; d < 32; d <<= 1) {
    u64 y = __shfl_up_sync(0xffffffffu, x, d);
    if ((int)(threadIdx.x % 32) >= d) x += y;
  }
  return x;
}

// Tokens of a warp where the block shares [lo, hi): whole steps of the warp.
DEVICE u32 share(u32 lo, u32 hi) { return ((hi - lo + WARPS * 128 - 1) / (WARPS * 128)) * 128; }

// f(logit, token) for the tokens of this warp's share, in their order within a thread.
template <typename F> DEVICE void each(const Row& r, u32 lo, u32 hi, F f) {
  u32 size = share(lo, hi), begin = lo + threadIdx.x / 32 * size, end = begin + size < hi ? begin + size : hi;
#pragma unroll 4
  for (u32 c = begin + threadIdx.x % 32 * 4; c < end; c += 128) {
    float v[4];
    if (r.wide && c + 4 <= end) {
      float4 q = *(const float4*)(r.x + c);
      v[0] = q.x; v[1] = q.y; v[2] = q.z; v[3] = q.w;
      for (int i = 0; i < 4; i++) f(v[i], c + i);
    } else {
      for (u32 i = 0; i < 4 && c + i < end; i++) f(r.x[c + i], c + i);
    }
  }
}

// The sum of f(logit, token) over the block; every thread gets it.
template <typename F> DEVICE u64 sum_of(const Row& r, Scratch& s, F f) {
  u64 sum = 0;
  each(r, 0, r.cols, [&](float x, u32 id) { sum += f(x, id); });
  sum = warp_sum(sum);
  __syncthreads();
  if (threadIdx.x % 32 == 0) s.sums[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = 0;
  for (int w = 0; w < WARPS; w++) sum += s.sums[w];
  return sum;
}

// The first token at which the sum of f over tokens up to it is above `target`.
template <typename F> DEVICE u32 crossing(const Row& r, Scratch& s, u64 target, F f) {
  u32 lo = 0, hi = r.cols;
  while (hi - lo > 128) {
    u64 sum = 0;
    each(r, lo, hi, [&](float x, u32 id) { sum += f(x, id); });
    sum = warp_sum(sum);
    __syncthreads();
    if (threadIdx.x % 32 == 0) s.sums[threadIdx.x / 32] = sum;
    __syncthreads();
    u32 size = share(lo, hi), w = 0;
    for (; w + 1 < WARPS && s.sums[w] <= target; w++) target -= s.sums[w];
    lo = lo + w * size < hi ? lo + w * size : hi - 1;
    hi = lo + size < hi ? lo + size : hi;
  }
  // Every warp does the same.
  u64 value[4], sum = 0;
  u32 c = lo + threadIdx.x % 32 * 4;
#pragma unroll
  for (int i = 0; i < 4; i++) sum += value[i] = c + i < hi ? f(r.x[c + i], c + i) : 0;
  u64 before = warp_scan(sum) - sum, at = before;
  u32 id = c;
  for (int i = 0; i < 3 && at + value[i] <= target; i++) { at += value[i]; id++; }
  u32 lane = __ffs(__ballot_sync(0xffffffffu, before + sum > target));
  return __shfl_sync(0xffffffffu, id, lane ? lane - 1 : 31);
}

DEVICE void add(Scratch& s, u32 bin, u64 value) {
  u32 low = (u32)value, old = atomicAdd(s.low + bin, low), high = (u32)(value >> 32) + (old + low < old);
  if (high) atomicAdd(s.high + bin, high);
}

// The first bin at which the sum of the bins up to it reaches `target`, which is at least 1 and at most the sum of all.
DEVICE u32 find_bin(Scratch& s, u64 target, u64& before) {
  __syncthreads();
  if (threadIdx.x < 32) {
    u32 first = threadIdx.x * (BINS / 32);
    u64 sum = 0;
    for (u32 b = first; b < first + BINS / 32; b++) sum += (u64)s.high[b] << 32 | s.low[b];
    u64 up_to = warp_scan(sum);
    u32 lane = __ffs(__ballot_sync(0xffffffffu, up_to >= target)) - 1;
    if (threadIdx.x == lane) {
      u64 at = up_to - sum;
      u32 b = first;
      for (; b + 1 < first + BINS / 32; b++) {
        u64 here = (u64)s.high[b] << 32 | s.low[b];
        if (at + here >= target) break;
        at += here;
      }
      s.bin = b;
      s.before = at;
    }
  }
  __syncthreads();
  before = s.before;
  return s.bin;
}

// How far the order of logits must be followed until f adds up to `target`, at most the sum of all. Tokens with the same logit have the
// same value or none.
template <typename F> DEVICE Limit select(const Row& r, Scratch& s, u64 target, F f) {
  auto linear = [&](float x) {
    u32 bin = __float2uint_rz(__fmul_rn(__fsub_rn(r.max, x), BINS_A_LOGIT));
    return bin < BINS ? bin : BINS - 1;
  };
  u32 group = 0, key = 0, mask = 0;
  u64 before;
  for (int round = 0; round < 4; round++) {
    __syncthreads();
    for (u32 b = threadIdx.x; b < BINS; b += THREADS) s.low[b] = s.high[b] = 0;
    __syncthreads();
    u32 shift = round == 1 ? 21 : round == 2 ? 10 : 0, digits = round == 3 ? 1023 : 2047;
    each(r, 0, r.cols, [&](float x, u32 id) {
      u32 k = order_key(x);
      bool here = round == 0 || (linear(x) == group && (k & mask) == key);
      u64 value = here ? f(x, id) : 0;
      if (value) add(s, round == 0 ? linear(x) : digits - (k >> shift & digits), value);
    });
    u32 bin = find_bin(s, target, before);
    target -= before;
    if (round == 0) {
      group = bin;
    } else {
      key |= (digits - bin) << shift;
      mask |= digits << shift;
    }
  }
  // Of those with this very logit, as many as are needed: all, where they are not enough without the last.
  u64 ties = (u64)s.high[s.bin] << 32 | s.low[s.bin];
  if (ties - f(of_key(key), 0) < target) return Limit{key, 0xffffffffu};
  u32 id = crossing(r, s, target - 1, [&](float y, u32 i) { return order_key(y) == key ? f(y, i) : 0ull; });
  return Limit{key, id};
}

KERNEL __launch_bounds__(THREADS) sample(const __grid_constant__ SampleArgs a) {
  __shared__ Scratch s;
  pdl_launch();
  pdl_wait();
  const u32* draw = a.draws + (u64)blockIdx.x * a.draws_stride;
  u32* out = a.out + (u64)blockIdx.x * a.out_stride;
  Row r;
  r.x = a.logits.p + (u64)blockIdx.x * a.logits.stride;
  r.cols = a.logits.cols;
  r.wide = (u64)r.x % 16 == 0;
  r.temperature = __uint_as_float(draw[0]);
  // NaN above everything, both zeros equal, the first of equals: as `argmax`.
  u64 best = 0;
  each(r, 0, r.cols, [&](float x, u32 id) {
    u64 key = (u64)(x != x ? 0xffffffffu : order_key(x == 0.f ? 0.f : x)) << 32 | (0xffffffffu - id);
    best = key > best ? key : best;
  });
  for (int d = 16; d > 0; d >>= 1) { u64 y = __shfl_xor_sync(0xffffffffu, best, d); best = y > best ? y : best; }
  if (threadIdx.x % 32 == 0) s.sums[threadIdx.x / 32] = best;
  __syncthreads();
  for (int w = 0; w < WARPS; w++) best = s.sums[w] > best ? s.sums[w] : best;
  u32 likeliest = 0xffffffffu - (u32)best;
  r.max = r.x[likeliest];
  if (r.max != r.max || r.temperature == 0.f || r.max == -INFINITY) {
    if (threadIdx.x == 0) {
      out[0] = likeliest;
      out[1] = r.max != r.max ? 0x7fc00000u : __float_as_uint(1.f);
    }
    return;
  }
  float min_p = __uint_as_float(draw[3]);
  Limit of_k = {0, 0xffffffffu}, of_p = {0, 0xffffffffu};
  if (draw[1] > 0 && draw[1] < r.cols) of_k = select(r, s, draw[1], [&](float, u32) { return 1ull; });
  auto kept = [&](float x, u32 id) {
    float w = weight(r, x);
    return w >= min_p && within(of_k, x, id) && within(of_p, x, id) ? units(w) : 0ull;
  };
  u64 left = sum_of(r, s, kept);
  if (draw[2] > 0) {
    u64 total = min_p > 0.f ? sum_of(r, s, [&](float x, u32 id) { return within(of_k, x, id) ? units(weight(r, x)) : 0ull; }) : left;
    u64 wanted = __umul64hi(total, (u64)draw[2] << 32);
    wanted = wanted > 1 ? wanted : 1;
    if (wanted < left) {
      of_p = select(r, s, wanted, kept);
      left = sum_of(r, s, kept);
    }
  }
  u64 unit = __umul64hi((u64)draw[5] << 32 | draw[4], left);
  u32 token = crossing(r, s, unit, kept);
  if (threadIdx.x == 0) {
    out[0] = token;
    out[1] = __float_as_uint(__double2float_rn(__ddiv_rn(17592186044416.0, __ull2double_rn(left))));
  }
}
