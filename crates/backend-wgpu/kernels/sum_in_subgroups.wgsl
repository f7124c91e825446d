// The end of workgroup_sum, by everybody: the tree over the first 32, whose pairs meet in the same order.
fn sum_of_32(local: u32) -> f32 {
  var sum = scratch[local % 32u];
  for (var step = 16u; step > 0u; step >>= 1u) { sum = sum + subgroupShuffleXor(sum, step); }
  workgroupBarrier();
  return sum;
}
