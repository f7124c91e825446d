// The column of the largest value of 1024 columns of a row: argmax.wgsl joins them.
struct Args { logits_offset: u32, logits_stride: u32, cols: u32, num_parts: u32 }
var<immediate> args: Args;
@group(0) @binding(1) var<storage, read> logits: array<f32>;
@group(0) @binding(0) var<storage, read_write> parts: array<vec2<u32>>;  // [rows, num_parts]: rank, column

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let best = best_of_part(args.logits_offset + group.y * args.logits_stride, group.x, local);
  if (local == 0u) { parts[group.y * args.num_parts + group.x] = best; }
}

{{PART}}
