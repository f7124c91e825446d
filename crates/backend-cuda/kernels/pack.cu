// From the canonical layout (docs/formats.md) to the packed one, on the device: the host copies the checkpoint's bytes as they
// are. And single rows back, for embeddings.
#include "row.cuh"

struct PackArgs {
  Packed to;               // of one matrix
  const u8* codes;         // canonical: rows of little-endian bit streams
  const u8* scales;
  const u8* offsets;
  u64 code_row_bytes, scale_row_bytes;
  u32 first_block_row, block_rows, block_cols, pad;
};

DEVICE u32 canonical_code(const u8* row, u32 col, u32 bits) {
  u32 bit = col * bits, byte = bit >> 3;
  u32 v = row[byte];
  if ((bit & 7) + bits > 8) v |= (u32)row[byte + 1] << 8;
  return (v >> (bit & 7)) & ((1u << bits) - 1);
}

template <int F> DEVICE void pack_matrix(const PackArgs& a) {
  constexpr int n = Words<F>::n;
  constexpr u32 bits = F == AFFINE2 ? 2 : F == AFFINE3 ? 3 : F == AFFINE5 ? 5 : F == AFFINE6 ? 6 : n == 8 ? 8 : 4;
  u32 tiles = num_tiles(a.to), row_tiles = (a.to.rows + 15) / 16;
  u32 lane = threadIdx.x & 31, g = lane / 4, t = lane % 4;
  u64 warps = (u64)gridDim.x * blockDim.x / 32;
  for (u64 tile = ((u64)blockIdx.x * blockDim.x + threadIdx.x) / 32; tile < (u64)row_tiles * tiles; tile += warps) {
    u32 i = tile / tiles, j = tile % tiles;
    u32 w[n];
    for (int k = 0; k < n; k++) w[k] = 0;
    for (int upper = 0; upper < 2; upper++) {
      u32 row = i * 16 + upper * 8 + g;
      const u8* source = a.codes + (u64)row * a.code_row_bytes;
      for (int e = 0; e < 16; e++) {
        u32 col = j * 64 + 32 * (e / 8) + 8 * t + e % 8;
        u32 c = row < a.to.rows && col < a.to.cols ? canonical_code(source, col, bits) : 0;
        if constexpr (Is<F>::affine) {
          int o = 4 * upper + e / 4, b = 8 * (e % 4);
          if constexpr (F == AFFINE2) w[o / 4] |= c << (2 * (o % 4) + b);
          else if constexpr (F == AFFINE3) {
            if (o < 6) w[o / 2] |= c << (3 * (o % 2) + b);
            else if (o == 6) { w[0] |= (c & 3) << (6 + b); w[1] |= (c >> 2) << (6 + b); }
            else { w[1] |= (c & 1) << (7 + b); w[2] |= (c >> 1) << (6 + b); }
          } else if constexpr (F == AFFINE8) w[o] |= c << b;
          else {
            w[o / 2] |= (c & 15) << (4 * (o % 2) + b);
            if constexpr (F == AFFINE5) w[4] |= (c >> 4) << (o + b);
            if constexpr (F == AFFINE6) w[4 + o / 4] |= (c >> 4) << (2 * (o % 4) + b);
          }
        } else {
          int p = e / 2, half = 16 * (e % 2);
          if constexpr (n == 8) w[upper * 4 + p / 2] |= c << (8 * (p % 2) + half);
          else w[upper * 2 + p / 4] |= place_fp4(c, p % 4, e % 2);
        }
      }
    }
    u32* out = (u32*)tile_at(a.to, 0, i, j);
    for (int k = 0; k < n; k++) out[word_at(n, k, lane)] = w[k];
    // Scales: a lane with t = 0 (NVFP4: even t) writes those of its two rows.
    u8* scales = (u8*)tile_scales<F>(a.to, 0, i, j);
    u32 r0 = i * 16 + g, r1 = r0 + 8;
    bool in0 = r0 < a.to.rows, in1 = r1 < a.to.rows;
    auto byte = [&](u32 row, bool in, u32 group, u32 count) -> u32 { return in && group < count ? a.scales[(u64)row * a.scale_row_bytes + group] : 0; };
    if constexpr (F == NVFP4) {
      if (t % 2 == 0) {
        u32 count = (a.to.cols + 15) / 16, first = j * 4 + t / 2;
        ((u32*)scales)[g * 2 + t / 2] =
            byte(r0, in0, first, count) | byte(r0, in0, first + 2, count) << 8 | byte(r1, in1, first, count) << 16 | byte(r1, in1, first + 2, count) << 24;
      }
    } else if constexpr (Is<F>::e8m0) {
      if (t == 0) {
        u32 count = (a.to.cols + 31) / 32, first = j * 2;
        ((u32*)scales)[g] =
            byte(r0, in0, first, count) | byte(r0, in0, first + 1, count) << 8 | byte(r1, in1, first, count) << 16 | byte(r1, in1, first + 1, count) << 24;
      }
    } else if constexpr (F == FP8) {
      if (t == 0) {
        u32 block = j * 64 / a.block_cols;
        auto scale = [&](u32 row, bool in) { return in ? *(const float*)(a.scales + (u64)((a.first_block_row + row) / a.block_rows) * a.scale_row_bytes + block * 4) : 0.f; };
        ((float2*)scales)[g] = make_float2(scale(r0, in0), scale(r1, in1));
      }
    } else {
      u32 per_tile = a.to.group < 64 ? 64 / a.to.group : 1;
      if (t == 0 && (a.to.group <= 64 || j * 64 % a.to.group == 0)) {
        for (u32 k = 0; k < per_tile; k++) {
          u32 group = j * 64 / a.to.group + k;
          if (group >= num_groups(a.to)) break;
          // Beside the codes groups are counted along the row; behind a tile's codes there is its one.
          u8* base = a.to.inline_scales ? scales : (u8*)row_tile_scales(a.to, 0, i) + group * (a.to.scale_f32 ? 128 : 64);
          if (a.to.scale_f32) {
            auto f = [&](const u8* p, u32 row, bool in) { return in ? *(const float*)(p + (u64)row * a.scale_row_bytes + group * 4) : 0.f; };
            ((float4*)base)[g] = make_float4(f(a.scales, r0, in0), f(a.offsets, r0, in0), f(a.scales, r1, in1), f(a.offsets, r1, in1));
          } else {
            auto f = [&](const u8* p, u32 row, bool in) -> u32 { return in ? *(const u16*)(p + (u64)row * a.scale_row_bytes + group * 2) : 0; };
            ((uint2*)base)[g] = make_uint2(f(a.scales, r0, in0) | f(a.offsets, r0, in0) << 16, f(a.scales, r1, in1) | f(a.offsets, r1, in1) << 16);
          }
        }
      }
    }
  }
}

