// scores[t, j] = sum_h weights[t, h] * relu(q[t, h] . key_j * scale). A workgroup has 32 keys of a token; each of its four teams has every
// fourth head, and their sums are added in order.
struct Args {
  q_offset: u32, q_stride: u32, weights_offset: u32, weights_stride: u32, scores_offset: u32, scores_stride: u32,
  num_heads: u32, head_dim: u32, row_words: u32, cache_bf16: u32,
  positions_offset: u32, sequences_offset: u32, table_offset: u32, table_stride: u32, block_size: u32, scale: f32,
}
var<immediate> args: Args;
@group(0) @binding(4) var<storage, read_write> q: array<f32>;
@group(0) @binding(5) var<storage, read_write> weights: array<f32>;
@group(0) @binding(6) var<storage, read_write> scores: array<f32>;

var<workgroup> keys: array<f32, 6176>;  // [32][head_dim + 1]: head_dim at most 192
var<workgroup> sums: array<f32, 128>;

@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let token = group.y;
  let total = positions[args.positions_offset + token] + 1u;
  let stride = args.head_dim + 1u;
  for (var i = local; i < 32u * args.head_dim; i += 128u) {
    let key = i / args.head_dim;
    let d = i % args.head_dim;
    var value = 0.0;
    if (group.x * 32u + key < total) { value = cached(slot_of(group.x * 32u + key, token), d); }
    keys[key * stride + d] = value;
  }
  workgroupBarrier();
  let lane = local % 32u;
  var sum = 0.0;
  for (var head = local / 32u; head < args.num_heads; head += 4u) {
    let start = args.q_offset + token * args.q_stride + head * args.head_dim;
    var product = 0.0;
    for (var d = 0u; d < args.head_dim; d++) { product = fma(q[start + d], keys[lane * stride + d], product); }
    sum = fma(weights[args.weights_offset + token * args.weights_stride + head], max(product * args.scale, 0.0), sum);
  }
  sums[local] = sum;
  workgroupBarrier();
  let key = group.x * 32u + lane;
  if (local < 32u && key < total) {
    scores[args.scores_offset + token * args.scores_stride + key] = sums[lane] + sums[lane + 32u] + sums[lane + 64u] + sums[lane + 96u];
  }
}
