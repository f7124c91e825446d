// Times the dense products of a layer of GLM-5.2-77 for NUM_ROWS rows (few_line of few.cu), as decode_layer.cu does for one row, and prints a hash of
// their results.
//
//     nvcc -std=c++20 -O2 -arch=sm_90 -Icrates/backend-cuda/kernels -DNO_KERNELS -DNUM_ROWS=32 bench/few_layer.cu -lcuda
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
#include "few.cu"
#include "layer.cuh"

#ifndef NUM_ROWS
#define NUM_ROWS 32
#endif
static u32 shares_of(u32 groups, u32 slices, u32 tiles) {
  double hidden = NUM_ROWS <= 8 ? 1.5 : NUM_ROWS <= 16 ? 2 : 3, best = 1e30; u32 found = 1;
  for (u32 n = 1; n <= slices; n *= 2) {
    double blocks = groups * n / 132.0; if (blocks <= 3) blocks = std::ceil(blocks);
    double time = ((tiles + n - 1) / n) * std::max(blocks, hidden) + (n > 1 ? 20 : 0);
    if (time < best) { best = time; found = n; }
  }
  return found;
}
static std::vector<std::pair<float*, u64>> outputs;

// As crates/backend-cuda/src/backend/few.rs launches it.
static void line(const char* tag, std::vector<u32> part_rows, u32 cols, u32 heads, bool residual) {
  const u32 variant = NUM_ROWS <= 4 ? 4 : NUM_ROWS <= 8 ? 8 : NUM_ROWS <= 16 ? 16 : 32;
  FewLineArgs a = {}; double mb = 0; u32 units = 0;
  for (u32 i = 0; i < part_rows.size(); i++) {
    u32 rows = part_rows[i];
    Mat m = {}; m.p = floats((u64)NUM_ROWS * rows * heads); m.rows = NUM_ROWS; m.cols = m.stride = rows * heads;
    outputs.push_back({m.p, (u64)NUM_ROWS * rows * heads * 4});
    a.part[i].w = weight(heads, rows, cols, 4); a.part[i].out = m; a.first_unit[i] = units; units += (rows + 127) / 128; a.first_unit[i + 1] = units;
    mb += heads * (rows / 16.0) * ((cols + 63) / 64) * tile_bytes(4) / 1e6;
  }
  a.num_parts = part_rows.size(); a.slices = slices(cols); a.rows = NUM_ROWS; a.matrices = heads;
  u32 tiles = (cols + 63) / 64, bytes = tiles * DIGITS_BYTES;
  u8* digits = (u8*)dev((u64)NUM_ROWS * heads * bytes);
  fill_digits<<<256, 256>>>(digits, (u64)NUM_ROWS * heads * tiles, seed_++);
  a.x = digits; a.x_bytes = (u64)bytes * heads; a.x_matrix_bytes = bytes;
  if (residual) { Mat m = {}; m.p = floats((u64)NUM_ROWS * part_rows[0], 1.f); m.rows = NUM_ROWS; m.cols = m.stride = part_rows[0]; a.residual = m; }
  u32 groups = units * heads;
  a.shares = shares_of(groups, a.slices, tiles);
  a.sums = floats((u64)groups * a.slices * 16 * 2 * 4 * std::max(8u, variant)); a.arrived = (u32*)dev(65536);
  std::string name = "few_line" + std::to_string(variant) + "_affine4";
  CUfunction f = kernel("few", name.c_str());
  u32 C = variant == 32 ? 2 : 4, D = variant == 32 ? 3 : 2;
  u32 shared = 4 * (D * C * 2 * tile_bytes(4) + 64) + 3 * (variant * C * 144 + 16) + 4 * 32 * 4 * variant;
  int fit = 0; cuOccupancyMaxActiveBlocksPerMultiprocessor(&fit, f, 160, shared);
  u32 most = 132 * fit, total = groups * a.shares, blocks = total <= 2 * most ? even(total, most) : most;
  static std::map<std::string, bool> seen;
  if (!seen[tag]) printf("%s: %u shares, %u units, %u blocks of %u\n", tag, a.shares, total, blocks, most);
  seen[tag] = true;
  add(tag, f, dim3(blocks), 160, shared, a, mb);
}
#ifdef STAMPS
// Of kernels that write their clock: the mean over blocks of each stage, in us from the first block's start.
static void print_stamps(cudaStream_t s) {
  CUmodule m; CUdeviceptr at; size_t bytes;
  std::string path = folder + "/few.cubin";
  cuModuleLoad(&m, path.c_str()); cuModuleGetGlobal(&at, &bytes, m, "stamps");
  std::string seen;
  for (auto& l : launches) {
    if (seen.find(l.tag) != std::string::npos) continue;
    seen += l.tag;
    std::string name = "few_line" + std::to_string(NUM_ROWS <= 8 ? 8 : 32) + "_affine4";
    cuModuleGetFunction(&l.fn, m, name.c_str());
    cuFuncSetAttribute(l.fn, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, 200 << 10);
    std::vector<u64> t(bytes / 8);
    double sums[8] = {}, counts[8] = {}, most[8] = {};
    for (int run = 0; run < 5; run++) {
      cuMemsetD8(at, 0, bytes); OK(cudaDeviceSynchronize());
      launch(l, s); OK(cudaStreamSynchronize(s));
      cuMemcpyDtoH(t.data(), at, bytes);
      if (run == 0) continue;
      u64 start = ~0ull;
      for (u32 b = 0; b < l.grid.x; b++) start = std::min(start, t[b * 8]);
      for (u32 b = 0; b < l.grid.x; b++) for (int i = 0; i < 8; i++) if (t[b * 8 + i]) { double us = (t[b * 8 + i] - start) * 1e-3; sums[i] += us; counts[i]++; most[i] = std::max(most[i], us); }
    }
    printf("%-16s", l.tag);
    for (int i = 0; i < 8; i++) printf(" %5.1f/%5.1f", counts[i] ? sums[i] / counts[i] : 0., most[i]);
    printf("\n");
  }
}
#endif
int main(int argc, char** argv) {
  if (argc > 1) folder = argv[1];
  cudaStream_t s; OK(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking));
  printf("== %s, %d rows\n", argc > 2 ? argv[2] : folder.c_str(), NUM_ROWS);
  for (int layer = 0; layer < LAYERS; layer++) {
    line("queries, latent", {QL, KVL + ROPE}, HID, 1, false);
    line("queries, second", {HEADS * (NOPE + ROPE)}, QL, 1, false);
    line("keys", {KVL}, NOPE, HEADS, false);
    line("values", {VD}, KVL, HEADS, false);
    line("output", {HID}, HEADS * VD, 1, true);
    line("shared, second", {HID}, INTER, 1, false);
  }
  OK(cudaDeviceSynchronize());
  for (auto& l : launches) launch(l, s);
  OK(cudaStreamSynchronize(s));
  u64 hash = 0;
  for (auto& o : outputs) hash = hash * 31 + fnv(o.first, o.second);
  printf("hash %016llx\n", hash);
  run("all", nullptr, 30, s);
  pdl = true; run("all, overlap", nullptr, 30, s); pdl = false;
  run_each(15, s);
#ifdef STAMPS
  print_stamps(s);
#endif
}
