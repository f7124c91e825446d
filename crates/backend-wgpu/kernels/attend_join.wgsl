// Joins the parts of attend.wgsl in order, with a sink where there is one. A workgroup a head and token.
struct Args {
  out_offset: u32, out_stride: u32, num_heads: u32, value_dim: u32, num_parts: u32, window: u32, positions_offset: u32,
  counts_offset: u32, has_index: u32, sinks_offset: u32, has_sinks: u32,
  forms: u32, part_count: u32, part_stride: u32, part_cols: u32, part_chunks: u32, per_byte: u32,   // of out: forms.wgsl
}
var<immediate> args: Args;
@group(0) @binding(0) var<storage, read_write> parts: array<f32>;
@group(0) @binding(1) var<storage, read_write> positions: array<u32>;
@group(0) @binding(2) var<storage, read_write> index_counts: array<u32>;
@group(0) @binding(3) var<storage, read_write> sinks: array<f32>;
@group(0) @binding(4) var<storage, read_write> out: array<f32>;
@group(0) @binding(5) var<storage, read_write> form: array<u32>;

// Parts whose factors are kept; those behind them are worked out anew by everybody.
const MOST: u32 = 512u;
var<workgroup> factors: array<f32, MOST>;
var<workgroup> shares: array<f32, MOST>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let head = group.x;
  let token = group.y;
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
  for (var part = local; part < min(num_parts, MOST); part += 256u) {
    factors[part] = exp(parts[start + part * width] - largest);
    shares[part] = parts[start + part * width + 1u];
  }
  workgroupBarrier();
  var sum = 0.0;
  if (args.has_sinks != 0u) { sum = exp(sinks[args.sinks_offset + head] - largest); }
  for (var part = 0u; part < min(num_parts, MOST); part++) { sum = fma(factors[part], shares[part], sum); }
  for (var part = MOST; part < num_parts; part++) {
    sum = fma(exp(parts[start + part * width] - largest), parts[start + part * width + 1u], sum);
  }
  for (var start_column = 0u; start_column < args.value_dim; start_column += 256u) {
    let column = start_column + local;
    var value = 0.0;
    if (column < args.value_dim) {
      for (var part = 0u; part < min(num_parts, MOST); part++) {
        value = fma(factors[part], parts[start + part * width + 2u + column], value);
      }
      for (var part = MOST; part < num_parts; part++) {
        value = fma(exp(parts[start + part * width] - largest), parts[start + part * width + 2u + column], value);
      }
      value = value / sum;
      put(token, head * args.value_dim + column, value);
    }
    put_integers(token, head * args.value_dim + start_column, args.value_dim - start_column, value, local);
  }
}
