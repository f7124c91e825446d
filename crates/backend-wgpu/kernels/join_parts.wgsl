// Joins the parts of one head of a token in order, with a sink where there is one.
// Parts whose factors are kept; those behind them are worked out anew by everybody.
const MOST: u32 = 512u;
var<workgroup> factors: array<f32, MOST>;
var<workgroup> shares: array<f32, MOST>;

struct Join { start: u32, num_parts: u32, largest: f32, sum: f32 }

// What the columns have in common. Everybody of the workgroup takes part.
fn begin_join(head: u32, token: u32, local: u32) -> Join {
  var total = positions[args.positions_offset + token] + 1u;
  if (args.has_index != 0u) {
    total = index_counts[args.counts_offset + token];
  } else if (args.window != 0u) { total = min(total, args.window); }
  let num_parts = (total + 63u) / 64u;
  let width = 2u + args.value_dim;
  let start = (token * args.num_heads + head) * args.num_parts * width;
  var largest_here = LOWEST;
  if (args.has_sinks != 0u) { largest_here = sinks[args.sinks_offset + head]; }
  for (var part = local; part < num_parts; part += 256u) { largest_here = max(largest_here, parts[start + part * width]); }
  let largest = workgroup_max(largest_here, local);
  // Four parts at a time below: what is missing counts nothing.
  for (var part = local; part < min((num_parts + 3u) / 4u * 4u, MOST); part += 256u) {
    let at = start + min(part, num_parts - 1u) * width;
    factors[part] = select(0.0, exp(parts[at] - largest), part < num_parts);
    shares[part] = parts[at + 1u];
  }
  workgroupBarrier();
  var sum = 0.0;
  if (args.has_sinks != 0u) { sum = exp(sinks[args.sinks_offset + head] - largest); }
  for (var part = 0u; part < min(num_parts, MOST); part++) { sum = fma(factors[part], shares[part], sum); }
  for (var part = MOST; part < num_parts; part++) {
    sum = fma(exp(parts[start + part * width] - largest), parts[start + part * width + 1u], sum);
  }
  return Join(start, num_parts, largest, sum);
}

fn join_column(join: Join, column: u32) -> f32 {
  let width = 2u + args.value_dim;
  let first = join.start + 2u + column;
  var value = 0.0;
  for (var part = 0u; part < min(join.num_parts, MOST); part += 4u) {
    let a = parts[first + part * width];
    let b = parts[first + min(part + 1u, join.num_parts - 1u) * width];
    let c = parts[first + min(part + 2u, join.num_parts - 1u) * width];
    let d = parts[first + min(part + 3u, join.num_parts - 1u) * width];
    value = fma(factors[part + 1u], b, fma(factors[part], a, value));
    value = fma(factors[part + 3u], d, fma(factors[part + 2u], c, value));
  }
  for (var part = MOST; part < join.num_parts; part++) {
    value = fma(exp(parts[join.start + part * width] - join.largest), parts[first + part * width], value);
  }
  return value / join.sum;
}

