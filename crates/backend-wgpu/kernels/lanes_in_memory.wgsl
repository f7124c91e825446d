fn largest_of_lanes(value: u32, local: u32) -> u32 {
  largest_of[local] = value;
  workgroupBarrier();
  for (var step = 16u; step > 0u; step >>= 1u) {
    if (local % 32u < step) { largest_of[local] = max(largest_of[local], largest_of[local + step]); }
    workgroupBarrier();
  }
  let largest = largest_of[local - local % 32u];
  workgroupBarrier();
  return largest;
}

fn sum_of_lanes(value: i32, local: u32) -> i32 {
  integers[local] = value;
  workgroupBarrier();
  for (var step = 16u; step > 0u; step >>= 1u) {
    if (local % 32u < step) { integers[local] = integers[local] + integers[local + step]; }
    workgroupBarrier();
  }
  let sum = integers[local - local % 32u];
  workgroupBarrier();
  return sum;
}
