// Rank and column of the best of all parts of a row.
fn best_of_parts(row: u32, local: u32) -> vec2<u32> {
  var best = vec2<u32>(0u, 0xffffffffu);
  // Columns grow with parts: of equal ones the first stays.
  for (var part = local; part < args.num_parts; part += 256u) {
    let other = parts[row * args.num_parts + part];
    if (other.x > best.x) { best = other; }
  }
  return best_of_workgroup(best.x, best.y, local);
}
