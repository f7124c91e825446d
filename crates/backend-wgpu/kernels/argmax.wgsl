// The column of the largest value of each row: the lowest where several are equal, the first NaN where there is one.
struct Args { out_offset: u32, out_stride: u32, num_parts: u32 }
var<immediate> args: Args;
@group(0) @binding(0) var<storage, read_write> out: array<u32>;
@group(0) @binding(1) var<storage, read> parts: array<vec2<u32>>;  // of argmax_part.wgsl

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  var best = vec2<u32>(0u, 0xffffffffu);
  // Columns grow with parts: of equal ones the first stays.
  for (var part = local; part < args.num_parts; part += 256u) {
    let other = parts[group.x * args.num_parts + part];
    if (other.x > best.x) { best = other; }
  }
  best = best_of_workgroup(best.x, best.y, local);
  if (local == 0u) { out[args.out_offset + group.x * args.out_stride] = best.y; }
}
