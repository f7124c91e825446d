// Stands before every kernel.
//
// Conventions:
// - A kernel's arguments are `var<immediate> args: Args`, 4-byte fields only, at most 128 bytes; src/backend.rs writes them in the
//   same order. A view of activations is two of them: its first element and the elements between two rows.
// - Bindings: first the buffers of activations, all read_write (one buffer may stand at several), then weights, read.
//   Small buffers of numbers are ranges of one buffer (src/inputs.rs): a kernel that writes one of them binds all of its read_write.
// - What is written to a row depends on that row alone: reductions have an order that is a function of the shape of one row. Shuffles
//   reach at most 32 invocations, and kernels with them are used only where the self-test (subgroup_test.wgsl) found them to. Products that are added are `fma`, so that no compiler is
//   free to fuse them in one kernel and not in another.

const LOWEST: f32 = -3.4028234e38;

var<workgroup> scratch: array<f32, 256>;

// Sum over a workgroup of 256, in a fixed order. Every invocation gets it.
fn workgroup_sum(value: f32, local: u32) -> f32 {
  scratch[local] = value;
  workgroupBarrier();
  for (var step = 128u; step > 16u; step >>= 1u) {
    if (local < step) { scratch[local] = scratch[local] + scratch[local + step]; }
    workgroupBarrier();
  }
  return sum_of_32(local);
}

{{SUM_OF_32}}

fn workgroup_max(value: f32, local: u32) -> f32 {
  scratch[local] = value;
  workgroupBarrier();
  for (var step = 128u; step > 0u; step >>= 1u) {
    if (local < step) { scratch[local] = max(scratch[local], scratch[local + step]); }
    workgroupBarrier();
  }
  let result = scratch[0];
  workgroupBarrier();
  return result;
}

// Order of f32::total_cmp as integers: larger is better.
fn total_order(x: f32) -> u32 {
  let bits = bitcast<u32>(x);
  return select(bits ^ 0x80000000u, ~bits, (bits >> 31u) != 0u);
}

fn sigmoid(x: f32) -> f32 { return 1.0 / (1.0 + exp(-x)); }

// Nearest bfloat16, ties to even; NaN stays NaN.
fn bf16_bits(x: f32) -> u32 {
  let bits = bitcast<u32>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) { return (bits >> 16u) | 0x40u; }
  return (bits + 0x7fffu + ((bits >> 16u) & 1u)) >> 16u;
}
