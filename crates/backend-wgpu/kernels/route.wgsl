// The router: logits to chosen experts, best first (the lower index first where equal), with their weights. A workgroup a token.
// A chosen one's place is the number of those that are better: no sorting, no order of threads.
struct Args {
  logits_offset: u32, logits_stride: u32, bias_offset: u32, ids_offset: u32, ids_stride: u32, weights_offset: u32, weights_stride: u32,
  num_experts: u32, top_k: u32, scoring: u32, n_group: u32, topk_group: u32, has_bias: u32, norm: u32, factor: f32,
}
var<immediate> args: Args;
@group(0) @binding(0) var<storage, read_write> logits: array<f32>;
@group(0) @binding(1) var<storage, read_write> bias: array<f32>;
@group(0) @binding(2) var<storage, read_write> ids: array<u32>;
@group(0) @binding(3) var<storage, read_write> weights: array<f32>;

const MAX_EXPERTS: u32 = 1024u;
var<workgroup> scores: array<f32, MAX_EXPERTS>;
var<workgroup> keys: array<u32, MAX_EXPERTS>;      // order of the values chosen by
var<workgroup> group_keys: array<u32, 256>;
var<workgroup> chosen: array<f32, 64>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let n = args.num_experts;
  let row = args.logits_offset + group.x * args.logits_stride;
  var largest = LOWEST;
  for (var e = local; e < n; e += 256u) { largest = max(largest, logits[row + e]); }
  largest = workgroup_max(largest, local);
  var sum = 0.0;
  for (var e = local; e < n; e += 256u) {
    var score = logits[row + e];
    if (args.scoring == 0u) { score = sigmoid(score); }
    if (args.scoring == 1u) { score = exp(score - largest); }
    scores[e] = score;
    sum = sum + score;
  }
  sum = workgroup_sum(sum, local);
  for (var e = local; e < n; e += 256u) {
    if (args.scoring == 1u) { scores[e] = scores[e] / sum; }
    var choice = scores[e];
    if (args.has_bias != 0u) { choice = choice + bias[args.bias_offset + e]; }
    keys[e] = total_order(choice);
  }
  workgroupBarrier();
  if (args.n_group > 1u) {
    let size = n / args.n_group;
    if (local < args.n_group) {
      // The two best by their keys; keys of numbers are turned back into numbers.
      var first = 0u;
      var second = 0u;
      for (var i = 0u; i < size; i++) {
        let key = keys[local * size + i];
        if (key > first) {
          second = first;
          first = key;
        } else if (key > second) { second = key; }
      }
      var score = number(first);
      if (size > 1u) { score = score + number(second); }
      group_keys[local] = total_order(score);
    }
    workgroupBarrier();
    for (var e = local; e < n; e += 256u) {
      let mine = e / size;
      var better = 0u;
      for (var other = 0u; other < args.n_group; other++) {
        better += u32(group_keys[other] > group_keys[mine] || (group_keys[other] == group_keys[mine] && other < mine));
      }
      // Below every number, and still in order of index.
      if (better >= args.topk_group) { keys[e] = 0u; }
    }
    workgroupBarrier();
  }
  for (var e = local; e < n; e += 256u) {
    let key = keys[e];
    var better = 0u;
    for (var other = 0u; other < n; other++) { better += u32(keys[other] > key || (keys[other] == key && other < e)); }
    if (better < args.top_k) {
      ids[args.ids_offset + group.x * args.ids_stride + better] = e;
      chosen[better] = scores[e];
    }
  }
  workgroupBarrier();
  if (local < args.top_k) {
    var weight = chosen[local];
    if (args.scoring == 2u) {
      // The first is the largest.
      var total = 0.0;
      for (var i = 0u; i < args.top_k; i++) { total = total + exp(chosen[i] - chosen[0]); }
      weight = exp(weight - chosen[0]) / total;
    }
    if (args.norm != 0u) {
      var total = 0.0;
      if (args.scoring == 2u) { total = 1.0; } else { for (var i = 0u; i < args.top_k; i++) { total = total + chosen[i]; } }
      weight = weight / (total + 1e-20);
    }
    weights[args.weights_offset + group.x * args.weights_stride + local] = weight * args.factor;
  }
}

fn number(key: u32) -> f32 { return bitcast<f32>(select(~key, key ^ 0x80000000u, (key >> 31u) != 0u)); }