// Activations as digits (packed.cuh). A thread has eight columns; grid (tiles of all parts of a row / 32, rows).
struct DigitsArgs { Mat x; u8* out; u32 cols, part_stride, parts, pad; };
KERNEL __launch_bounds__(256) write_digits(const __grid_constant__ DigitsArgs a) {
  pdl_launch();
  pdl_wait();
  u32 tiles = (a.cols + 63) / 64, i = blockIdx.x * 32 + threadIdx.x / 8, part = i / tiles, j = i % tiles;
  bool inside = part < a.parts;
  const float* x = a.x.p + (u64)blockIdx.y * a.x.stride + (inside ? part : 0) * a.part_stride;
  float v[8];
  load8(v, x, j * 64 + threadIdx.x % 8 * 8, a.cols, is_wide(x, a.cols));
  digits8(v, inside ? a.out + (((u64)blockIdx.y * a.parts + part) * tiles + j) * DIGITS_BYTES : nullptr);
}

// Activations as bfloat16, each part from a multiple of 16 bytes on, zeros behind its last column. Eight columns a thread; grid
// (eights of all parts of a row / 256, rows).
KERNEL __launch_bounds__(256) write_padded(const __grid_constant__ DigitsArgs a) {
  pdl_launch();
  pdl_wait();
  u32 eights = (a.cols + 7) / 8, i = blockIdx.x * 256 + threadIdx.x, part = i / eights, c = i % eights * 8;
  if (part >= a.parts) return;
  const float* x = a.x.p + (u64)blockIdx.y * a.x.stride + part * a.part_stride;
  float v[8];
  load8(v, x, c, a.cols, is_wide(x, a.cols));
  ((uint4*)a.out)[((u64)blockIdx.y * a.parts + part) * eights + c / 8] = pack8(v);
}

