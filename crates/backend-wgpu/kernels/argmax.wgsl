// The column of the largest value of each row: the lowest where several are equal, the first NaN where there is one.
struct Args { logits_offset: u32, logits_stride: u32, out_offset: u32, out_stride: u32, cols: u32 }
var<immediate> args: Args;
@group(0) @binding(0) var<storage, read_write> logits: array<f32>;
@group(0) @binding(1) var<storage, read_write> out: array<u32>;

var<workgroup> best: array<u32, 256>;
var<workgroup> where_best: array<u32, 256>;

// Larger is better; NaN above everything, both zeros equal; 0 is below every number. By bits: a compiler may assume that there is no NaN.
fn rank(x: f32) -> u32 {
  let bits = bitcast<u32>(x);
  let magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) { return 0xffffffffu; }
  if (magnitude == 0u) { return 0x80000000u; }
  return select(bits ^ 0x80000000u, ~bits, (bits >> 31u) != 0u);
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  var key = 0u;
  var at = 0xffffffffu;
  for (var c = local; c < args.cols; c += 256u) {
    let other = rank(logits[args.logits_offset + group.x * args.logits_stride + c]);
    if (other > key) {
      key = other;
      at = c;
    }
  }
  best[local] = key;
  where_best[local] = at;
  workgroupBarrier();
  for (var step = 128u; step > 0u; step >>= 1u) {
    if (local < step) {
      let other = best[local + step];
      let column = where_best[local + step];
      if (other > best[local] || (other == best[local] && column < where_best[local])) {
        best[local] = other;
        where_best[local] = column;
      }
    }
    workgroupBarrier();
  }
  if (local == 0u) { out[args.out_offset + group.x * args.out_stride] = where_best[0]; }
}
