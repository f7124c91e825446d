// argmax_part.wgsl and argmax.wgsl: who is done last joins the parts of a row.
struct Args { logits_offset: u32, logits_stride: u32, cols: u32, num_parts: u32, out_offset: u32, out_stride: u32 }
var<immediate> args: Args;
@group(0) @binding(0) @coherent var<storage, read_write> parts: array<vec2<u32>>;  // [rows, num_parts]: rank, column
@group(0) @binding(1) var<storage, read_write> out: array<u32>;
@group(0) @binding(2) var<storage, read_write> arrivals: array<atomic<u32>>;        // one a row
@group(0) @binding(3) var<storage, read> logits: array<f32>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let best = best_of_part(args.logits_offset + group.y * args.logits_stride, group.x, local);
  if (local == 0u) { parts[group.y * args.num_parts + group.x] = best; }
  if (!is_last_of(args.num_parts, group.y, local)) { return; }
  let best_of_all = best_of_parts(group.y, local);
  if (local == 0u) { out[args.out_offset + group.y * args.out_stride] = best_of_all.y; }
}

{{PART}}
{{PARTS}}
