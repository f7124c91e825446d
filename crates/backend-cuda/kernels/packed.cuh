// The packed layout of quantized weights, and how its codes become bfloat16.
//
// A matrix [rows, cols] is cut into tiles of 16 rows x 64 columns, stored row tile by row tile, left to right, so that a
// warp that works on 16 rows reads one stream. Within a tile lane `l` of a warp holds what the tensor cores want from it
// (mma.m16n8k16, PTX ISA "Matrix Fragments for mma.m16n8k16"): with g = l / 4 and t = l % 4 the 16 codes of row g and the 16 of
// row g + 8 in columns 32 h + 8 t + 4 q + i, for h, q in 0..2 and i in 0..4. Products s = 2 h + q take the four columns
// of that (h, q). So activations are read 8 consecutive columns at a time, and a group of 32 columns is two products.
//
// Affine codes are multiplied as bytes (mma.m16n8k32, u8 times s8): word o = 4 upper + 2 h + q holds the codes of row g (upper 0) or g + 8 in
// its four columns. Stored so that few instructions take them apart:
//
//   AFFINE4  4 words: o = 2k in the low, 2k + 1 in the high nibbles of word k
//   AFFINE2  2 words: o = 4k + m at bit 2m of each byte of word k
//   AFFINE3  3 words: o = 2k at bits 0-2, 2k + 1 at bits 3-5 (k < 3); o = 6 from bits 6, 7 of word 0 and 6 of word 1; o = 7 from the rest
//   AFFINE5  AFFINE4, then 1 word: bit o of each byte is the fifth bit
//   AFFINE6  AFFINE4, then AFFINE2 with the upper two bits
//   AFFINE8  8 words
//
// The other formats are multiplied as bfloat16 (mma.m16n8k16). A pair p = 4 h + 2 q + i / 2 is two neighbouring codes; they become the
// two halves of a register, the first code of a pair in the low half of a word, the second at the same place of the high half:
//
//   NVFP4, MXFP4  4 words: row g pairs 0-3, 4-7, row g+8 pairs 0-3, 4-7; pair p % 4 as `place_fp4` puts it
//   MXFP8, FP8    8 words: row g pairs (0,1) (2,3) .., row g+8; the even pair in the low bytes, the odd one in the high bytes
//
// Scales: `affine` [g][s_g, b_g, s_g+8, b_g+8] a group; `e4m3` (NVFP4) [g][t / 2] a u32 {row g h 0, row g h 1, row g+8 h 0, row g+8 h 1};
// `e8m0` [g] the same u32; `block` (FP8) [g][s_g, s_g+8]. They stand right behind the codes of their tile where a tile has its own
// (`inline_scales`: all but affine formats with other scales than bfloat16 or other groups than 64), so that a warp reads one stream; otherwise in an
// array beside, row tile by row tile.
//
// Scales are applied to sums of 32 or 64 products (NVFP4: to the codes, where the product of a 2-bit and a 4-bit significand is exact),
// so weights are not rounded at all. Activations: for bytes, 15-bit fixed point with a scale a 64 columns, as two signed bytes
// (`Digits`); otherwise bfloat16.
#pragma once
#include "common.cuh"

enum Format { AFFINE2, AFFINE3, AFFINE4, AFFINE5, AFFINE6, AFFINE8, NVFP4, MXFP4, MXFP8, FP8 };

// Words of codes a lane has in a tile.
template <int F> struct Words { static constexpr int n = F == AFFINE2 ? 2 : F == AFFINE3 ? 3 : F == AFFINE5 ? 5 : F == AFFINE6 ? 6 : (F == AFFINE8 || F == MXFP8 || F == FP8) ? 8 : 4; };
template <int F> struct Is {
  static constexpr bool affine = F <= AFFINE8;
  static constexpr bool fp4 = F == NVFP4 || F == MXFP4;
  static constexpr bool e4m3 = F == MXFP8 || F == FP8;
  static constexpr bool e8m0 = F == MXFP4 || F == MXFP8;
};

struct Packed {
  const u32* codes;
  const u8* scales;
  const float* global_scales;  // [count], or null for 1
  const float* bias;           // [count * rows], or null
  u64 codes_stride;            // words between two matrices
  u64 scales_stride;           // bytes between two matrices
  u32 rows, cols;
  u32 group;                   // affine: columns that share a scale
  u32 scale_f32;               // affine: scales are f32, not 16-bit
  u32 scale_f16;               // affine: 16-bit scales are binary16, not bfloat16
  u32 inline_scales;           // scales stand behind the codes of each tile
  u32 tile_words;              // words between two tiles
  u32 pad;
};
DEVICE u32 num_tiles(const Packed& w) { return (w.cols + 63) / 64; }
DEVICE u32 num_groups(const Packed& w) { return (w.cols + w.group - 1) / w.group; }
DEVICE u64 scale_tile_bytes(const Packed& w) {  // of one row tile, where scales stand beside
  return (u64)num_groups(w) * (w.scale_f32 ? 128 : 64);
}
DEVICE const u32* tile_at(const Packed& w, u32 matrix, u32 row_tile, u32 j) {
  return w.codes + matrix * w.codes_stride + ((u64)row_tile * num_tiles(w) + j) * w.tile_words;
}
// The scales of tile j where they stand behind its codes.
template <int F> DEVICE const u8* tile_scales(const Packed& w, u32 matrix, u32 row_tile, u32 j) {
  return (const u8*)(tile_at(w, matrix, row_tile, j) + Words<F>::n * 32);
}
// The scales of a row tile, for affine formats with any groups.
DEVICE const u8* row_tile_scales(const Packed& w, u32 matrix, u32 row_tile) {
  return w.scales + matrix * w.scales_stride + row_tile * scale_tile_bytes(w);
}

