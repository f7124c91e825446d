// out = f(gate, up) of two weights whose formats differ: rows are choices of experts (or tokens), `top_k` of them side by side in a row of
// `out`. Weights of one format meet inside the product.
struct Args { out_offset: u32, out_stride: u32, top_k: u32, cols: u32, activation: u32, alpha: f32, limit: f32 }
var<immediate> args: Args;
@group(0) @binding(0) var<storage, read_write> gate: array<f32>;
@group(0) @binding(1) var<storage, read_write> up: array<f32>;
@group(0) @binding(2) var<storage, read_write> out: array<f32>;

@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
  if (id.x >= args.cols) { return; }
  let value = activated(gate[id.y * args.cols + id.x], up[id.y * args.cols + id.x]);
  out[args.out_offset + (id.y / args.top_k) * args.out_stride + (id.y % args.top_k) * args.cols + id.x] = value;
}
