// The end of workgroup_sum: the tree over the first 32.
fn sum_of_32(local: u32) -> f32 {
  for (var step = 16u; step > 0u; step >>= 1u) {
    if (local < step) { scratch[local] = scratch[local] + scratch[local + step]; }
    workgroupBarrier();
  }
  let sum = scratch[0];
  workgroupBarrier();
  return sum;
}
