// Times the kernels of a prompt one by one, and compares their bits with those of the kernels for few rows or of the kernels before. It loads CUBINs with the driver
// (`xtask/kernels/nvrtc_check.py --write FOLDER sm_90a FILES`, unpacked), so that variants of a kernel are compared without building Moellon:
//
//     g++ -O2 -std=c++17 bench/prompt_kernels.cpp -o prompt_kernels -lcuda
//     ./prompt_kernels attend attention.cubin prompt_attention.cubin VARIANT.cubin ..   # latent attention against attend_mla and attend_join
//     ./prompt_kernels products matmul.cubin prompt.cubin VARIANT.cubin ..              # prompt_* against gemm_*
//     ./prompt_kernels index attention.cubin VARIANT.cubin ..                           # scores against double precision, the choice against the first file's
//
// Outputs are filled with what is no number before; times are medians of events around a launch.
#include <cuda.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
#define OK(x) do { CUresult e_ = (x); if (e_) { const char* s_; cuGetErrorString(e_, &s_); printf("line %d: %s\n", __LINE__, s_); exit(1); } } while (0)

// The arguments of the kernels (attend.cuh, prompt_attention.cu, attention.cu, product.cuh, prompt.cu).
struct Mat { float* p; u16* twin; u32 rows, cols, stride, pad; };
struct Paging { const u32 *positions, *sequences, *block_table; u32 max_blocks, block_size; };
struct AttendArgs {
  Mat q, q_rope, out;
  const void* cache;
  float* partial;
  const float* sinks;
  const u32 *index_ids, *index_counts;
  Paging paging;
  u32 index_stride, num_heads, heads_per_block, heads_per_key, q_dim, q_rope_stride, q_rope_dim, cache_width, cache_bf16, key_first, key_step;
  u32 value_first, value_step, value_dim, values_are_keys, window, max_splits;
  float scale;
};
struct JoinArgs { AttendArgs attend; u8* digits; };
struct PromptArgs { AttendArgs attend; u32 num_tokens, pad; };
struct IndexScoreArgs { Mat q, weights, scores; const void* cache; Paging paging; u32 num_heads, head_dim, cache_bf16, block_tokens; float scale; u32 num_tokens; };
struct IndexTopkArgs { Mat scores; const u32* positions; u32 *ids, *counts; u32 ids_stride, k; };
struct Packed {
  const u32* codes;
  const u8* scales;
  const float *global_scales, *bias;
  u64 codes_stride, scales_stride;
  u32 rows, cols, group, scale_f32, scale_f16, inline_scales, tile_words, pad;
};
struct Routing { const u32* ids; u32 ids_stride, num_tokens, top_k, slots_in_x; const u32 *offsets, *sorted; };
struct Part { Packed w; Mat out; };
struct Activation { u32 kind; float alpha, limit; u32 pad; };
struct MatmulArgs {
  Part part[4];
  u32 first_block[5], num_parts, slices, x_head_stride;
  Mat x;
  const u8* digits;
  u32 digits_parts, num_experts;
  Routing routing;
  Activation activation;
  Mat weights, plus;
};
struct BlockArgs { Routing routing; Mat x; const u8* digits; u8* out; u32 rows, tiles, parts, experts, cols, head_stride; };

static u64 state = 1;
static u32 random_word() {
  state ^= state << 13; state ^= state >> 7; state ^= state << 17;
  return state >> 16;
}
static float uniform() { return (float)(random_word() & 0xffffff) / 8388608.f - 1.f; }
static float normal() { return uniform() + uniform() + uniform(); }
static u16 to_bf16(float x) { u32 b; memcpy(&b, &x, 4); return (u16)((b + 0x7fff + ((b >> 16) & 1)) >> 16); }
static float from_bf16(u16 x) { u32 b = (u32)x << 16; float f; memcpy(&f, &b, 4); return f; }
static std::vector<float> normals(u64 n) { std::vector<float> v(n); for (auto& x : v) x = normal(); return v; }
static std::vector<u16> halves(u64 n) { std::vector<u16> v(n); for (auto& x : v) x = to_bf16(normal()); return v; }

