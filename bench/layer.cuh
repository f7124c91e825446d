// What the programs here that time kernels of a layer of GLM-5.2-77 share: weights, activations, graphs. Included behind the kernels.
#define OK(x) do { cudaError_t e_ = (x); if (e_ != cudaSuccess) { printf("%s:%d %s\n", __FILE__, __LINE__, cudaGetErrorString(e_)); exit(1); } } while (0)

#ifndef BLOCKS
#define BLOCKS 3
#endif
#ifndef ROUTED_BITS
#define ROUTED_BITS 3
#endif
#ifndef DEEP
#define DEEP 0
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
// Tiles of digits, with scales and sums that fit them roughly.
__global__ void fill_digits(u8* p, u64 tiles, u32 seed) {
  for (u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x; i < tiles * 36; i += (u64)gridDim.x * blockDim.x) {
    u64 z = i * 0x9e3779b97f4a7c15ull + seed * 0xbf58476d1ce4e5b9ull; z ^= z >> 30; z *= 0xbf58476d1ce4e5b9ull; z ^= z >> 27; z *= 0x94d049bb133111ebull; z ^= z >> 31;
    ((u32*)p)[i] = i % 36 < 32 ? (u32)z & 0x3f3f3f3fu : __float_as_uint(1e-4f);
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

// Kernels come from a folder of CUBINs, as nvrtc_check.py writes them, unpacked: a variant needs no build of this program.
static std::string folder = ".";
static std::map<std::string, CUmodule>& loaded() {
  static std::map<std::string, CUmodule> modules;
  return modules;
}
static CUfunction kernel(const char* file, const char* name) {
  std::map<std::string, CUmodule>& modules = loaded();
  CUmodule& module = modules[file];
  std::string path = folder + "/" + file + ".cubin";
  if (!module && cuModuleLoad(&module, path.c_str()) != CUDA_SUCCESS) { printf("%s does not load\n", path.c_str()); exit(1); }
  CUfunction f;
  if (cuModuleGetFunction(&f, module, name) != CUDA_SUCCESS) { printf("%s has no kernel %s\n", path.c_str(), name); exit(1); }
  cuFuncSetAttribute(f, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, 222 << 10);
  return f;
}
struct Launch { const char* tag; CUfunction fn; dim3 grid; u32 block, shared; std::vector<char> args; double mb; u32 cluster = 1; };
static std::vector<Launch> launches;
template <typename A> static void add(const char* tag, CUfunction fn, dim3 grid, u32 block, u32 shared, A a, double mb) {
  Launch l; l.tag = tag; l.fn = fn; l.grid = grid; l.block = block; l.shared = shared; l.mb = mb;
  if (const char* pad = getenv((std::string("PAD_") + tag).c_str())) l.shared = std::max(l.shared, (u32)atoi(pad));
  l.args.resize(sizeof(A)); memcpy(l.args.data(), &a, sizeof(A));
  launches.push_back(l);
}
static bool pdl = false;
static void launch(Launch& l, cudaStream_t s) {
  CUlaunchConfig c = {};
  c.gridDimX = l.grid.x; c.gridDimY = l.grid.y; c.gridDimZ = l.grid.z; c.blockDimX = l.block; c.blockDimY = c.blockDimZ = 1; c.sharedMemBytes = l.shared; c.hStream = s;
  CUlaunchAttribute at[2]; u32 n = 0;
  if (pdl) { at[n].id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION; at[n++].value.programmaticStreamSerializationAllowed = 1; }
  if (l.cluster > 1) { at[n].id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION; at[n].value.clusterDim.x = l.cluster; at[n].value.clusterDim.y = at[n].value.clusterDim.z = 1; n++; }
  c.attrs = at; c.numAttrs = n;
  void* p[1] = {l.args.data()};
  CUresult r = cuLaunchKernelEx(&c, l.fn, p, nullptr);
  if (r != CUDA_SUCCESS) { printf("launching %s: error %d\n", l.tag, (int)r); exit(1); }
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


// Times all kernels, or those with a tag, and prints a line.
static void run(const char* what, const char* only, int reps, cudaStream_t s) {
  std::vector<Launch*> list; double mb = 0; int n = 0;
  for (auto& l : launches) if (!only || !strcmp(l.tag, only)) { list.push_back(&l); mb += l.mb; n++; }
  if (list.empty()) return;
  double us = time_graph(list, reps, s);
  printf("%-14s %7.2f us a layer (%d kernels), %.0f GB/s\n", what, us / LAYERS, n / LAYERS, mb * 1e6 / us * 1e-3);
}
static void run_each(int reps, cudaStream_t s) {
  std::vector<std::string> tags;
  for (auto& l : launches) if (std::find(tags.begin(), tags.end(), l.tag) == tags.end()) tags.push_back(l.tag);
  for (auto& t : tags) run(t.c_str(), t.c_str(), reps, s);
}
