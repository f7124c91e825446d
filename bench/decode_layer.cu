// Times the kernels of a layer of GLM-5.2-77 for one row: all of them, each alone, with and without programmatic dependent launch, in a graph of
// LAYERS layers with weights of their own, so that nothing stays in a cache. Prints a hash of the residual stream, by which variants of a kernel
// are compared. For experiments with kernels: it starts in seconds and needs no build of Moellon.
//
//     nvcc -std=c++20 -O2 -gencode=arch=compute_90a,code=sm_90a -Icrates/backend-cuda/kernels -DROUTED_BITS=3 -DCONTEXT=128 bench/decode_layer.cu
//
// (Compiling goes faster with a copy of the kernels whose other formats are left out.)
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>
#include <string>
#include <algorithm>
#include <cmath>
#undef INFINITY  // kernels have their own
#include "decode.cu"
#include "attention.cu"
#define OK(x) do { cudaError_t e_ = (x); if (e_ != cudaSuccess) { printf("%s:%d %s\n", __FILE__, __LINE__, cudaGetErrorString(e_)); exit(1); } } while (0)

#ifndef BLOCKS
#define BLOCKS 3
#endif
#ifndef CONTEXT
#define CONTEXT 128
#endif
#ifndef ROUTED_BITS
#define ROUTED_BITS 3
#endif
#ifndef LAYERS
#define LAYERS 5
#endif
static const u32 HID = 6144, QL = 2048, KVL = 512, HEADS = 64, NOPE = 192, ROPE = 64, VD = 256, INTER = 2048, E = 77;
#ifndef TOPK
#define TOPK 8u
#endif


__global__ void fill_codes(u32* p, u64 words, u32 tile_words, u32 code_words, u32 scale_word, u32 seed) {
  for (u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x; i < words; i += (u64)gridDim.x * blockDim.x) {
    u64 z = i * 0x9e3779b97f4a7c15ull + seed * 0xbf58476d1ce4e5b9ull; z ^= z >> 30; z *= 0xbf58476d1ce4e5b9ull; z ^= z >> 27; z *= 0x94d049bb133111ebull; z ^= z >> 31;
    p[i] = i % tile_words < code_words ? (u32)z : scale_word;
  }
}
__global__ void fill_float(float* p, u64 n, float scale, float plus, u32 seed) {
  for (u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x; i < n; i += (u64)gridDim.x * blockDim.x) {
    u64 z = i * 0x9e3779b97f4a7c15ull + seed * 0xbf58476d1ce4e5b9ull; z ^= z >> 30; z *= 0xbf58476d1ce4e5b9ull; z ^= z >> 27; z *= 0x94d049bb133111ebull; z ^= z >> 31;
    p[i] = plus + scale * ((float)(u32)(z & 0xffffff) / 8388608.f - 1.f);
  }
}
__global__ void fill_bf16(u16* p, u64 n, float scale, u32 seed) {
  for (u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x; i < n; i += (u64)gridDim.x * blockDim.x) {
    u64 z = i * 0x9e3779b97f4a7c15ull + seed * 0xbf58476d1ce4e5b9ull; z ^= z >> 30; z *= 0xbf58476d1ce4e5b9ull; z ^= z >> 27; z *= 0x94d049bb133111ebull; z ^= z >> 31;
    p[i] = f32_to_bf16(scale * ((float)(u32)(z & 0xffffff) / 8388608.f - 1.f));
  }
}
static u32 seed_ = 1;
static void* dev(u64 bytes) { void* p; OK(cudaMalloc(&p, bytes)); OK(cudaMemset(p, 0, bytes)); return p; }
static u16 hbf(float x) { u32 b; memcpy(&b, &x, 4); return (u16)((b + 0x7fff + ((b >> 16) & 1)) >> 16); }
static Packed weight(u32 count, u32 rows, u32 cols, int bits) {
  Packed w = {};
  u32 words = bits * 32, tile = words + 16, tiles = (cols + 63) / 64, row_tiles = (rows + 15) / 16;
  w.codes_stride = (u64)tile * tiles * row_tiles;
  u64 total = w.codes_stride * count;
  u32* p = (u32*)dev(total * 4);
  float s = 1.7f / ((1 << bits) * 0.29f * sqrtf(cols)), b = -s * ((1 << bits) - 1) / 2;
  fill_codes<<<1024, 256>>>(p, total, tile, words, hbf(s) | (u32)hbf(b) << 16, seed_++);
  w.codes = p; w.rows = rows; w.cols = cols; w.group = 64; w.inline_scales = 1; w.tile_words = tile;
  return w;
}
static float* floats(u64 n, float scale = 0, float plus = 0) {
  float* p = (float*)dev(n * 4);
  if (scale != 0 || plus != 0) fill_float<<<64, 256>>>(p, n, scale, plus, seed_++);
  return p;
}
static Mat mat(float* p, u32 cols) { Mat m = {}; m.p = p; m.rows = 1; m.cols = cols; m.stride = cols; return m; }
static u32 slices(u32 cols) { u32 t = (cols + 63) / 64; return t >= 64 ? 8 : t >= 16 ? 4 : t >= 4 ? 2 : 1; }
static u32 tile_bytes(int bits) { return bits * 128 + 64; }
static u32 even(u32 units, u32 most) { u32 r = (units + most - 1) / most; if (!r) r = 1; u32 b = (units + r - 1) / r; return b ? b : 1; }
static u32 resident(u32 shared) { u32 fit = (228u << 10) / (shared + (6 << 10)); return 132 * (fit < 1 ? 1 : fit > BLOCKS ? BLOCKS : fit); }

