// out[t] = plus[t] + sum_i weights[t, i] y[t * top_k + i], in the order of i; with `adds` it is added to what out holds.
struct Args {
  weights_offset: u32, weights_stride: u32, plus_offset: u32, plus_stride: u32, out_offset: u32, out_stride: u32,
  top_k: u32, cols: u32, has_plus: u32, adds: u32,
}
var<immediate> args: Args;
@group(0) @binding(0) var<storage, read_write> y: array<f32>;
@group(0) @binding(1) var<storage, read_write> weights: array<f32>;
@group(0) @binding(2) var<storage, read_write> plus: array<f32>;
@group(0) @binding(3) var<storage, read_write> out: array<f32>;

@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
  if (id.x >= args.cols) { return; }
  var sum = 0.0;
  if (args.has_plus != 0u) { sum = plus[args.plus_offset + id.y * args.plus_stride + id.x]; }
  for (var i = 0u; i < args.top_k; i++) {
    sum = fma(weights[args.weights_offset + id.y * args.weights_stride + i], y[(id.y * args.top_k + i) * args.cols + id.x], sum);
  }
  let at = args.out_offset + id.y * args.out_stride + id.x;
  if (args.adds != 0u) { out[at] = out[at] + sum; } else { out[at] = sum; }
}
