// Dense products of a layer of GLM-5.2-77 for NUM_ROWS rows: every size of the kernels of lines.cu that fits, against few_line of few.cu, in time and bits.
//
//     nvcc -std=c++20 -O2 -arch=sm_90a -Icrates/backend-cuda/kernels -DNO_KERNELS -DNUM_ROWS=32 bench/line_sizes.cu -lcuda
//     ./a.out FOLDER  # of few.cubin and lines.cubin
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
#include "few.cu"
#include "lines.cu"
#include "layer.cuh"

#ifndef NUM_ROWS
#define NUM_ROWS 32  // 9 to 32
#endif
static const u32 ROWS_OF_KERNEL = NUM_ROWS <= 16 ? 16 : 32;
static u32 shares_of(u32 groups, u32 slices, u32 tiles) {
  double hidden = NUM_ROWS <= 8 ? 1.5 : NUM_ROWS <= 16 ? 2 : 3, best = 1e30; u32 found = 1;
  for (u32 n = 1; n <= slices; n *= 2) {
    double blocks = groups * n / 132.0; if (blocks <= 3) blocks = std::ceil(blocks);
    double time = ((tiles + n - 1) / n) * std::max(blocks, hidden) + (n > 1 ? 20 : 0);
    if (time < best) { best = time; found = n; }
  }
  return found;
}

struct Shape { const char* tag; std::vector<u32> part_rows; u32 cols, heads; bool residual; u32 layers; };
static const std::vector<Shape> SHAPES = {
  {"output", {HID}, HEADS * VD, 1, true, LAYERS}, {"queries, second", {HEADS * (NOPE + ROPE)}, QL, 1, false, LAYERS}, {"queries, latent", {QL, KVL + ROPE}, HID, 1, false, LAYERS},
  {"shared, second", {HID}, INTER, 1, false, LAYERS}, {"keys", {KVL}, NOPE, HEADS, false, LAYERS}, {"values", {VD}, KVL, HEADS, false, LAYERS},
  {"head", {154880}, HID, 1, false, 1},
};
struct Kernel { u32 row_tiles, tiles, warps; };
static const std::vector<Kernel> KERNELS_OF_LINES = {{1, 4, 16}, {3, 2, 8}, {4, 2, 8}};

