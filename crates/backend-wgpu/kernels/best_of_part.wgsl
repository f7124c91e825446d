// Larger is better; NaN above everything, both zeros equal; 0 is below every number. By bits: a compiler may assume that there is no NaN.
fn rank(x: f32) -> u32 {
  let bits = bitcast<u32>(x);
  let magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) { return 0xffffffffu; }
  if (magnitude == 0u) { return 0x80000000u; }
  return select(bits ^ 0x80000000u, ~bits, (bits >> 31u) != 0u);
}

// Rank and column of the best of 1024 columns of the row that starts at `row`.
fn best_of_part(row: u32, part: u32, local: u32) -> vec2<u32> {
  var key = 0u;
  var at = 0xffffffffu;
  let end = min(1024u * (part + 1u), args.cols);
  for (var c = 1024u * part + local; c < end; c += 256u) {
    let other = rank(logits[row + c]);
    if (other > key) {
      key = other;
      at = c;
    }
  }
  return best_of_workgroup(key, at, local);
}