static std::vector<CUdeviceptr> allocated;
template <typename T> T* make(u64 n) {
  CUdeviceptr p;
  OK(cuMemAlloc(&p, n * sizeof(T)));
  OK(cuMemsetD8(p, 0xff, n * sizeof(T)));
  allocated.push_back(p);
  return (T*)p;
}
template <typename T> T* up(const std::vector<T>& v) { T* p = make<T>(v.size()); OK(cuMemcpyHtoD((CUdeviceptr)p, v.data(), v.size() * sizeof(T))); return p; }
template <typename T> std::vector<T> down(const T* p, u64 n) { std::vector<T> v(n); OK(cuMemcpyDtoH(v.data(), (CUdeviceptr)p, n * sizeof(T))); return v; }
static void free_all() { for (auto p : allocated) OK(cuMemFree(p)); allocated.clear(); }
static CUfunction kernel(const char* file, const char* name, u32 shared = 0) {
  CUmodule module;
  CUfunction function;
  OK(cuModuleLoad(&module, file));
  if (cuModuleGetFunction(&function, module, name)) { printf("%s has no %s\n", file, name); exit(1); }
  if (shared) OK(cuFuncSetAttribute(function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared));
  return function;
}
template <typename A> void launch(CUfunction f, u32 x, u32 y, u32 z, u32 threads, u32 shared, A& args) { void* p[] = {&args}; OK(cuLaunchKernel(f, x, y, z, threads, 1, 1, shared, 0, p, 0)); }
template <typename F> float timed(F f, int times = 7) {
  CUevent from, to;
  OK(cuEventCreate(&from, 0)); OK(cuEventCreate(&to, 0));
  f();
  std::vector<float> us;
  for (int i = 0; i < times; i++) {
    OK(cuEventRecord(from, 0)); f(); OK(cuEventRecord(to, 0)); OK(cuEventSynchronize(to));
    float ms;
    OK(cuEventElapsedTime(&ms, from, to));
    us.push_back(ms * 1000);
  }
  std::sort(us.begin(), us.end());
  return us[times / 2];
}
static const char* compare(const std::vector<float>& a, const std::vector<float>& b) { return memcmp(a.data(), b.data(), a.size() * 4) ? "DIFFER" : "the same bits"; }

// A paged cache of one sequence.
static const u32 CONTEXT = 4096, BLOCK = 64;
static std::vector<u32> block_table() {
  std::vector<u32> table(CONTEXT / BLOCK);
  for (u32 i = 0; i < table.size(); i++) table[i] = i;
  for (u32 i = table.size() - 1; i > 0; i--) std::swap(table[i], table[random_word() % (i + 1)]);
  return table;
}
static Paging paging(u32 rows, u32 first, const std::vector<u32>& table, std::vector<u32>& positions) {
  positions.resize(rows);
  for (u32 t = 0; t < rows; t++) positions[t] = first + t;
  return {up(positions), up(std::vector<u32>(rows, 0)), up(table), CONTEXT / BLOCK, BLOCK};
}