// A product's weights and activations in one layer, as the arguments of few_line.
struct Args : FewLineArgs { float* sums_of_lines; u32* counters_of_lines; u64 floats_of_lines; };
static Args few_args(const Shape& p) {
  Args a = {}; u32 units = 0;
  for (u32 i = 0; i < p.part_rows.size(); i++) {
    u32 rows = p.part_rows[i];
    Mat m = {}; m.p = floats((u64)NUM_ROWS * rows * p.heads); m.rows = NUM_ROWS; m.cols = m.stride = rows * p.heads;
    a.part[i].w = weight(p.heads, rows, p.cols, 4); a.part[i].out = m; a.first_unit[i] = units; units += (rows + 127) / 128; a.first_unit[i + 1] = units;
  }
  a.num_parts = p.part_rows.size(); a.slices = slices(p.cols); a.rows = NUM_ROWS; a.matrices = p.heads;
  u32 tiles = (p.cols + 63) / 64, bytes = tiles * DIGITS_BYTES;
  u8* digits = (u8*)dev((u64)NUM_ROWS * p.heads * bytes);
  fill_digits<<<256, 256>>>(digits, (u64)NUM_ROWS * p.heads * tiles, seed_++);
  a.x = digits; a.x_bytes = (u64)bytes * p.heads; a.x_matrix_bytes = bytes;
  if (p.residual) { Mat m = {}; m.p = floats((u64)NUM_ROWS * p.part_rows[0]); m.rows = NUM_ROWS; m.cols = m.stride = p.part_rows[0]; a.residual = m; }
  u32 groups = units * p.heads;
  a.shares = shares_of(groups, a.slices, tiles);
  a.sums = floats((u64)groups * a.slices * 16 * 2 * 4 * std::max(8u, ROWS_OF_KERNEL)); a.arrived = (u32*)dev(65536);
  a.floats_of_lines = p.layers > 1 ? 12 << 20 : 64 << 20; a.sums_of_lines = floats(a.floats_of_lines); a.counters_of_lines = (u32*)dev(65536);
  return a;
}
static double mb_of(const Shape& p) {
  double mb = 0;
  for (u32 rows : p.part_rows) mb += p.heads * (rows / 16.0) * ((p.cols + 63) / 64) * tile_bytes(4) / 1e6;
  return mb;
}
static Launch make(const Shape& p, CUfunction f, u32 grid, u32 block, u32 shared, const void* args, size_t bytes, u32 cluster) {
  Launch l; l.tag = p.tag; l.fn = f; l.grid = dim3(grid); l.block = block; l.shared = shared; l.mb = mb_of(p); l.cluster = cluster;
  l.args.assign((const char*)args, (const char*)args + bytes);
  return l;
}
static Launch few(const Shape& p, const FewLineArgs& a) {
  u32 C = ROWS_OF_KERNEL == 32 ? 2 : 4, D = ROWS_OF_KERNEL == 32 ? 3 : 2;
  CUfunction f = kernel("few", ("few_line" + std::to_string(ROWS_OF_KERNEL) + "_affine4").c_str());
  u32 shared = 4 * (D * C * 2 * tile_bytes(4) + 64) + 3 * (ROWS_OF_KERNEL * C * 144 + 16) + 4 * 32 * 4 * ROWS_OF_KERNEL;
  int fit = 0; cuOccupancyMaxActiveBlocksPerMultiprocessor(&fit, f, 160, shared);
  u32 most = 132 * fit, total = a.first_unit[a.num_parts] * a.matrices * a.shares;
  return make(p, f, total <= 2 * most ? even(total, most) : most, 160, shared, &a, sizeof(FewLineArgs), 1);
}
struct Size_ { u32 cluster; bool global; u32 warps; Kernel kernel; };  // `global`: blocks of a unit are no cluster, sums go through the second-level cache
// False if that size does not fit.
static bool lines_launch(Launch& l, const Shape& p, const Args& few, Size_ z, u32 most_depth) {
  LinesArgs a = {};
  u32 S = few.slices, R = z.kernel.row_tiles, C = z.kernel.tiles;
  if (S % z.cluster || z.warps > z.kernel.warps || (z.global && z.cluster == 1)) return false;
  u32 own = S / z.cluster;
  if (z.warps % own) return false;
  u32 unit = z.warps / own * R, tiles = (p.cols + 63) / 64, units = 0, most_tiles = 0;
  for (u32 i = 0; i < few.num_parts; i++) { a.part[i] = few.part[i]; a.first_unit[i] = units; units += ((p.part_rows[i] + 15) / 16 + unit - 1) / unit; a.first_unit[i + 1] = units; }
  for (u32 r = 0; r < z.cluster; r++) most_tiles = std::max(most_tiles, (r + 1) * own * tiles / S - r * own * tiles / S);
  if (most_tiles > 8 * 16) return false;
  a.num_parts = few.num_parts; a.slices = S; a.rows = NUM_ROWS; a.x = few.x; a.x_bytes = few.x_bytes; a.matrices = few.matrices; a.x_matrix_bytes = few.x_matrix_bytes; a.residual = few.residual;
  units *= p.heads;
  u32 x = most_tiles * ROWS_OF_KERNEL * 136, sums = z.global ? 0 : own * ROWS_OF_KERNEL * (unit * 16 + 8) * 4, slot = R * C * tile_bytes(4), all = 226 << 10;
  u32 count = (tiles + S - 1) / S, useful = (count + C - 1) / C, depth = std::min(most_depth, useful);
  a.depth = depth; a.x_at = (z.warps * (depth * slot + 128) + 1023) / 1024 * 1024;
  u32 shared = a.x_at + std::max(x, sums);
  if (shared > all) return false;
  if (z.global) {
    if ((u64)units * S * ROWS_OF_KERNEL * (unit * 16 + 8) > few.floats_of_lines || units * z.cluster > 132) return false;
    a.shares = z.cluster; a.sums = few.sums_of_lines; a.arrived = few.counters_of_lines;
    shared = std::max(shared, 118u << 10);  // one block a multiprocessor: all of them are resident
  }
  CUfunction f = kernel("lines", ("lines" + std::to_string(ROWS_OF_KERNEL) + "_" + std::to_string(R) + "_affine4").c_str());
  cuFuncSetAttribute(f, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, all);
  l = make(p, f, units * z.cluster, 32 * z.warps, shared, &a, sizeof a, z.global ? 1 : z.cluster);
  if (z.global) return l.grid.x >= 60;
  CUlaunchConfig c = {};
  c.gridDimX = l.grid.x; c.gridDimY = c.gridDimZ = 1; c.blockDimX = l.block; c.blockDimY = c.blockDimZ = 1; c.sharedMemBytes = l.shared;
  CUlaunchAttribute at[1]; at[0].id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION; at[0].value.clusterDim.x = z.cluster; at[0].value.clusterDim.y = at[0].value.clusterDim.z = 1;
  c.attrs = at; c.numAttrs = 1;
  int clusters = 0;
  if (cuOccupancyMaxActiveClusters(&clusters, f, &c)) return false;
  // All of them at a time, on at least half of the multiprocessors.
  return l.grid.x >= 60 && (p.heads > 1 || units <= (u32)clusters);
}
static __device__ u32 differ;
__global__ void compare(const u32* a, const u32* b, u64 n) { for (u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x; i < n; i += (u64)gridDim.x * blockDim.x) if (a[i] != b[i]) atomicAdd(&differ, 1); }