// The codes of one lane in one tile. Word order as above; loads are as wide as alignment allows.
template <int F> struct Codes { u32 w[Words<F>::n]; };
template <int F> DEVICE Codes<F> load_codes(const u32* tile, u32 lane) {
  Codes<F> c;
  constexpr int n = Words<F>::n;
  // Words are stored in runs of 4, 2 and 1 a lane.
  int at = 0;
  const u32* p = tile;
#pragma unroll
  for (; at + 4 <= n; at += 4) {
    uint4 v = load_stream((const uint4*)p + lane);
    c.w[at] = v.x; c.w[at + 1] = v.y; c.w[at + 2] = v.z; c.w[at + 3] = v.w;
    p += 128;
  }
  if constexpr (n % 4 >= 2) {
    uint2 v = load_stream((const uint2*)p + lane);
    c.w[at] = v.x; c.w[at + 1] = v.y;
    at += 2;
    p += 64;
  }
  if constexpr (n % 2 == 1) c.w[at] = load_stream(p + lane);
  return c;
}
// Where word `at` of a lane lies in a tile.
DEVICE u32 word_at(int n, int at, u32 lane) {
  int four = n / 4 * 4;
  if (at < four) return (at / 4) * 128 + lane * 4 + at % 4;
  if (n % 4 >= 2 && at < four + 2) return four * 32 + lane * 2 + (at - four);
  return (n / 2 * 2) * 32 + lane;
}

// bfloat16x2 constants.
DEVICE u32 splat(float x) { u32 b = __float_as_uint(x) >> 16; return b | b << 16; }

// Word o of affine codes: four bytes.
template <int F> DEVICE u32 code_bytes(const Codes<F>& c, int o) {
  if constexpr (F == AFFINE2) return (c.w[o / 4] >> (2 * (o % 4))) & 0x03030303u;
  else if constexpr (F == AFFINE3) {
    if (o < 6) return (c.w[o / 2] >> (3 * (o % 2))) & 0x07070707u;
    if (o == 6) return ((c.w[0] >> 6) & 0x03030303u) | ((c.w[1] >> 4) & 0x04040404u);
    return ((c.w[1] >> 7) & 0x01010101u) | ((c.w[2] >> 5) & 0x06060606u);
  } else if constexpr (F == AFFINE8) return c.w[o];
  else {
    u32 low = (c.w[o / 2] >> (4 * (o % 2))) & 0x0f0f0f0fu;
    if constexpr (F == AFFINE5) low |= (o < 4 ? c.w[4] << (4 - o) : c.w[4] >> (o - 4)) & 0x10101010u;
    if constexpr (F == AFFINE6) { int bit = 2 * (o % 4); low |= (bit < 4 ? c.w[4 + o / 4] << (4 - bit) : c.w[4 + o / 4] >> (bit - 4)) & 0x30303030u; }
    return low;
  }
}

// FP4 codes are bfloat16 times 2^-126 with the sign at bit 15 and the magnitude at bits 6-8 of a half. Four pairs share a word so that
// few instructions bring them there (8 for the four pairs, where codes in order took 15 and bound the kernels): pair j < 3 is the word rotated to the
// right by 3 j. What these three leave free is {0, 1, 3, 4} of each half, which no rotation brings to {6, 7, 8, 15}, but one multiplication does: by
// 2^2 for bit 4, 2^7 for bits 0 and 1, 2^12 for bit 3, whose products share no bit.
#define FP4_BITS 0x81c081c0u
DEVICE constexpr u32 rotate_right(u32 x, int bits) { return bits ? x >> bits | x << (32 - bits) : x; }
DEVICE constexpr u32 fp4_pair(u32 w, int j) {
  if (j < 3) return rotate_right(w, 3 * j) & FP4_BITS;
  return (w & 0x001b001bu) * 0x1084u & FP4_BITS;
}
// The bits of code `c` in its word, as code `half` of pair j.
DEVICE constexpr u32 place_fp4(u32 c, int j, int half) {
  u32 bits = j < 3 ? (c & 8) << 12 | (c & 7) << 6 : (c & 8) | (c & 1) << 4 | (c >> 1 & 3);
  bits <<= 16 * half;
  return j < 3 ? rotate_right(bits, (32 - 3 * j) % 32) : bits;
}
// Every code is found again in a word whose other bits are those of other codes.
DEVICE constexpr bool fp4_is_found() {
  for (int j = 0; j < 4; j++)
    for (int half = 0; half < 2; half++)
      for (u32 c = 0; c < 16; c++) {
        u32 w = 0;
        for (int k = 0; k < 8; k++) w |= place_fp4(k == 2 * j + half ? c : ~c & 15, k / 2, k % 2);
        if ((fp4_pair(w, j) >> (16 * half) & 0xffff) != ((c & 8) << 12 | (c & 7) << 6)) return false;
      }
  return true;
}
static_assert(fp4_is_found(), "the layout of FP4 codes and their decoding do not belong together");

