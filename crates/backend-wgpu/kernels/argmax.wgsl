// The column of the largest value of each row: the lowest where several are equal, the first NaN where there is one.
struct Args { out_offset: u32, out_stride: u32, num_parts: u32 }
var<immediate> args: Args;
@group(0) @binding(0) var<storage, read_write> out: array<u32>;
@group(0) @binding(1) var<storage, read> parts: array<vec2<u32>>;  // of argmax_part.wgsl

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let best = best_of_parts(group.x, local);
  if (local == 0u) { out[args.out_offset + group.x * args.out_stride] = best.y; }
}

{{PARTS}}
