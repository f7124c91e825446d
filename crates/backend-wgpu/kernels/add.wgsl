// x += y.
struct Args { x_offset: u32, x_stride: u32, y_offset: u32, y_stride: u32, cols: u32 }
var<immediate> args: Args;
@group(0) @binding(0) var<storage, read_write> x: array<f32>;
@group(0) @binding(1) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
  if (id.x >= args.cols) { return; }
  let at = args.x_offset + id.y * args.x_stride + id.x;
  x[at] = x[at] + y[args.y_offset + id.y * args.y_stride + id.x];
}
