// Rotates pairs of columns of every head, in place.
struct Args {
  x_offset: u32, x_stride: u32, table_offset: u32, table_stride: u32, num_heads: u32, head_stride: u32, half: u32, interleaved: u32,
}
var<immediate> args: Args;
@group(0) @binding(0) var<storage, read_write> x: array<f32>;
@group(0) @binding(1) var<storage, read_write> table: array<f32>;

@compute @workgroup_size(128)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
  if (id.x >= args.num_heads * args.half) { return; }
  let head = id.x / args.half;
  let i = id.x % args.half;
  let start = args.x_offset + id.y * args.x_stride + head * args.head_stride;
  let first = start + select(i, 2u * i, args.interleaved != 0u);
  let second = start + select(i + args.half, 2u * i + 1u, args.interleaved != 0u);
  let cosine = table[args.table_offset + id.y * args.table_stride + i];
  let sine = table[args.table_offset + id.y * args.table_stride + args.half + i];
  let a = x[first];
  let b = x[second];
  x[first] = fma(a, cosine, -(b * sine));
  x[second] = fma(b, cosine, a * sine);
}
