// x += delta (if there is one), then out = x / sqrt(mean(x^2) + eps) * weight. Workgroups of a row have 256 columns of the output each, and
// all of the row for the mean; with a delta, which is added in place, a row has one workgroup.
struct Args {
  x_offset: u32, x_stride: u32, delta_offset: u32, delta_stride: u32, out_offset: u32, out_stride: u32,
  weight_offset: u32, cols: u32, has_delta: u32, eps: f32,
  forms: u32, part_count: u32, part_stride: u32, part_cols: u32, part_chunks: u32, per_byte: u32,   // of out: forms.wgsl
}
var<immediate> args: Args;
@group(0) @binding(0) var<storage, read_write> x: array<f32>;
@group(0) @binding(1) var<storage, read_write> delta: array<f32>;
@group(0) @binding(2) var<storage, read_write> out: array<f32>;
@group(0) @binding(3) var<storage, read_write> floats: array<u32>;
@group(0) @binding(4) var<storage, read_write> form: array<u32>;
@group(0) @binding(5) var<storage, read> weight: array<f32>;

@compute @workgroup_size(256)
fn main(
  @builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) local: u32,
) {
  let row = args.x_offset + group.y * args.x_stride;
  var sum = 0.0;
  if (args.has_delta != 0u) {
    for (var c = local; c < args.cols; c += 256u) {
      let value = x[row + c] + delta[args.delta_offset + group.y * args.delta_stride + c];
      x[row + c] = value;
      sum = fma(value, value, sum);
    }
  } else {
    // Eight loads at a time; zeros behind the end change nothing.
    for (var first = local; first < args.cols; first += 2048u) {
      var values = array<f32, 8>();
      for (var i = 0u; i < 8u; i++) {
        let c = first + 256u * i;
        values[i] = select(0.0, x[row + min(c, args.cols - 1u)], c < args.cols);
      }
      for (var i = 0u; i < 8u; i++) { sum = fma(values[i], values[i], sum); }
    }
  }
  let scale = 1.0 / sqrt(workgroup_sum(sum, local) / f32(args.cols) + args.eps);
  for (var first = 256u * group.x; first < args.cols; first += 256u * groups.x) {
    let c = first + local;
    var value = 0.0;
    if (c < args.cols) {
      value = x[row + c] * scale * weight[args.weight_offset + c];
      put(group.y, c, value);
    }
    // A chunk that ends beyond the row has zeros there.
    put_integers(group.y, first, (args.cols - first + 31u) / 32u * 32u, value, local);
  }
}
