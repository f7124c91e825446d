// The choice of one token, whose logits start at `row`. A chosen one's place is the number of those that are better: no sorting, no order
// of threads.
const MAX_EXPERTS: u32 = 1024u;
var<workgroup> scores: array<f32, MAX_EXPERTS>;
var<workgroup> keys: array<u32, MAX_EXPERTS + 4u>; // order of the values chosen by
var<workgroup> group_keys: array<u32, 256>;
var<workgroup> chosen: array<f32, 64>;

fn route(row: u32, token: u32, local: u32) {
  let n = args.num_experts;
  var largest = 0.0;
  if (args.scoring == 1u) {
    largest = LOWEST;
    for (var e = local; e < n; e += 256u) { largest = max(largest, logits[row + e]); }
    largest = workgroup_max(largest, local);
  }
  var sum = 0.0;
  for (var e = local; e < n; e += 256u) {
    var score = logits[row + e];
    if (args.scoring == 0u) { score = sigmoid(score); }
    if (args.scoring == 1u) { score = exp(score - largest); }
    scores[e] = score;
    sum = sum + score;
  }
  if (args.scoring == 1u) { sum = workgroup_sum(sum, local); }
  for (var e = local; e < n; e += 256u) {
    if (args.scoring == 1u) { scores[e] = scores[e] / sum; }
    var choice = scores[e];
    if (args.has_bias != 0u) { choice = choice + bias[args.correction_offset + e]; }
    keys[e] = total_order(choice);
  }
  if (local < 4u) { keys[n + local] = 0u; }
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
    // Four at a time, so that their loads do not wait for each other; zeros behind the end are better than nobody.
    for (var other = 0u; other < n; other += 4u) {
      let four = vec4<u32>(keys[other], keys[other + 1u], keys[other + 2u], keys[other + 3u]);
      let place = vec4<u32>(other, other + 1u, other + 2u, other + 3u);
      let is_before = select(vec4<u32>(), vec4<u32>(1u), place < vec4<u32>(e));
      let is_equal = select(vec4<u32>(), is_before, four == vec4<u32>(key));
      let counts = select(is_equal, vec4<u32>(1u), four > vec4<u32>(key));
      better += counts.x + counts.y + counts.z + counts.w;
    }
    if (better < args.top_k) {
      ids[args.ids_offset + token * args.ids_stride + better] = e;
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
    weights[args.weights_offset + token * args.weights_stride + local] = weight * args.factor;
  }
}

fn number(key: u32) -> f32 { return bitcast<f32>(select(~key, key ^ 0x80000000u, (key >> 31u) != 0u)); }
