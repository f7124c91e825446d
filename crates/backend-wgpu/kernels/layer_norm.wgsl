// out = (x - mean) / sqrt(variance + eps) * weight + bias. A workgroup a row.
struct Args {
  x_offset: u32, x_stride: u32, out_offset: u32, out_stride: u32, weight_offset: u32, bias_offset: u32, cols: u32, eps: f32,
}
var<immediate> args: Args;
@group(0) @binding(0) var<storage, read_write> x: array<f32>;
@group(0) @binding(1) var<storage, read_write> out: array<f32>;
@group(0) @binding(2) var<storage, read_write> weight: array<f32>;
@group(0) @binding(3) var<storage, read_write> bias: array<f32>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let row = args.x_offset + group.x * args.x_stride;
  var sum = 0.0;
  for (var c = local; c < args.cols; c += 256u) { sum = sum + x[row + c]; }
  let mean = workgroup_sum(sum, local) / f32(args.cols);
  var squares = 0.0;
  for (var c = local; c < args.cols; c += 256u) {
    let difference = x[row + c] - mean;
    squares = fma(difference, difference, squares);
  }
  let scale = 1.0 / sqrt(workgroup_sum(squares, local) / f32(args.cols) + args.eps);
  for (var c = local; c < args.cols; c += 256u) {
    let normed = (x[row + c] - mean) * scale;
    out[args.out_offset + group.x * args.out_stride + c] = fma(normed, weight[args.weight_offset + c], bias[args.bias_offset + c]);
  }
}
