// out[i] = x[rows[i]].
struct Args { x_offset: u32, x_stride: u32, rows_offset: u32, out_offset: u32, out_stride: u32, cols: u32 }
var<immediate> args: Args;
@group(0) @binding(0) var<storage, read_write> x: array<f32>;
@group(0) @binding(1) var<storage, read_write> rows: array<u32>;
@group(0) @binding(2) var<storage, read_write> out: array<f32>;

@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
  if (id.x >= args.cols) { return; }
  out[args.out_offset + id.y * args.out_stride + id.x] = x[args.x_offset + rows[args.rows_offset + id.y] * args.x_stride + id.x];
}
