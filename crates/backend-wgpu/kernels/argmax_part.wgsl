// The column of the largest value of 1024 columns of a row: argmax.wgsl joins them.
struct Args { logits_offset: u32, logits_stride: u32, cols: u32, num_parts: u32 }
var<immediate> args: Args;
@group(0) @binding(1) var<storage, read> logits: array<f32>;
@group(0) @binding(0) var<storage, read_write> parts: array<vec2<u32>>;  // [rows, num_parts]: rank, column

// Larger is better; NaN above everything, both zeros equal; 0 is below every number. By bits: a compiler may assume that there is no NaN.
fn rank(x: f32) -> u32 {
  let bits = bitcast<u32>(x);
  let magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) { return 0xffffffffu; }
  if (magnitude == 0u) { return 0x80000000u; }
  return select(bits ^ 0x80000000u, ~bits, (bits >> 31u) != 0u);
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  var key = 0u;
  var at = 0xffffffffu;
  let end = min(1024u * (group.x + 1u), args.cols);
  for (var c = 1024u * group.x + local; c < end; c += 256u) {
    let other = rank(logits[args.logits_offset + group.y * args.logits_stride + c]);
    if (other > key) {
      key = other;
      at = c;
    }
  }
  let best = best_of_workgroup(key, at, local);
  if (local == 0u) { parts[group.y * args.num_parts + group.x] = best; }
}
