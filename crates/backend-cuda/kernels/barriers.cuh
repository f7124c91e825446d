// Barriers in shared memory that count arrivals of threads, and bytes of bulk copies; and the barrier of a cluster.
#pragma once
#include "common.cuh"

DEVICE void barrier_init(u32 bar, u32 count) { asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory"); }
DEVICE void barrier_arrive(u32 bar) { asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(bar) : "memory"); }
DEVICE void barrier_wait(u32 bar, u32 parity) {
  u32 done = 0;
  while (!done)
#if __CUDA_ARCH__ >= 900
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }" : "=r"(done) : "r"(bar), "r"(parity) : "memory");
#else
    asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }" : "=r"(done) : "r"(bar), "r"(parity) : "memory");
#endif
}

// Arrivals of a warp, and the arrival of all of its lanes: what they read is read. One lane arrives for all, behind __syncwarp. racecheck
// of compute-sanitizer does not see that __syncwarp orders the others' reads before that, and calls them hazards; for it (RACECHECK)
// every lane arrives itself.
#ifdef RACECHECK
#define WARP_ARRIVALS 32
DEVICE void warp_arrives(u32 bar) { __syncwarp(); barrier_arrive(bar); }
#else
#define WARP_ARRIVALS 1
DEVICE void warp_arrives(u32 bar) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) barrier_arrive(bar);
}
#endif

#if __CUDA_ARCH__ >= 900
// Blocks of a cluster. An address of shared memory in block `rank`, for st.shared::cluster.
DEVICE u32 cluster_address(u32 at, u32 rank) {
  u32 there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(rank));
  return there;
}
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.aligned;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }
DEVICE void cluster_sync() { cluster_arrive(); cluster_wait(); }
#endif
