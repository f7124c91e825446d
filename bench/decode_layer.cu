// Times the kernels of a layer of GLM-5.2-77 for one row: all of them, each alone, with and without programmatic dependent launch, in a graph of
// LAYERS layers with weights of their own, so that nothing stays in a cache. Prints a hash of the residual stream, by which variants of a kernel
// are compared. For experiments with kernels: it starts in seconds and needs no build of Moellon.
//
//     nvcc -std=c++20 -O2 -arch=sm_90 -Icrates/backend-cuda/kernels -DNO_KERNELS -DROUTED_BITS=3 -DCONTEXT=128 bench/decode_layer.cu -lcuda
//     ./a.out FOLDER [NAME]
#include <cuda.h>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>
#include <map>
#include <string>
#include <algorithm>
#include <cmath>
#undef INFINITY  // kernels have their own
#include "decode.cu"
#include "latent.cu"
#include "attention.cu"
static std::string setting(const char* name, const char* otherwise) { const char* s = getenv(name); return s ? s : otherwise; }
#define LAYERS atoi(setting("LAYERS", "5").c_str())
#include "layer.cuh"

// COMPARE=FOLDER: what kernels of one layer leave is kept there, or compared with what is there.
struct Kept { const char* name; const void* p; u64 floats; };
static std::vector<Kept> kept;
// HEADS=NAME in the environment: the kernels from the queries' second product to the values of the heads are one, NAME of latent.cu.
static u32 row_heads_bytes(const std::string& name) {
  if (name == "row_heads_affine4") return RowHeads<AFFINE4, 8, 1>::BYTES;
  printf("no kernel %s\n", name.c_str());
  exit(1);
}
// The chain of kernels as crates/backend-cuda/src/backend/decode.rs launches it.
static float* build(int R) {
  std::string one = setting("HEADS", ""), deep_name = setting("DEEP_KERNEL", "deep_affine4");
  u32 deep_tiles = atoi(setting("DEEP_TILES", "24").c_str());
  float* x = floats(HID, 1.f);
  float* qa = floats(QL); float* kv = floats(KVL + ROPE); float* q = floats(HEADS * (NOPE + ROPE)); float* ql = floats(HEADS * KVL);
  float* ao = floats(HEADS * VD); float* normed = floats(HID); float* logits = floats(E); float* h = floats(TOPK * INTER); float* hs = floats(INTER); float* plus = floats(HID); float* out = floats(HID);
  float* weights = floats(32); u32* ids = (u32*)dev(128);
  u8* d_ao = (u8*)dev(HEADS * VD / 64 * 144); u8* d_x = (u8*)dev(HID / 64 * 144); u8* d_h = (u8*)dev(TOPK * INTER / 64 * 144);
  u32* arrived = (u32*)dev(4096 * 4);
  float* table = floats(ROPE, 0.5f);
  u32 max_splits = 32; float* partial = floats((u64)HEADS * max_splits * (KVL + 4));
  u32 position = atoi(setting("CONTEXT", "128").c_str()); u32* positions = (u32*)dev(64); OK(cudaMemcpy(positions, &position, 4, cudaMemcpyHostToDevice));
  u32* sequences = (u32*)dev(64); u32 blocks_table[64]; for (int i = 0; i < 64; i++) blocks_table[i] = i; u32* bt = (u32*)dev(256); OK(cudaMemcpy(bt, blocks_table, 256, cudaMemcpyHostToDevice));
  u32* slots = (u32*)dev(64); OK(cudaMemcpy(slots, &position, 4, cudaMemcpyHostToDevice));
  u16* last_cache = nullptr;
  for (int layer = 0; layer < LAYERS; layer++) {
    float* n1 = floats(HID, 0.1f, 1.f); float* n2 = floats(QL, 0.1f, 1.f); float* n3 = floats(KVL, 0.1f, 1.f); float* n4 = floats(HID, 0.1f, 1.f);
    u16* cache = (u16*)dev(64 * 32 * 576 * 2); fill_bf16<<<64, 256>>>(cache, 64 * 32 * 576, 1.f, seed_++); last_cache = cache;
    Packed w_qa = weight(1, QL, HID, 4), w_kv = weight(1, KVL + ROPE, HID, 4), w_qb = weight(1, HEADS * (NOPE + ROPE), QL, 4);
    Packed w_k = weight(HEADS, KVL, NOPE, 4), w_v = weight(HEADS, VD, KVL, 4), w_o = weight(1, HID, HEADS * VD, 4);
    Packed w_g = weight(E, INTER, HID, R), w_u = weight(E, INTER, HID, R), w_d = weight(E, HID, INTER, R);
    Packed s_g = weight(1, INTER, HID, 4), s_u = weight(1, INTER, HID, 4), s_d = weight(1, HID, INTER, 4);
    u16* router_w = (u16*)dev(E * HID * 2); fill_bf16<<<64, 256>>>(router_w, E * HID, 0.05f, seed_++);
    float* correction = floats(E, 0.3f);
    auto line = [&](const char* tag, std::vector<std::pair<Packed, float*>> parts, RowInput in, float* residual, u32 cols, bool made) {
      LineArgs a = {}; u32 units = 0; double mb = 0; bool deep = DEEP && !strncmp(tag, "q", 1); u32 tall = deep ? 2 : 1;
      for (size_t i = 0; i < parts.size(); i++) { a.part[i].w = parts[i].first; a.part[i].out = mat(parts[i].second, parts[i].first.rows); a.first_unit[i] = units; units += parts[i].first.rows / (16 * tall); a.first_unit[i + 1] = units; mb += parts[i].first.rows * (cols / 64) * tile_bytes(4) / 16e6; }
      a.num_parts = parts.size(); a.slices = slices(cols); a.in = in; if (residual) a.residual = mat(residual, HID);
      u32 shared = 8 * ((deep ? deep_tiles : 12) * tile_bytes(4) + 64) + (made ? cols / 64 * 144 : 0);
      u32 side = 8 / slices(cols);
      add(tag, kernel("decode", deep ? deep_name.c_str() : "line_affine4"), dim3(even((units + side - 1) / side, resident(shared))), 256, shared, a, mb);
    };
    auto norm_in = [&](float* from, u32 cols, float* w) { RowInput in = {}; in.x = mat(from, cols); in.kind = 2; in.eps = 1e-6f; in.weight = w; return in; };
    line("qkv_a", {{w_qa, qa}, {w_kv, kv}}, norm_in(x, HID, n1), nullptr, HID, true);
    if (one.empty()) line("q_b", {{w_qb, q}}, norm_in(qa, QL, n2), nullptr, QL, true);
    AttendArgs t = {};
    t.q = mat(ql, HEADS * KVL); t.q_rope = mat(q + NOPE, HEADS * (NOPE + ROPE)); t.cache = cache; t.partial = partial;
    t.paging = {positions, sequences, bt, 64, 32}; t.num_heads = HEADS; t.heads_per_block = 8; t.heads_per_key = HEADS; t.q_dim = KVL; t.q_rope_stride = NOPE + ROPE; t.q_rope_dim = ROPE;
    t.cache_width = KVL + ROPE; t.cache_bf16 = 1; t.value_dim = KVL; t.values_are_keys = 1; t.max_splits = max_splits; t.scale = 0.0625f;
    auto latent = [&] { Latent l = {}; l.latent = mat(kv, KVL); l.latent.stride = KVL + ROPE; l.k_pe = mat(kv + KVL, ROPE); l.k_pe.stride = KVL + ROPE; l.q = mat(q + NOPE, HEADS * (NOPE + ROPE)); l.table = mat(table, ROPE); l.weight = n3; l.slots = slots; l.cache = cache; l.cache_width = KVL + ROPE; l.cache_bf16 = 1; l.num_heads = HEADS; l.head_stride = NOPE + ROPE; l.interleaved = 1; l.eps = 1e-6f; return l; };
    auto heads = [&](const char* tag, Packed w, float* from, u32 stride, float* to, u8* digits, bool joins, bool has_latent) {
      HeadsArgs a = {}; a.w = w; a.out = mat(to, HEADS * w.rows); a.out_digits = digits; a.x = from; a.x_head_stride = stride; a.slices = slices(w.cols); a.joins = joins; a.has_latent = has_latent;
      if (joins) a.attend = t;
      if (has_latent) a.latent = latent();
      u32 side = 8 / a.slices, shared = 8 * (12 * tile_bytes(4) + 64) + (w.cols + 63) / 64 * 144;
      add(tag, kernel("decode", "heads_affine4"), dim3((w.rows / 16 + side - 1) / side, HEADS + (has_latent ? 1 : 0)), 256, shared, a, HEADS * w.rows / 16.0 * ((w.cols + 63) / 64) * tile_bytes(4) / 1e6);
    };
    if (one.empty()) heads("heads_k", w_k, q, NOPE + ROPE, ql, nullptr, false, true);
    if (one.empty()) { u32 stride = KVL + ROPE + 8, shared = 2 * (32 + 32) * stride + 2 * 16 * 4 * 33 + 2 * 16 * 2 * 40; u32 splits = 32, b = std::min(132u * 2 / 4, splits); add("attend", kernel("attention", "attend_mla"), dim3(b, HEADS / 16, 1), 256, shared, t, 0.15); }
    if (one.empty()) heads("heads_v", w_v, nullptr, 0, ao, d_ao, true, false);
    if (!one.empty()) {
      RowHeadsArgs a = {}; a.w_q = w_qb; a.w_k = w_k; a.w_v = w_v; a.in = norm_in(qa, QL, n2); a.latent = latent(); a.attend = t;
      a.out = mat(ao, HEADS * VD); a.out_digits = d_ao; for (u32 s = slices(QL); s > 1; s /= 2) a.log_slices++;
      add("row_heads", kernel("latent", one.c_str()), dim3(2 * HEADS), 512, row_heads_bytes(one), a, HEADS * ((NOPE + ROPE) / 16 * (QL / 64) + KVL / 16 * (NOPE / 64) + VD / 16 * (KVL / 64)) * tile_bytes(4) / 1e6);
    }
    { RowInput in = {}; in.digits = d_ao; line("o_proj", {{w_o, out}}, in, x, HEADS * VD, false); }
    { PairArgs a = {}; RouterArgs& r = a.router; r.weights = (u8*)router_w; r.out = mat(logits, E); r.in = norm_in(x, HID, n4); r.in.out = mat(normed, HID); r.in.out_digits = d_x; r.rows = E; r.cols = HID;
      RouteArgs& c = a.route; c.logits = mat(logits, E); c.weights = mat(weights, TOPK); c.correction_bias = correction; c.ids = ids; c.ids_stride = TOPK; c.scoring = 0; c.n_group = 1; c.topk_group = 1; c.norm_topk_prob = 1; c.top_k = TOPK; c.factor = 2.5f; a.arrived = arrived;
      a.router_kind = 2; a.pair = {s_g, s_u, mat(hs, INTER), nullptr}; a.in = norm_in(x, HID, n4); a.slices = 8;
      u32 shared = 8 * (12 * tile_bytes(4) + 64) + HID / 64 * 144; u32 blocks = E + even(INTER / 16, resident(shared) - E);
      add("router_pair", kernel("decode", "pair_affine4"), dim3(blocks), 256, shared, a, E * HID * 2e-6 + 2 * INTER / 16 * (HID / 64) * tile_bytes(4) / 1e6); }
    { UpArgs a = {}; a.slices = 8; a.routed = {w_g, w_u, mat(h, TOPK * INTER), d_x};
      a.ids = ids; a.top_k = TOPK;
      a.h_digits = d_h; a.arrived = arrived;
      LineArgs& l = a.shared; l.part[0].w = s_d; l.part[0].out = mat(plus, HID); l.first_unit[1] = HID / 16; l.num_parts = 1; l.slices = slices(INTER); l.in.x = mat(hs, INTER); l.in.kind = 1;
      u32 ring = std::max(8 * (12 * tile_bytes(R) + 64), 8 * (12 * tile_bytes(4) + 64) + INTER / 64 * 144), most = resident(ring), units_r = TOPK * INTER / 16, units_s = HID / 16 / 2, best = 1; u64 best_t = ~0ull;
      for (u32 b = 1; b < most; b++) { u64 tt = std::max<u64>((u64)((units_s + b - 1) / b) * 2 * (INTER / 64) * tile_bytes(4), (u64)((units_r + most - b - 1) / (most - b)) * 2 * (HID / 64) * tile_bytes(R)); if (tt < best_t) { best_t = tt; best = b; } }
      a.shared_blocks = even(units_s, best); u32 total = a.shared_blocks + even(units_r, most - best);
      if (layer == 0) printf("up: %u + %u blocks\n", a.shared_blocks, total - a.shared_blocks);
      add("up", kernel("decode", R == 3 ? "up_affine3_affine4" : "up_affine4_affine4"), dim3(total), 256, ring, a, (2 * INTER / 16 * (HID / 64) * (TOPK * tile_bytes(R)) + HID / 16 * (INTER / 64) * tile_bytes(4)) / 1e6); }
    { DownArgs a = {}; a.w = w_d; a.weights = mat(weights, TOPK); a.plus = mat(plus, HID); a.out = mat(out, HID); a.residual = mat(x, HID); a.ids = ids; a.x = d_h; a.part_bytes = INTER / 64 * 144; a.slices = slices(INTER); a.top_k = TOPK;
      u32 shared = 8 * (12 * tile_bytes(R) + 64) + 2 * TOPK * a.slices * 64;
      add("experts_down", kernel("decode", R == 3 ? "experts_down_affine3" : "experts_down_affine4"), dim3(even(HID / 16, resident(shared))), 256, shared, a, TOPK * HID / 16 * (INTER / 64) * tile_bytes(R) / 1e6); }
  }
  kept = {{"q", q, HEADS * (NOPE + ROPE)}, {"ql", ql, HEADS * KVL}, {"partial", partial, (u64)HEADS * max_splits * (KVL + 4)}, {"ao", ao, HEADS * VD}, {"d_ao", d_ao, HEADS * VD / 64 * 36}, {"key", last_cache + position * (KVL + ROPE), (KVL + ROPE) / 2}};
  return x;
}
// By the clock of the first thread of each block of the last row_heads, where its folder was compiled with -DSTAGES.
static void print_stages(cudaStream_t s) {
  std::vector<u32> c(128 * 16);
  for (int way = 0; way < 2; way++) {
    pdl = way;
    double sums[16] = {}, last[16] = {};
    const int runs = 20;
    for (int i = 0; i < runs; i++) {
      for (auto& l : launches) launch(l, s);
      OK(cudaStreamSynchronize(s));
      CUdeviceptr at; size_t n;
      cuModuleGetGlobal(&at, &n, loaded()["latent"], "stage_clock");
      cuMemcpyDtoH(c.data(), at, n);
      // From when the last block no longer waits for the kernel before.
      u32 start = 0;
      for (int b = 0; b < 128; b++) if (!b || (int)(c[b * 16 + 2] - start) < 0) start = c[b * 16 + 2];
      for (int k = 0; k < 12; k++) {
        double sum = 0; int most = -1000000;
        for (int b = 0; b < 128; b++) { int d = (int)(c[b * 16 + k] - start); sum += d / 128.0; if (d > most) most = d; }
        sums[k] += sum / runs; last[k] += (double)most / runs;
      }
    }
    printf("stages%s, us from the first block's wait (mean, last):", way ? ", kernels overlap" : "");
    for (int k = 0; k < 12; k++) printf(" %d: %.2f %.2f", k, sums[k] / 1000, last[k] / 1000);
    printf("\n");
  }
}
static void compare(const std::string& folder, bool one) {
  for (auto& k : kept) {
    std::vector<float> mine(k.floats), other(k.floats);
    std::string path = folder + "/" + k.name, debug = std::string("debug_") + (strcmp(k.name, "partial") ? k.name : "parts");
    CUdeviceptr at; size_t n;
    bool parts = !strcmp(k.name, "partial");
    if (one && !strncmp(k.name, "d_", 2) == 0 && cuModuleGetGlobal(&at, &n, loaded()["latent"], debug.c_str()) == CUDA_SUCCESS) {
      std::vector<float> raw(n / 4);
      cuMemcpyDtoH(raw.data(), at, n);
      if (parts) { for (u32 h = 0; h < HEADS; h++) memcpy(&mine[(u64)h * 32 * (KVL + 4)], &raw[h * 16 * (KVL + 4)], 16 * (KVL + 4) * 4); }
      else mine = raw;
    } else OK(cudaMemcpy(mine.data(), k.p, k.floats * 4, cudaMemcpyDeviceToHost));
    FILE* f = fopen(path.c_str(), one ? "rb" : "wb");
    if (!f) { printf("%s is not there\n", path.c_str()); return; }
    if (!one) fwrite(mine.data(), 4, k.floats, f);
    else {
      if (fread(other.data(), 4, k.floats, f) != k.floats) printf("%s is short\n", path.c_str());
      u64 wrong = 0, first = 0; double worst = 0;
      for (u64 i = 0; i < k.floats; i++) {
        if (parts && i % (32 * (KVL + 4)) >= 16 * (KVL + 4)) continue;
        if (parts && (i % (KVL + 4) == 2 || i % (KVL + 4) == 3)) continue;
        if (memcmp(&mine[i], &other[i], 4)) { if (!wrong++) first = i; worst = std::max(worst, (double)fabsf(mine[i] - other[i])); }
      }
      printf("compare %s: %llu of %llu differ, first %llu (%g, expected %g), worst %g\n", k.name, wrong, k.floats, first, mine[first], other[first], worst);
    }
    fclose(f);
  }
}
int main(int argc, char** argv) {
  if (argc > 1) folder = argv[1];
  cudaStream_t s; OK(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking));
  float* x = build(ROUTED_BITS);
  fill_float<<<64, 256>>>(x, HID, 1.f, 0.f, 99);
  OK(cudaDeviceSynchronize());
  for (auto& l : launches) launch(l, s);
  OK(cudaStreamSynchronize(s));
  printf("== %s\nhash %016llx\n", argc > 2 ? argv[2] : folder.c_str(), fnv(x, HID * 4));
  if (getenv("COMPARE")) { compare(getenv("COMPARE"), getenv("HEADS") && *getenv("HEADS")); return 0; }
  run("chain", nullptr, 30, s);
  pdl = true; run("chain pdl", nullptr, 30, s); pdl = false;
  run_each(15, s);

  CUdeviceptr clocks; size_t bytes;
  if (loaded().count("latent") && cuModuleGetGlobal(&clocks, &bytes, loaded()["latent"], "stage_clock") == CUDA_SUCCESS) print_stages(s);
}
