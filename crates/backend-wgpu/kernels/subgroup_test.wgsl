// Whether an adapter's subgroups are what sums of teams take them for: invocation i can read what invocation i ^ step has, for steps below 32.
// out: [256] 1 where that holds.
@group(0) @binding(0) var<storage, read_write> out: array<u32>;

@compute @workgroup_size(256)
fn main(@builtin(local_invocation_index) local: u32) {
  var holds = 1u;
  for (var step = 16u; step > 0u; step >>= 1u) {
    if (subgroupShuffleXor(local, step) != (local ^ step)) { holds = 0u; }
  }
  out[local] = holds;
}
