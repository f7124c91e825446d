fn largest_of_lanes(value: u32, local: u32) -> u32 {
  var largest = value;
  for (var step = 16u; step > 0u; step >>= 1u) { largest = max(largest, subgroupShuffleXor(largest, step)); }
  return largest;
}

fn sum_of_lanes(value: i32, local: u32) -> i32 {
  var sum = value;
  for (var step = 16u; step > 0u; step >>= 1u) { sum = sum + subgroupShuffleXor(sum, step); }
  return sum;
}