// What a launch wrote, against what few_line did.
struct Reference {
  std::vector<std::pair<float*, float*>> pairs; std::vector<u64> sizes; float* residual = nullptr; u64 residual_n = 0;
  void clear(const Shape& p, const FewLineArgs& a) {
    for (u32 i = 0; i < a.num_parts; i++) OK(cudaMemset(a.part[i].out.p, 0xff, (u64)NUM_ROWS * p.part_rows[i] * p.heads * 4));
    if (p.residual) fill_float<<<64, 256>>>(a.residual.p, (u64)NUM_ROWS * p.part_rows[0], 1.f, 0.f, 77);
    OK(cudaDeviceSynchronize());
  }
  static void keep(float* from, float* to, u64 n) { OK(cudaMemcpy(to, from, n * 4, cudaMemcpyDeviceToDevice)); }
  void take(const Shape& p, const FewLineArgs& a) {
    for (u32 i = 0; i < a.num_parts; i++) { u64 n = (u64)NUM_ROWS * p.part_rows[i] * p.heads; float* to = floats(n); keep(a.part[i].out.p, to, n); pairs.push_back({a.part[i].out.p, to}); sizes.push_back(n); }
    if (p.residual) { u64 n = (u64)NUM_ROWS * p.part_rows[0]; float* to = floats(n); keep(a.residual.p, to, n); pairs.push_back({a.residual.p, to}); sizes.push_back(n); }
  }
  u32 differences() {
    u32 zero = 0, found = 0;
    OK(cudaMemcpyToSymbol(differ, &zero, 4));
    for (u32 i = 0; i < pairs.size(); i++) compare<<<128, 256>>>((u32*)pairs[i].first, (u32*)pairs[i].second, sizes[i]);
    OK(cudaMemcpyFromSymbol(&found, differ, 4));
    return found;
  }
};
int main(int argc, char** argv) {
  if (argc > 1) folder = argv[1];
  FILE* log = fopen(argc > 2 ? argv[2] : "/dev/null", "a");
  setvbuf(stdout, nullptr, _IOLBF, 0); setvbuf(log, nullptr, _IOLBF, 0);
  cudaStream_t s; OK(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking));
  printf("== %s, %d rows\n", folder.c_str(), NUM_ROWS);
  std::vector<Launch> base_all, best_all;
  for (auto& p : SHAPES) {
    std::vector<Args> args; std::vector<Launch> base;
    for (u32 layer = 0; layer < p.layers; layer++) { args.push_back(few_args(p)); base.push_back(few(p, args.back())); }
    auto pointers = [](std::vector<Launch>& v) { std::vector<Launch*> r; for (auto& l : v) r.push_back(&l); return r; };
    Reference ref;
    ref.clear(p, args[0]); launch(base[0], s); OK(cudaStreamSynchronize(s)); ref.take(p, args[0]);
    auto time_of = [&](std::vector<Launch>& v) { return time_graph(pointers(v), 7, s) / p.layers; };
    double before = time_of(base);
    fprintf(log, "%d rows %s: few_line %.2f us, %.1f MB\n", NUM_ROWS, p.tag, before, mb_of(p));
    struct Found { double us; Size_ z; u32 depth, shared, blocks; std::vector<Launch> v; double overlap = 0; };
    std::vector<Found> found; std::vector<Launch> best_launches; u32 wrong = 0;
    for (auto& k : KERNELS_OF_LINES)
      for (u32 which = 1; which < 9; which++)
        for (u32 warps : {4u, 6u, 8u, 10u, 12u, 14u, 16u})
          for (u32 depth : {1u, 2u, 16u}) {
            u32 cluster = 1 << which / 2; bool global = which % 2 == 0;
            if (cluster > 8) continue;
            if (which % 2 == 1) cluster = 1 << (which - 1) / 2;
            Size_ z = {cluster, global, warps, k};
            std::vector<Launch> v;
            for (u32 layer = 0; layer < p.layers; layer++) { Launch l; if (!lines_launch(l, p, args[layer], z, depth)) break; v.push_back(l); }
            if (v.size() < p.layers) continue;
            u32 real = ((LinesArgs*)v[0].args.data())->depth;
            if (real < depth && depth < 16) continue;  // measured already
            if (depth == 16 && real <= 2) continue;
            ref.clear(p, args[0]); launch(v[0], s);
            if (cudaStreamSynchronize(s) != cudaSuccess) { printf("%s: cluster %u%s warps %u kernel %u %u %u fails: %s\n", p.tag, cluster, global ? "g" : "", warps, k.row_tiles, k.tiles, k.warps, cudaGetErrorString(cudaGetLastError())); return 1; }
            u32 different = ref.differences();
            double us = time_of(v);
            fprintf(log, "%d rows %s: cluster %u%s warps %u kernel %u_%u_%u depth %u shared %u blocks %u: %.2f us, %u differ\n", NUM_ROWS, p.tag, cluster, global ? "g" : "", warps, k.row_tiles, k.tiles, k.warps, real, v[0].shared, v[0].grid.x, us, different);
            if (different) { wrong++; continue; }
            found.push_back({us, z, real, v[0].shared, v[0].grid.x, v});
          }
    std::sort(found.begin(), found.end(), [](auto& a, auto& b) { return a.us < b.us; });
    // Of the fastest alone, the fastest behind each other with overlap.
    pdl = true;
    double overlapped = time_of(base);
    if (found.size() > 24) found.resize(24);
    for (auto& f : found) { f.overlap = time_of(f.v); fprintf(log, "overlap %.2f: cluster %u%s warps %u kernel %u_%u_%u depth %u\n", f.overlap, f.z.cluster, f.z.global ? "g" : "", f.z.warps, f.f.z.kernel.row_tiles, f.z.kernel.tiles, f.z.kernel.warps, f.depth); }
    pdl = false;
    printf("%-15s few_line %.1f/%.1f; %u wrong", p.tag, before, overlapped, wrong);
    auto show = [&](Found& f) { printf("; %.1f/%.1f (K%u%s W%u %u_%u_%u D%u, %u)", f.us, f.overlap, f.z.cluster, f.z.global ? "g" : "", f.z.warps, f.f.z.kernel.row_tiles, f.z.kernel.tiles, f.z.kernel.warps, f.depth, f.blocks); };
    for (u32 i = 0; i < found.size() && i < 2; i++) show(found[i]);
    std::sort(found.begin(), found.end(), [](auto& a, auto& b) { return a.overlap < b.overlap; });
    if (!found.empty()) { printf(" | "); show(found[0]); if (found[0].overlap < overlapped) best_launches = found[0].v; }
    printf("\n");
    if (p.layers > 1) { base_all.insert(base_all.end(), base.begin(), base.end()); auto& b = best_launches.empty() ? base : best_launches; best_all.insert(best_all.end(), b.begin(), b.end()); }
  }
  for (bool overlap : {false, true})
    for (auto* v : {&base_all, &best_all}) {
      pdl = overlap;
      std::vector<Launch*> list;
      for (u32 layer = 0; layer < LAYERS; layer++) for (u32 i = layer; i < v->size(); i += LAYERS) list.push_back(&(*v)[i]);
      printf("six products%s, %s: %.2f us\n", overlap ? ", overlap" : "", v == &base_all ? "few_line" : "lines", time_graph(list, 21, s) / LAYERS);
    }
}