struct Launch { const char* tag; const void* fn; dim3 grid; u32 block, shared; std::vector<char> args; double mb; };
static std::vector<Launch> launches;
template <typename A> static void add(const char* tag, const void* fn, dim3 grid, u32 block, u32 shared, A a, double mb) {
  Launch l; l.tag = tag; l.fn = fn; l.grid = grid; l.block = block; l.shared = shared; l.mb = mb;
  OK(cudaFuncSetAttribute(fn, cudaFuncAttributeMaxDynamicSharedMemorySize, 200 << 10));
  l.args.resize(sizeof(A)); memcpy(l.args.data(), &a, sizeof(A));
  launches.push_back(l);
}
static bool pdl = false;
static void launch(Launch& l, cudaStream_t s) {
  cudaLaunchConfig_t c = {}; c.gridDim = l.grid; c.blockDim = dim3(l.block); c.dynamicSmemBytes = l.shared; c.stream = s;
  cudaLaunchAttribute at[1]; at[0].id = cudaLaunchAttributeProgrammaticStreamSerialization; at[0].val.programmaticStreamSerializationAllowed = 1;
  c.attrs = at; c.numAttrs = pdl ? 1 : 0;
  void* p[1] = {l.args.data()};
  OK(cudaLaunchKernelExC(&c, l.fn, p));
}
static double time_graph(const std::vector<Launch*>& list, int reps, cudaStream_t s) {
  cudaGraph_t g; cudaGraphExec_t x;
  OK(cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal));
  for (auto l : list) launch(*l, s);
  OK(cudaStreamEndCapture(s, &g)); OK(cudaGraphInstantiate(&x, g, 0));
  cudaEvent_t a, b; cudaEventCreate(&a); cudaEventCreate(&b);
  for (int i = 0; i < 3; i++) OK(cudaGraphLaunch(x, s));
  std::vector<float> times;
  for (int i = 0; i < reps; i++) { cudaEventRecord(a, s); OK(cudaGraphLaunch(x, s)); cudaEventRecord(b, s); OK(cudaStreamSynchronize(s)); float ms; cudaEventElapsedTime(&ms, a, b); times.push_back(ms); }
  OK(cudaGetLastError());
  cudaGraphExecDestroy(x); cudaGraphDestroy(g);
  std::sort(times.begin(), times.end());
  return times[times.size() / 2] * 1000;
}
static u64 fnv(const void* d, u64 bytes) { std::vector<unsigned char> h(bytes); OK(cudaMemcpy(h.data(), d, bytes, cudaMemcpyDeviceToHost)); u64 f = 1469598103934665603ull; for (auto c : h) { f ^= c; f *= 1099511628211ull; } return f; }

