// Rows, cut into parts (heads, the slots of a token's experts), as integers: the form of digits.wgsl. Columns beyond a part's end are zeros.
struct Args { x_offset: u32, x_stride: u32, part_stride: u32, num_parts: u32, cols: u32, chunks: u32, per_byte: u32 }
var<immediate> args: Args;
@group(0) @binding(0) var<storage, read_write> form: array<u32>;
@group(0) @binding(1) var<storage, read> x: array<f32>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let column = 256u * group.x + local;
  var value = 0.0;
  if (column < args.cols) { value = x[args.x_offset + group.z * args.x_stride + group.y * args.part_stride + column]; }
  let first = (group.z * args.num_parts + group.y) * 7u * args.chunks;
  let chunk = column / 32u;
  let word = digits(value, args.per_byte, local);
  if (chunk < args.chunks && local % 32u < 26u) { form[digit_place(first, chunk, args.chunks, local % 32u)] = word; }
}
