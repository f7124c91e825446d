// The better of two is that with the larger key, of equal ones that with the lower column.
var<workgroup> keys: array<u32, 256>;
var<workgroup> columns: array<u32, 256>;

fn best_of_workgroup(key: u32, column: u32, local: u32) -> vec2<u32> {
  keys[local] = key;
  columns[local] = column;
  workgroupBarrier();
  for (var step = 128u; step > 0u; step >>= 1u) {
    if (local < step) {
      let other = keys[local + step];
      let other_column = columns[local + step];
      if (other > keys[local] || (other == keys[local] && other_column < columns[local])) {
        keys[local] = other;
        columns[local] = other_column;
      }
    }
    workgroupBarrier();
  }
  return vec2<u32>(keys[0], columns[0]);
}