// Pair `p` of row g (upper 0) or g + 8 (upper 1) as bfloat16x2: FP4 times 2^-126, E4M3 as it is.
template <int F> DEVICE u32 decode_pair(const Codes<F>& c, int upper, int p) {
  if constexpr (Is<F>::fp4) return fp4_pair(c.w[upper * 2 + p / 4], p % 4);
  else {
    u32 w = c.w[upper * 4 + p / 2];
    u32 y = p % 2 ? w : w << 8;
    return fma_bf16x2((y & 0x80008000u) | ((y >> 4) & 0x07f007f0u), splat(1.329227995784916e36f /* 2^120 */), 0);
  }
}

// The code in column `c` of a tile, for row g (upper 0) or g + 8 of lane `lane`'s two. For lookups of single rows.
template <int F> DEVICE u32 code_in(const u32* tile, u32 lane, int upper, u32 c) {
  constexpr int n = Words<F>::n;
  int h = c / 32 % 2, q = c / 4 % 2;
  auto word = [&](int at) { return tile[word_at(n, at, lane)]; };
  if constexpr (Is<F>::affine) {
    int o = 4 * upper + 2 * h + q, shift = 8 * (c % 4);
    auto byte = [&](int at) { return word(at) >> shift & 255; };
    if constexpr (F == AFFINE2) return byte(o / 4) >> (2 * (o % 4)) & 3;
    else if constexpr (F == AFFINE3) {
      if (o < 6) return byte(o / 2) >> (3 * (o % 2)) & 7;
      return o == 6 ? byte(0) >> 6 | (byte(1) >> 6 & 1) << 2 : byte(1) >> 7 | (byte(2) >> 6) << 1;
    } else if constexpr (F == AFFINE8) return byte(o);
    else {
      u32 low = byte(o / 2) >> (4 * (o % 2)) & 15;
      if constexpr (F == AFFINE5) low |= (byte(4) >> o & 1) << 4;
      if constexpr (F == AFFINE6) low |= (byte(4 + o / 4) >> (2 * (o % 4)) & 3) << 4;
      return low;
    }
  } else {
    int p = 4 * h + c % 8 / 2, half = c % 2;
    if constexpr (n == 8) return word(upper * 4 + p / 2) >> (8 * (p % 2) + 16 * half) & 255;
    else {
      u32 bits = fp4_pair(word(upper * 2 + p / 4), p % 4) >> (16 * half);
      return (bits >> 12 & 8) | (bits >> 6 & 7);
    }
  }
}

DEVICE float e4m3_to_f32(u32 b) { return __uint_as_float((b & 0x7f) << 20 | (b & 0x80) << 24) * 1.329227995784916e36f; }
DEVICE float e8m0_to_f32(u32 e) {
  u32 bits;
  asm("max.u32 %0, %1, %2;" : "=r"(bits) : "r"(e << 23), "r"(0x00400000u));
  return __uint_as_float(bits);
}
DEVICE float e2m1_to_f32(u32 c) {
  u32 m = c & 7;
  float v = m < 2 ? 0.5f * (float)m : __uint_as_float(((m >> 1) + 126) << 23 | (m & 1) << 22);
  return c & 8 ? -v : v;
}

// Scale and offset of the affine group that column `col` is in, for row `row` of its tile.
DEVICE void affine_scale(const Packed& w, const u8* scales, u32 group, u32 g, float s[2], float b[2]) {
  if (w.scale_f32) {
    float4 v = *((const float4*)scales + group * 8 + g);
    s[0] = v.x; b[0] = v.y; s[1] = v.z; b[1] = v.w;
  } else {
    uint2 v = load_stream((const uint2*)scales + group * 8 + g);
    if (w.scale_f16) {
      s[0] = f16_to_f32(v.x & 0xffff); b[0] = f16_to_f32(v.x >> 16);
      s[1] = f16_to_f32(v.y & 0xffff); b[1] = f16_to_f32(v.y >> 16);
    } else {
      s[0] = __uint_as_float(v.x << 16); b[0] = __uint_as_float(v.x & 0xffff0000u);
      s[1] = __uint_as_float(v.y << 16); b[1] = __uint_as_float(v.y & 0xffff0000u);
    }
  }
}

// Activations as digits: for 64 columns the high digits, the low digits, and {scale, sum of the first 32, of the last 32, of all}.
// x = scale * (128 high + low), |high| <= 127, -64 <= low <= 63. Byte 16 t + 8 h + i of either is column 32 h + 8 t + i. Sums are of x.
#define DIGITS_BYTES 144
