// Times the kernels of a layer of GLM-5.2-77 (or, with QWEN, of Qwen3-30B-A3B) for one row: all of them, each alone, with and without programmatic dependent launch, in a graph of
// LAYERS layers with weights of their own, so that nothing stays in a cache. Prints a hash of the residual stream, by which variants of a kernel
// are compared. For experiments with kernels: it starts in seconds and needs no build of Moellon.
//
//     nvcc -std=c++20 -O2 -arch=sm_90 -Icrates/backend-cuda/kernels -DNO_KERNELS -DROUTED_BITS=3 -DCONTEXT=128 [-DQWEN] bench/decode_layer.cu -lcuda
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
#include "attention.cu"
#include "layer.cuh"
struct GqaArgs { AttendArgs attend; StepHeads heads; };

static RowInput norm_in(float* from, u32 cols, float* w) { RowInput in = {}; in.x = mat(from, cols); in.kind = 2; in.eps = 1e-6f; in.weight = w; return in; }
static void line(const char* tag, std::vector<std::pair<Packed, float*>> parts, RowInput in, float* residual, u32 cols, bool made) {
  LineArgs a = {}; u32 units = 0; double mb = 0; bool deep = DEEP && !strncmp(tag, "q", 1); u32 tall = deep ? 2 : 1;
  for (size_t i = 0; i < parts.size(); i++) { a.part[i].w = parts[i].first; a.part[i].out = mat(parts[i].second, parts[i].first.rows); a.first_unit[i] = units; units += parts[i].first.rows / (16 * tall); a.first_unit[i + 1] = units; mb += parts[i].first.rows * (cols / 64) * tile_bytes(4) / 16e6; }
  a.num_parts = parts.size(); a.slices = slices(cols); a.in = in; if (residual) a.residual = mat(residual, HID);
  u32 shared = 8 * ((deep ? 24 : 12) * tile_bytes(4) + 64) + (made ? cols / 64 * 144 : 0);
  u32 side = 8 / slices(cols);
  add(tag, kernel("decode", deep ? "deep_affine4" : "line_affine4"), dim3(even((units + side - 1) / side, resident(shared))), 256, shared, a, mb);
}
// The router, the choice and the experts of the row at `x`, beside a shared expert where there is one.
static void experts(float* x, int R, u32 layer, bool has_shared, Packed s_g, Packed s_u, Packed s_d) {
  static float *normed = floats(HID), *logits = floats(E), *h = floats(TOPK * INTER), *hs = floats(INTER), *plus = floats(HID), *out = floats(HID), *weights = floats(32);
  static u32* ids = (u32*)dev(128); static u8* d_x = (u8*)dev(HID / 64 * 144); static u8* d_h = (u8*)dev(TOPK * INTER / 64 * 144);
  static u32* arrived = (u32*)dev(4096 * 4);
  float* n4 = floats(HID, 0.1f, 1.f);
  Packed w_g = weight(E, INTER, HID, R), w_u = weight(E, INTER, HID, R), w_d = weight(E, HID, INTER, R);
  u16* router_w = (u16*)dev(E * HID * 2); fill_bf16<<<64, 256>>>(router_w, E * HID, 0.05f, seed_++);
  float* correction = floats(E, 0.3f);
  RouterArgs r = {}; r.weights = (u8*)router_w; r.out = mat(logits, E); r.in = norm_in(x, HID, n4); r.in.out = mat(normed, HID); r.in.out_digits = d_x; r.rows = E; r.cols = HID;
  RouteArgs c = {}; c.logits = mat(logits, E); c.weights = mat(weights, TOPK); c.correction_bias = has_shared ? correction : nullptr; c.ids = ids; c.ids_stride = TOPK; c.scoring = has_shared ? 0 : 1; c.n_group = 1; c.topk_group = 1; c.norm_topk_prob = 1; c.top_k = TOPK; c.factor = has_shared ? 2.5f : 1.f;
  double mb_router = E * HID * 2e-6, mb_pair = has_shared ? 2 * INTER / 16 * (HID / 64) * tile_bytes(4) / 1e6 : 0, mb_up = 2 * INTER / 16 * (HID / 64) * (TOPK * tile_bytes(R)) / 1e6, mb_plus = has_shared ? HID / 16 * (INTER / 64) * tile_bytes(4) / 1e6 : 0, mb_down = TOPK * HID / 16 * (INTER / 64) * tile_bytes(R) / 1e6;
  LineArgs second = {}; second.part[0].w = s_d; second.part[0].out = mat(plus, HID); second.first_unit[1] = HID / 16; second.num_parts = 1; second.slices = slices(INTER); second.in.x = mat(hs, INTER); second.in.kind = 1;
  DownArgs d = {}; d.w = w_d; d.weights = mat(weights, TOPK); if (has_shared) d.plus = mat(plus, HID); d.out = mat(out, HID); d.residual = mat(x, HID); d.ids = ids; d.x = d_h; d.part_bytes = INTER / 64 * 144; d.slices = slices(INTER); d.top_k = TOPK;
  u32 shared_down = 8 * (12 * tile_bytes(R) + 64) + 2 * TOPK * d.slices * 64;
  { PairArgs a = {}; a.router = r; a.route = c; a.arrived = arrived; a.router_kind = 2; a.in = norm_in(x, HID, n4); a.slices = slices(HID);
    u32 shared = 0, blocks = E;
    if (has_shared) { a.pair = {s_g, s_u, mat(hs, INTER), nullptr}; shared = 8 * (12 * tile_bytes(4) + 64) + HID / 64 * 144; blocks += even(INTER / 16, resident(shared) - E); }
    add("router_pair", kernel("decode", "pair_affine4"), dim3(blocks), 256, shared, a, mb_router + mb_pair); }
  { UpArgs a = {}; a.slices = slices(HID); a.routed = {w_g, w_u, mat(h, TOPK * INTER), d_x}; a.ids = ids; a.top_k = TOPK; a.h_digits = d_h; a.arrived = arrived;
    u32 ring = 8 * (12 * tile_bytes(R) + 64), units_r = TOPK * INTER / 16 / (8 / slices(HID)), total = even(units_r, resident(ring));
    if (has_shared) { a.shared = second; ring = std::max(ring, 8 * (12 * tile_bytes(4) + 64) + INTER / 64 * 144);
      u32 most = resident(ring), units_s = HID / 16 / 2, best = 1; u64 best_t = ~0ull;
      for (u32 b = 1; b < most; b++) { u64 tt = std::max<u64>((u64)((units_s + b - 1) / b) * 2 * (INTER / 64) * tile_bytes(4), (u64)((units_r + most - b - 1) / (most - b)) * 2 * (HID / 64) * tile_bytes(R)); if (tt < best_t) { best_t = tt; best = b; } }
      a.shared_blocks = even(units_s, best); total = a.shared_blocks + even(units_r, most - best); }
    if (layer == 0) printf("up: %u + %u blocks\n", a.shared_blocks, total - a.shared_blocks);
    add("up", kernel("decode", R == 3 ? "up_affine3_affine4" : "up_affine4_affine4"), dim3(total), 256, ring, a, mb_up + mb_plus); }
  add("experts_down", kernel("decode", R == 3 ? "experts_down_affine3" : "experts_down_affine4"), dim3(even(HID / 16, resident(shared_down))), 256, shared_down, d, mb_down);
}
#ifdef QWEN
static float* build(int R) {
  float* x = floats(HID, 1.f); float *q = floats(HEADS * HEAD), *k = floats(KV_HEADS * HEAD), *v = floats(KV_HEADS * HEAD), *ao = floats(HEADS * HEAD), *o = floats(HID);
  u8* d_ao = (u8*)dev(HEADS * HEAD / 64 * 144); u32* arrived = (u32*)dev(4096 * 4);
  float* table = floats(HEAD, 0.5f); u32 max_splits = 32; float* partial = floats((u64)HEADS * max_splits * (HEAD + 4));
  u32 position = CONTEXT; u32* positions = (u32*)dev(64); OK(cudaMemcpy(positions, &position, 4, cudaMemcpyHostToDevice));
  u32* sequences = (u32*)dev(64); u32 blocks_table[64]; for (int i = 0; i < 64; i++) blocks_table[i] = i; u32* bt = (u32*)dev(256); OK(cudaMemcpy(bt, blocks_table, 256, cudaMemcpyHostToDevice));
  u32* slots = (u32*)dev(64); OK(cudaMemcpy(slots, &position, 4, cudaMemcpyHostToDevice));
  for (int layer = 0; layer < LAYERS; layer++) {
    float *n1 = floats(HID, 0.1f, 1.f), *n2 = floats(HEAD, 0.1f, 1.f), *n3 = floats(HEAD, 0.1f, 1.f);
    u32 width = 2 * KV_HEADS * HEAD; u16* cache = (u16*)dev(64 * 32 * width * 2); fill_bf16<<<64, 256>>>(cache, 64 * 32 * width, 1.f, seed_++);
    Packed w_q = weight(1, HEADS * HEAD, HID, 4), w_k = weight(1, KV_HEADS * HEAD, HID, 4), w_v = weight(1, KV_HEADS * HEAD, HID, 4), w_o = weight(1, HID, HEADS * HEAD, 4);
    line("qkv", {{w_q, q}, {w_k, k}, {w_v, v}}, norm_in(x, HID, n1), nullptr, HID, true);
    GqaArgs g = {}; AttendArgs& t = g.attend;
    t.q = mat(q, HEADS * HEAD); t.out = mat(ao, HEADS * HEAD); t.cache = cache; t.partial = partial; t.paging = {positions, sequences, bt, 64, 32};
    t.num_heads = HEADS; t.heads_per_block = 8; t.heads_per_key = 8; t.q_dim = HEAD; t.cache_width = width; t.cache_bf16 = 1; t.value_dim = HEAD; t.max_splits = max_splits; t.scale = 0.088f;
    t.key_step = HEAD; t.value_first = KV_HEADS * HEAD; t.value_step = HEAD;
    StepHeads& s = g.heads; s.k = mat(k, KV_HEADS * HEAD); s.v = mat(v, KV_HEADS * HEAD); s.table = mat(table, HEAD); s.q_norm = n2; s.k_norm = n3; s.slots = slots; s.cache = cache; s.digits = d_ao; s.arrived = arrived; s.rows = 1; s.eps = 1e-6f; s.early = 1;
    u32 stride = HEAD + 8, shared = 4 * 8 * HEAD + 2 * 32 * stride * 2 + 4 * 9 * HEAD;
    add("gqa", kernel("gqa", "gqa2_bf16"), dim3(std::min(max_splits, (u32)(CONTEXT + 1 + 31) / 32), HEADS / 8, 1), 288, shared, g, 0.15);
    { RowInput in = {}; in.digits = d_ao; line("o_proj", {{w_o, o}}, in, x, HEADS * HEAD, false); }
    Packed none = {};
    experts(x, R, layer, false, none, none, none);
  }
  return x;
}
#else