static void attend(const char* file, const std::vector<std::string>& variants, const char* name, u32 rows, u32 first, bool chosen) {
  const u32 HEADS = 64, SHARED = 230400;
  auto table = block_table();
  std::vector<u32> positions, ids, counts(rows);
  u32 most = std::min(first + rows, chosen ? 2048u : CONTEXT);
  auto q = normals((u64)rows * HEADS * 512), rope = normals((u64)rows * HEADS * 64);
  float spread = 1.f;
  for (u64 i = 0; i < q.size(); i++) { if (i % 512 == 0) spread = 0.3f + 3.f * fabsf(uniform()); q[i] *= spread; }
  AttendArgs a = {};
  a.paging = paging(rows, first, table, positions);
  for (u32 t = 0; t < rows; t++) counts[t] = chosen ? std::min(positions[t] + 1, 2048u) : positions[t] + 1;
  if (chosen) {
    ids.resize((u64)rows * 2048);
    for (u32 t = 0; t < rows; t++)
      for (u32 i = 0, at = 0; i <= positions[t]; i++)
        if (at < counts[t] && random_word() % (positions[t] + 1 - i) < counts[t] - at) ids[(u64)t * 2048 + at++] = i;
    a.index_ids = up(ids); a.index_counts = up(counts); a.index_stride = 2048;
  }
  float *expected = make<float>((u64)rows * HEADS * 512), *found = make<float>((u64)rows * HEADS * 512);
  a.q = {up(q), 0, rows, HEADS * 512, HEADS * 512, 0};
  a.q_rope = {up(rope), 0, rows, HEADS * 64, HEADS * 64, 0};
  a.out = {expected, 0, rows, HEADS * 512, HEADS * 512, 0};
  a.cache = up(halves((u64)CONTEXT * 576));
  a.num_heads = HEADS; a.heads_per_block = 8; a.heads_per_key = HEADS; a.q_dim = 512; a.q_rope_stride = 64; a.q_rope_dim = 64;
  a.cache_width = 576; a.cache_bf16 = 1; a.value_dim = 512; a.values_are_keys = 1; a.scale = 0.0625f;
  a.max_splits = std::max((std::min(most, 1024u) + 31) / 32, most > 1024 ? (most + 63) / 64 : 0);
  a.partial = make<float>((u64)rows * HEADS * a.max_splits * 516);
  CUfunction parts = kernel(file, "attend_mla", 200 * 1024), join = kernel(file, "attend_join");
  JoinArgs joined = {a, 0};
  float before = timed([&] { launch(parts, a.max_splits, HEADS / 16, rows, 256, 2 * 64 * 584 + 2 * 16 * 4 * 33 + 2 * 16 * 2 * 40, a); launch(join, HEADS, rows, 1, 64, 0, joined); }, 3);
  auto want = down(expected, (u64)rows * HEADS * 512);
  printf("%-26s attend_mla and attend_join %8.1f us\n", name, before);
  double flop = 0;
  for (u32 n : counts) flop += (double)n * 64 * 1088 * 4;
  for (auto& variant : variants) {
    CUfunction f = kernel(variant.c_str(), "attend_prompt", SHARED);
    PromptArgs args = {a, rows, 0};
    args.attend.out.p = found;
    OK(cuMemsetD8((CUdeviceptr)found, 0xff, want.size() * 4));
    float us = timed([&] { launch(f, 2 * rows, 1, 1, 384, SHARED, args); });
    printf("    %-28s %8.1f us %6.1f TFLOP/s  %s\n", variant.c_str(), us, flop / us * 1e-6, compare(want, down(found, want.size())));
  }
  free_all();
}

// A format: words of codes and bytes of scales of a lane's tile; a scale as it lies there, from random bits.
struct Format { const char* name; u32 words, scale_bytes; u32 (*scale)(u32); };
static u32 float_scale(u32 r) { float f = 0.01f + 0.001f * (r % 64); u32 b; memcpy(&b, &f, 4); return b; }
static u32 affine_scale(u32 r) { return to_bf16(0.01f + 0.0001f * (r % 64)) | (u32)to_bf16(-0.08f) << 16; }
static u32 e4m3_scales(u32 r) { return 0x30303030 + (r & 0x0f0f0f0f); }
static u32 e8m0_scales(u32 r) { return 0x75767776 + (r & 0x03030303); }
static const Format FORMATS[] = {{"affine4", 4, 64, affine_scale}, {"nvfp4", 4, 64, e4m3_scales}, {"mxfp4", 4, 32, e8m0_scales}, {"mxfp8", 8, 32, e8m0_scales}, {"fp8", 8, 64, float_scale}};

// Eight of so many experts for each token, and their rows by expert.
static Routing choices(u32 tokens, u32 experts, bool slots) {
  std::vector<std::vector<u32>> rows(experts);
  std::vector<u32> ids(tokens * 8), offsets = {0}, sorted, order(experts);
  for (u32 t = 0; t < tokens; t++) {
    for (u32 i = 0; i < experts; i++) order[i] = i;
    for (u32 k = 0; k < 8; k++) { std::swap(order[k], order[k + random_word() % (experts - k)]); ids[t * 8 + k] = order[k]; rows[order[k]].push_back(t * 8 + k); }
  }
  for (auto& list : rows) { sorted.insert(sorted.end(), list.begin(), list.end()); offsets.push_back(sorted.size()); }
  return {up(ids), 8, tokens, 8, slots, up(offsets), up(sorted)};
}
static std::vector<u8> random_digits(u64 tiles) {
  std::vector<u8> x(tiles * 144);
  for (u64 r = 0; r < tiles; r++) {
    u8* p = &x[r * 144];
    for (u32 i = 0; i < 64; i++) { p[i] = (u8)(int)(random_word() % 255 - 127); p[64 + i] = (u8)(int)(random_word() % 128 - 64); }
    float about[4] = {0.0001f + 0.00001f * (random_word() % 8), uniform(), uniform(), 0};
    about[3] = about[1] + about[2];
    memcpy(p + 128, about, 16);
  }
  return x;
}