// One row of a packed matrix as floats. Grid (rows, blocks of a row).
struct EmbedArgs { Packed table; const u32* token_ids; Mat out; };
template <int F> DEVICE void embed_row(const EmbedArgs& a) {
  pdl_launch();
  pdl_wait();
  const Packed& w = a.table;
  u32 token = a.token_ids[blockIdx.x];
  u32 i = token / 16, r = token % 16, g = r % 8;
  int upper = r / 8;
  float global = w.global_scales ? w.global_scales[0] : 1.f;
  for (u32 c = blockIdx.y * blockDim.x + threadIdx.x; c < w.cols; c += gridDim.y * blockDim.x) {
    u32 j = c / 64, h = c % 64 / 32, t = c % 32 / 8;
    const u32* tile = tile_at(w, 0, i, j);
    const u8* scales = tile_scales<F>(w, 0, i, j);
    u32 code = code_in<F>(tile, g * 4 + t, upper, c % 64);
    float v;
    if constexpr (F == NVFP4) v = e2m1_to_f32(code) * e4m3_to_f32(((const u32*)scales)[g * 2 + t / 2] >> (16 * upper + 8 * h) & 255);
    else if constexpr (F == MXFP4) v = e2m1_to_f32(code) * e8m0_to_f32(((const u32*)scales)[g] >> (16 * upper + 8 * h) & 255);
    else if constexpr (F == MXFP8) v = e4m3_to_f32(code) * e8m0_to_f32(((const u32*)scales)[g] >> (16 * upper + 8 * h) & 255);
    else if constexpr (F == FP8) v = e4m3_to_f32(code) * ((const float*)scales)[g * 2 + upper];
    else {
      float s[2], b[2];
      affine_scale(w, w.inline_scales ? scales : row_tile_scales(w, 0, i), w.inline_scales ? 0 : c / w.group, g, s, b);
      v = fmaf((float)code, s[upper], b[upper]);
    }
    store(a.out, blockIdx.x, c, v * global);
  }
}

// A row of plain numbers. kind: 0 f32, 1 f16, 2 bf16.
struct EmbedPlainArgs { const u8* table; const u32* token_ids; Mat out; u32 cols, kind; };
KERNEL embed_plain(const __grid_constant__ EmbedPlainArgs a) {
  pdl_launch();
  pdl_wait();
  u64 first = (u64)a.token_ids[blockIdx.x] * a.cols;
  for (u32 c = blockIdx.y * blockDim.x + threadIdx.x; c < a.cols; c += gridDim.y * blockDim.x) {
    float v = a.kind == 0 ? ((const float*)a.table)[first + c] : a.kind == 1 ? f16_to_f32(((const u16*)a.table)[first + c]) : bf16_to_f32(((const u16*)a.table)[first + c]);
    store(a.out, blockIdx.x, c, v);
  }
}

#define FOR_FORMAT(NAME, F) \
  KERNEL pack_##NAME(const __grid_constant__ PackArgs a) { pack_matrix<F>(a); } \
  KERNEL embed_##NAME(const __grid_constant__ EmbedArgs a) { embed_row<F>(a); }
FOR_FORMAT(affine2, AFFINE2)
FOR_FORMAT(affine3, AFFINE3)
FOR_FORMAT(affine4, AFFINE4)
FOR_FORMAT(affine5, AFFINE5)
FOR_FORMAT(affine6, AFFINE6)
FOR_FORMAT(affine8, AFFINE8)
FOR_FORMAT(nvfp4, NVFP4)
FOR_FORMAT(mxfp4, MXFP4)
FOR_FORMAT(mxfp8, MXFP8)
FOR_FORMAT(fp8, FP8)