// The chain of kernels as crates/backend-cuda/src/backend/decode.rs launches it.
static float* build(int R) {
  float* x = floats(HID, 1.f);
  float* qa = floats(QL); float* kv = floats(KVL + ROPE); float* q = floats(HEADS * (NOPE + ROPE)); float* ql = floats(HEADS * KVL);
  float* ao = floats(HEADS * VD); float* out = floats(HID);
  u8* d_ao = (u8*)dev(HEADS * VD / 64 * 144);
  float* table = floats(ROPE, 0.5f);
  u32 max_splits = 32; float* partial = floats((u64)HEADS * max_splits * (KVL + 4));
  u32 position = CONTEXT; u32* positions = (u32*)dev(64); OK(cudaMemcpy(positions, &position, 4, cudaMemcpyHostToDevice));
  u32* sequences = (u32*)dev(64); u32 blocks_table[64]; for (int i = 0; i < 64; i++) blocks_table[i] = i; u32* bt = (u32*)dev(256); OK(cudaMemcpy(bt, blocks_table, 256, cudaMemcpyHostToDevice));
  u32* slots = (u32*)dev(64); OK(cudaMemcpy(slots, &position, 4, cudaMemcpyHostToDevice));
  for (int layer = 0; layer < LAYERS; layer++) {
    float* n1 = floats(HID, 0.1f, 1.f); float* n2 = floats(QL, 0.1f, 1.f); float* n3 = floats(KVL, 0.1f, 1.f);
    u16* cache = (u16*)dev(64 * 32 * 576 * 2); fill_bf16<<<64, 256>>>(cache, 64 * 32 * 576, 1.f, seed_++);
    Packed w_qa = weight(1, QL, HID, 4), w_kv = weight(1, KVL + ROPE, HID, 4), w_qb = weight(1, HEADS * (NOPE + ROPE), QL, 4);
    Packed w_k = weight(HEADS, KVL, NOPE, 4), w_v = weight(HEADS, VD, KVL, 4), w_o = weight(1, HID, HEADS * VD, 4);
    Packed s_g = weight(1, INTER, HID, 4), s_u = weight(1, INTER, HID, 4), s_d = weight(1, HID, INTER, 4);
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
      add(tag, kernel("decode", "heads_affine4"), dim3((w.rows / 16 + side - 1) / side, HEADS + (latent ? 1 : 0)), 256, shared, a, HEADS * w.rows / 16.0 * ((w.cols + 63) / 64) * tile_bytes(4) / 1e6);
    };
    heads("heads_k", w_k, q, NOPE + ROPE, ql, nullptr, false, true);
    { u32 stride = KVL + ROPE + 8, shared = 2 * (32 + 32) * stride + 2 * 16 * 4 * 33 + 2 * 16 * 2 * 40; u32 splits = 32, b = std::min(132u * 2 / 4, splits); add("attend", kernel("attention", "attend_mla"), dim3(b, HEADS / 16, 1), 256, shared, t, 0.15); }
    heads("heads_v", w_v, nullptr, 0, ao, d_ao, true, false);
    { RowInput in = {}; in.digits = d_ao; line("o_proj", {{w_o, out}}, in, x, HEADS * VD, false); }
    experts(x, R, layer, true, s_g, s_u, s_d);
  }
  return x;
}
#endif
int main(int argc, char** argv) {
  if (argc > 1) folder = argv[1];
  cudaStream_t s; OK(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking));
  float* x = build(ROUTED_BITS);
  fill_float<<<64, 256>>>(x, HID, 1.f, 0.f, 99);
  OK(cudaDeviceSynchronize());
  for (auto& l : launches) launch(l, s);
  OK(cudaStreamSynchronize(s));
  printf("== %s\nhash %016llx\n", argc > 2 ? argv[2] : folder.c_str(), fnv(x, HID * 4));
  run("chain", nullptr, 30, s);
  pdl = true; run("chain pdl", nullptr, 30, s); pdl = false;
  run_each(15, s);
}
