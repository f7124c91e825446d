// x += delta (if there is one), then out = x / sqrt(mean(x^2) + eps) * weight. A workgroup a row.
struct Args {
  x_offset: u32, x_stride: u32, delta_offset: u32, delta_stride: u32, out_offset: u32, out_stride: u32,
  weight_offset: u32, cols: u32, has_delta: u32, eps: f32,
}
var<immediate> args: Args;
@group(0) @binding(0) var<storage, read_write> x: array<f32>;
@group(0) @binding(1) var<storage, read_write> delta: array<f32>;
@group(0) @binding(2) var<storage, read_write> out: array<f32>;
@group(0) @binding(3) var<storage, read_write> weight: array<f32>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let row = args.x_offset + group.x * args.x_stride;
  var sum = 0.0;
  for (var c = local; c < args.cols; c += 256u) {
    var value = x[row + c];
    if (args.has_delta != 0u) {
      value = value + delta[args.delta_offset + group.x * args.delta_stride + c];
      x[row + c] = value;
    }
    sum = fma(value, value, sum);
  }
  let scale = 1.0 / sqrt(workgroup_sum(sum, local) / f32(args.cols) + args.eps);
  for (var c = local; c < args.cols; c += 256u) {
    out[args.out_offset + group.x * args.out_stride + c] = x[row + c] * scale * weight[args.weight_offset + c];
  }
}