static void product(const char* file, const std::vector<std::string>& variants, const Format& format, const char* name, u32 rows, u32 cols, u32 tokens, u32 experts, bool slots) {
  bool affine = format.words == 4 && format.scale == affine_scale;
  u32 tiles = cols / 64, tile = format.words * 32 + format.scale_bytes / 4, flats = experts ? tokens * 8 : tokens, row_tiles = experts ? flats / 64 + experts : (tokens + 63) / 64;
  std::vector<u32> codes((u64)tile * tiles * (rows / 16) * std::max(experts, 1u));
  for (u64 i = 0; i < codes.size(); i++) { u32 r = random_word() ^ random_word() << 16; codes[i] = i % tile < format.words * 32 ? (format.words == 8 ? r & 0xbfbfbfbf : r) : format.scale(r); }
  MatmulArgs a = {};
  a.part[0].w.codes = up(codes); a.part[0].w.codes_stride = codes.size() / std::max(experts, 1u);
  a.part[0].w.rows = rows; a.part[0].w.cols = cols; a.part[0].w.group = 64; a.part[0].w.inline_scales = 1; a.part[0].w.tile_words = tile;
  float *expected = make<float>((u64)flats * rows), *found = make<float>((u64)flats * rows);
  a.part[0].out = {expected, 0, flats, rows, rows, 0};
  a.first_block[1] = (rows + 191) / 192; a.num_parts = 1; a.slices = tiles >= 64 ? 8 : tiles >= 16 ? 4 : 2; a.num_experts = experts; a.digits_parts = slots ? 8 : 1; a.x_head_stride = slots ? cols : 0;
  u64 x_rows = slots ? flats : tokens;
  if (affine) a.digits = up(random_digits(x_rows * tiles));
  a.x = {0, affine ? nullptr : up(halves(x_rows * cols)), tokens, slots ? cols * 8 : cols, slots ? cols * 8 : cols, 0};
  if (experts) a.routing = choices(tokens, experts, slots);
  CUfunction gemm = kernel(file, (std::string("gemm_") + format.name).c_str());
  float before = timed([&] { launch(gemm, (rows + 255) / 256, std::max(experts, 1u), (tokens + 63) / 64, 256, 0, a); }, 3);
  auto want = down(expected, (u64)flats * rows);
  double flop = 2.0 * flats * rows * cols;
  printf("%-8s %-16s %5u tokens: gemm %8.1f us %6.1f TFLOP/s\n", format.name, name, tokens, before, flop / before * 1e-6);
  u8* blocked = make<u8>((u64)row_tiles * tiles * 64 * 136);
  BlockArgs blocks = {a.routing, a.x, a.digits, blocked, tokens, tiles, a.digits_parts, experts, cols, a.x_head_stride};
  a.digits = blocked;
  a.part[0].out.p = found;
  u32 shared = 8 * 9216 + 1024 + (format.words == 8 ? 4 : 8) * 12 * tile * 4 + 192 * 64 * 4;
  for (auto& variant : variants) {
    CUfunction make_blocks = kernel(variant.c_str(), affine ? "block_digits" : "block_twins"), f = kernel(variant.c_str(), (std::string("prompt_") + format.name).c_str(), 226 * 1024);
    OK(cuMemsetD8((CUdeviceptr)found, 0xff, want.size() * 4));
    float us_blocks = timed([&] { launch(make_blocks, 4 * ((tiles + 7) / 8), row_tiles, 1, 256, 0, blocks); });
    float us = timed([&] { launch(f, (rows + 191) / 192, row_tiles, 1, 512, shared, a); }, 9);
    printf("    %-28s %8.1f us %6.1f TFLOP/s, tiles of activations %5.1f us  %s\n", variant.c_str(), us, flop / us * 1e-6, us_blocks, compare(want, down(found, want.size())));
  }
  free_all();
}