// The chain of kernels as crates/backend-cuda/src/backend/decode.rs launches it.
static float* build(int R) {
  float* x = floats(HID, 1.f);
  float* qa = floats(QL); float* kv = floats(KVL + ROPE); float* q = floats(HEADS * (NOPE + ROPE)); float* ql = floats(HEADS * KVL);
  float* ao = floats(HEADS * VD); float* normed = floats(HID); float* logits = floats(E); float* h = floats(TOPK * INTER); float* hs = floats(INTER); float* plus = floats(HID); float* out = floats(HID);
  float* weights = floats(32); u32* ids = (u32*)dev(128);
  u8* d_ao = (u8*)dev(HEADS * VD / 64 * 144); u8* d_x = (u8*)dev(HID / 64 * 144); u8* d_h = (u8*)dev(TOPK * INTER / 64 * 144);
  u32* arrived = (u32*)dev(4096 * 4);
  float* table = floats(ROPE, 0.5f);
  u32 max_splits = 32; float* partial = floats((u64)HEADS * max_splits * (KVL + 4));
  u32 position = CONTEXT; u32* positions = (u32*)dev(64); OK(cudaMemcpy(positions, &position, 4, cudaMemcpyHostToDevice));
  u32* sequences = (u32*)dev(64); u32 blocks_table[64]; for (int i = 0; i < 64; i++) blocks_table[i] = i; u32* bt = (u32*)dev(256); OK(cudaMemcpy(bt, blocks_table, 256, cudaMemcpyHostToDevice));
  u32* slots = (u32*)dev(64); OK(cudaMemcpy(slots, &position, 4, cudaMemcpyHostToDevice));
  for (int layer = 0; layer < LAYERS; layer++) {
    float* n1 = floats(HID, 0.1f, 1.f); float* n2 = floats(QL, 0.1f, 1.f); float* n3 = floats(KVL, 0.1f, 1.f); float* n4 = floats(HID, 0.1f, 1.f);
    u16* cache = (u16*)dev(64 * 32 * 576 * 2); fill_bf16<<<64, 256>>>(cache, 64 * 32 * 576, 1.f, seed_++);
    Packed w_qa = weight(1, QL, HID, 4), w_kv = weight(1, KVL + ROPE, HID, 4), w_qb = weight(1, HEADS * (NOPE + ROPE), QL, 4);
    Packed w_k = weight(HEADS, KVL, NOPE, 4), w_v = weight(HEADS, VD, KVL, 4), w_o = weight(1, HID, HEADS * VD, 4);
    Packed w_g = weight(E, INTER, HID, R), w_u = weight(E, INTER, HID, R), w_d = weight(E, HID, INTER, R);
    Packed s_g = weight(1, INTER, HID, 4), s_u = weight(1, INTER, HID, 4), s_d = weight(1, HID, INTER, 4);
    u16* router_w = (u16*)dev(E * HID * 2); fill_bf16<<<64, 256>>>(router_w, E * HID, 0.05f, seed_++);
    float* correction = floats(E, 0.3f);
    auto line = [&](const char* tag, std::vector<std::pair<Packed, float*>> parts, RowInput in, float* residual, u32 cols, bool made) {
      LineArgs a = {}; u32 units = 0; double mb = 0;
      for (size_t i = 0; i < parts.size(); i++) { a.part[i].w = parts[i].first; a.part[i].out = mat(parts[i].second, parts[i].first.rows); a.first_unit[i] = units; units += parts[i].first.rows / 16; a.first_unit[i + 1] = units; mb += parts[i].first.rows * (cols / 64) * tile_bytes(4) / 16e6; }
      a.num_parts = parts.size(); a.slices = slices(cols); a.in = in; if (residual) a.residual = mat(residual, HID);
      u32 shared = 8 * (12 * tile_bytes(4) + 64) + (made ? cols / 64 * 144 : 0);
      u32 side = 8 / slices(cols);
      add(tag, (const void*)line_affine4, dim3(even((units + side - 1) / side, resident(shared))), 256, shared, a, mb);
    };
    auto norm_in = [&](float* from, u32 cols, float* w) { RowInput in = {}; in.x = mat(from, cols); in.kind = 2; in.eps = 1e-6f; in.weight = w; return in; };
    line("qkv_a", {{w_qa, qa}, {w_kv, kv}}, norm_in(x, HID, n1), nullptr, HID, true);
    line("q_b", {{w_qb, q}}, norm_in(qa, QL, n2), nullptr, QL, true);
    AttendArgs t = {};
    t.q = mat(ql, HEADS * KVL); t.q_rope = mat(q + NOPE, HEADS * (NOPE + ROPE)); t.cache = cache; t.partial = partial;
    t.paging = {positions, sequences, bt, 64, 32}; t.num_heads = HEADS; t.heads_per_block = 8; t.heads_per_key = HEADS; t.q_dim = KVL; t.q_rope_stride = NOPE + ROPE; t.q_rope_dim = ROPE;
    t.cache_width = KVL + ROPE; t.cache_bf16 = 1; t.value_dim = KVL; t.values_are_keys = 1; t.max_splits = max_splits; t.scale = 0.0625f;
    auto heads = [&](const char* tag, Packed w, float* from, u32 stride, float* to, u8* digits, bool joins, bool latent) {
      HeadsArgs a = {}; a.w = w; a.out = mat(to, HEADS * w.rows); a.out_digits = digits; a.x = from; a.x_head_stride = stride; a.slices = slices(w.cols); a.joins = joins; a.has_latent = latent;
      if (joins) a.attend = t;
      if (latent) { Latent& l = a.latent; l.latent = mat(kv, KVL); l.latent.stride = KVL + ROPE; l.k_pe = mat(kv + KVL, ROPE); l.k_pe.stride = KVL + ROPE; l.q = mat(q + NOPE, HEADS * (NOPE + ROPE)); l.table = mat(table, ROPE); l.weight = n3; l.slots = slots; l.cache = cache; l.cache_width = KVL + ROPE; l.cache_bf16 = 1; l.num_heads = HEADS; l.head_stride = NOPE + ROPE; l.interleaved = 1; l.eps = 1e-6f; }
      u32 side = 8 / a.slices, shared = 8 * (12 * tile_bytes(4) + 64) + (w.cols + 63) / 64 * 144;
      add(tag, (const void*)heads_affine4, dim3((w.rows / 16 + side - 1) / side, HEADS + (latent ? 1 : 0)), 256, shared, a, HEADS * w.rows / 16.0 * ((w.cols + 63) / 64) * tile_bytes(4) / 1e6);
    };
    heads("heads_k", w_k, q, NOPE + ROPE, ql, nullptr, false, true);
    { u32 stride = KVL + ROPE + 8, shared = 2 * (32 + 32) * stride + 2 * 16 * 4 * 33 + 2 * 16 * 2 * 40; u32 splits = 32, b = std::min(132u * 2 / 4, splits); add("attend", (const void*)attend_mla, dim3(b, HEADS / 16, 1), 256, shared, t, 0.15); }
    heads("heads_v", w_v, nullptr, 0, ao, d_ao, true, false);
    { RowInput in = {}; in.digits = d_ao; line("o_proj", {{w_o, out}}, in, x, HEADS * VD, false); }
    { PairArgs a = {}; RouterArgs& r = a.router; r.weights = (u8*)router_w; r.out = mat(logits, E); r.in = norm_in(x, HID, n4); r.in.out = mat(normed, HID); r.in.out_digits = d_x; r.rows = E; r.cols = HID;
      a.router_kind = 2; a.pair = {s_g, s_u, mat(hs, INTER), nullptr}; a.in = norm_in(x, HID, n4); a.slices = 8;
      u32 shared = 8 * (12 * tile_bytes(4) + 64) + HID / 64 * 144; u32 blocks = E + even(INTER / 16, resident(shared) - E);
      add("router_pair", (const void*)pair_affine4, dim3(blocks), 256, shared, a, E * HID * 2e-6 + 2 * INTER / 16 * (HID / 64) * tile_bytes(4) / 1e6); }
    { UpArgs a = {}; a.slices = 8; a.routed = {w_g, w_u, mat(h, TOPK * INTER), d_x};
      RouteArgs& r = a.route; r.logits = mat(logits, E); r.weights = mat(weights, TOPK); r.correction_bias = correction; r.ids = ids; r.ids_stride = TOPK; r.scoring = 0; r.n_group = 1; r.topk_group = 1; r.norm_topk_prob = 1; r.top_k = TOPK; r.factor = 2.5f;
      a.h_digits = d_h; a.arrived = arrived;
      LineArgs& l = a.shared; l.part[0].w = s_d; l.part[0].out = mat(plus, HID); l.first_unit[1] = HID / 16; l.num_parts = 1; l.slices = slices(INTER); l.in.x = mat(hs, INTER); l.in.kind = 1;
      u32 ring = std::max(8 * (12 * tile_bytes(R) + 64), 8 * (12 * tile_bytes(4) + 64) + INTER / 64 * 144), most = resident(ring), units_r = TOPK * INTER / 16, units_s = HID / 16 / 2, best = 1; u64 best_t = ~0ull;
      for (u32 b = 1; b < most; b++) { u64 tt = std::max<u64>((u64)((units_s + b - 1) / b) * 2 * (INTER / 64) * tile_bytes(4), (u64)((units_r + most - b - 1) / (most - b)) * 2 * (HID / 64) * tile_bytes(R)); if (tt < best_t) { best_t = tt; best = b; } }
      a.shared_blocks = even(units_s, best); u32 total = a.shared_blocks + even(units_r, most - best);
      if (layer == 0) printf("up: %u + %u blocks\n", a.shared_blocks, total - a.shared_blocks);
      add("up", R == 3 ? (const void*)up_affine3_affine4 : (const void*)up_affine4_affine4, dim3(total), 256, ring, a, (2 * INTER / 16 * (HID / 64) * (TOPK * tile_bytes(R)) + HID / 16 * (INTER / 64) * tile_bytes(4)) / 1e6); }
    { DownArgs a = {}; a.w = w_d; a.weights = mat(weights, TOPK); a.plus = mat(plus, HID); a.out = mat(out, HID); a.residual = mat(x, HID); a.ids = ids; a.x = d_h; a.part_bytes = INTER / 64 * 144; a.slices = slices(INTER); a.top_k = TOPK;
      u32 shared = 8 * (12 * tile_bytes(R) + 64) + 2 * TOPK * a.slices * 64;
      add("experts_down", R == 3 ? (const void*)experts_down_affine3 : (const void*)experts_down_affine4, dim3(even(HID / 16, resident(shared))), 256, shared, a, TOPK * HID / 16 * (INTER / 64) * tile_bytes(R) / 1e6); }
  }
  return x;
}
int main(int argc, char** argv) {
  int R = ROUTED_BITS;
  cudaStream_t s; OK(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking));
  float* x = build(R);
  OK(cudaDeviceSynchronize());
  auto run = [&](const char* what, const char* only, int reps) {
    std::vector<Launch*> list; double mb = 0; int n = 0;
    for (auto& l : launches) if (!only || !strcmp(l.tag, only)) { list.push_back(&l); mb += l.mb; n++; }
    if (list.empty()) return;
    double us = time_graph(list, reps, s);
    printf("%-14s %7.2f us a layer (%d kernels), %.0f GB/s\n", what, us / LAYERS, n / LAYERS, mb * 1e6 / us * 1e-3);
  };
  fill_float<<<64, 256>>>(x, HID, 1.f, 0.f, 99); OK(cudaDeviceSynchronize());
  { std::vector<Launch*> list; for (auto& l : launches) list.push_back(&l); for (auto l : list) launch(*l, s); OK(cudaStreamSynchronize(s)); }
  if (argc > 1) printf("== %s\n", argv[1]); printf("hash %016llx\n", fnv(x, HID * 4));
  run("chain", nullptr, 30);
  pdl = true; run("chain pdl", nullptr, 30); pdl = false;
  std::vector<std::string> tags;
  for (auto& l : launches) if (std::find(tags.begin(), tags.end(), l.tag) == tags.end()) tags.push_back(l.tag);
  for (auto& t : tags) run(t.c_str(), t.c_str(), 15);
}