static void indexer(const std::vector<std::string>& files, u32 rows) {
  auto table = block_table();
  std::vector<u32> positions, first_ids;
  auto q = normals((u64)rows * 4096), w = normals(rows * 32);
  auto cache = halves(CONTEXT * 128);
  IndexScoreArgs a = {};
  a.paging = paging(rows, CONTEXT - rows, table, positions);
  a.q = {up(q), 0, rows, 4096, 4096, 0}; a.weights = {up(w), 0, rows, 32, 32, 0}; a.cache = up(cache);
  a.scores = {make<float>((u64)rows * CONTEXT), 0, rows, CONTEXT, CONTEXT, 0};
  a.num_heads = 32; a.head_dim = 128; a.cache_bf16 = 1; a.scale = 0.0883883f; a.num_tokens = rows;
  for (auto& file : files) {
    CUfunction plain = kernel(file.c_str(), "index_score", 60000), tiles = kernel(file.c_str(), rows > 32 ? "index_score2_bf16" : "index_score1_bf16", 61440), choose = kernel(file.c_str(), "index_topk");
    a.block_tokens = rows > 32 ? 16 : 1;
    float us_plain = timed([&] { launch(plain, CONTEXT / 64, rows, 1, 256, 4 * (32 * 129 + 8 * 128), a); }, 3);
    float us = timed([&] { launch(tiles, CONTEXT / (rows > 32 ? 256 : 128), (rows + a.block_tokens - 1) / a.block_tokens, 1, 256, 61440, a); });
    auto scores = down(a.scores.p, (u64)rows * CONTEXT);
    double worst = 0;
    for (u32 n = 0; n < 2000; n++) {
      u32 t = random_word() % rows, i = random_word() % (positions[t] + 1);
      const u16* key = &cache[((u64)table[i / BLOCK] * BLOCK + i % BLOCK) * 128];
      double sum = 0, magnitudes = 0;
      for (u32 h = 0; h < 32; h++) {
        double x = 0;
        for (u32 c = 0; c < 128; c++) x += (double)from_bf16(key[c]) * q[((u64)t * 32 + h) * 128 + c];
        x = std::max(x * a.scale, 0.0) * w[t * 32 + h];
        sum += x; magnitudes += fabs(x);
      }
      worst = std::max(worst, fabs(scores[(u64)t * CONTEXT + i] - sum) / magnitudes);
    }
    IndexTopkArgs k = {a.scores, a.paging.positions, make<u32>((u64)rows * 2048), make<u32>(rows), 2048, 2048};
    float us_choice = timed([&] { launch(choose, rows, 1, 1, 1024, 0, k); });
    auto ids = down(k.ids, (u64)rows * 2048);
    if (first_ids.empty()) first_ids = ids;
    printf("%u rows, %s: index_score %.1f us, by tensor cores %.1f us (error / sum of magnitudes %.1e), index_topk %.1f us, %s\n", rows, file.c_str(), us_plain, us, worst, us_choice, ids == first_ids ? "the same" : "DIFFER");
  }
  free_all();
}

int main(int argc, char** argv) {
  if (argc < 3) { printf("usage: %s attend|products|index FILE.cubin ..\n", argv[0]); return 2; }
  OK(cuInit(0));
  CUdevice device;
  CUcontext context;
  OK(cuDeviceGet(&device, 0)); OK(cuDevicePrimaryCtxRetain(&context, device)); OK(cuCtxSetCurrent(context));
  std::string mode = argv[1];
  std::vector<std::string> files(argv + (mode == "index" ? 2 : 3), argv + argc);
  if (mode == "attend") {
    attend(argv[2], files, "70 rows at 20", 70, 20, false);
    attend(argv[2], files, "40 rows at 1100, pairs", 40, 1100, false);
    attend(argv[2], files, "40 rows at 3000, chosen", 40, 3000, true);
    attend(argv[2], files, "512 rows", 512, 0, false);
    attend(argv[2], files, "512 rows at 1536", 512, 1536, false);
    attend(argv[2], files, "512 rows at 3584, chosen", 512, 3584, true);
  } else if (mode == "products") {
    for (auto& format : FORMATS) {
      product(argv[2], files, format, "attention output", 6144, 16384, 512, 0, false);
      if (format.words == 8) continue;
      product(argv[2], files, format, "experts gate", 2048, 6144, 512, 77, false);
      product(argv[2], files, format, "experts down", 6144, 2048, 512, 77, true);
    }
  } else {
    indexer(files, 4096);
    indexer(files, 32);
  }
}
