// The k best positions of each row, ascending; of equal scores the earlier. Radix selection of the k-th best key, then one ordered round.
struct Args { scores_offset: u32, scores_stride: u32, positions_offset: u32, ids_offset: u32, ids_stride: u32, counts_offset: u32, k: u32 }
var<immediate> args: Args;
@group(0) @binding(0) var<storage, read_write> scores: array<f32>;
@group(0) @binding(1) var<storage, read_write> positions: array<u32>;
@group(0) @binding(2) var<storage, read_write> ids: array<u32>;
@group(0) @binding(3) var<storage, read_write> counts: array<u32>;

var<workgroup> histogram: array<atomic<u32>, 256>;
var<workgroup> better: array<u32, 256>;  // of each invocation's stretch of positions: above the threshold
var<workgroup> equal: array<u32, 256>;   // at the threshold
var<workgroup> threshold: u32;
var<workgroup> needed: u32;              // of those at the threshold

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let row = args.scores_offset + group.x * args.scores_stride;
  let n = positions[args.positions_offset + group.x] + 1u;
  let wanted = min(n, args.k);
  if (local == 0u) {
    threshold = 0u;
    needed = wanted;
  }
  for (var round = 0u; round < 4u; round++) {
    let shift = 24u - 8u * round;
    atomicStore(&histogram[local], 0u);
    workgroupBarrier();
    let prefix = threshold;
    for (var j = local; j < n; j += 256u) {
      let key = total_order(scores[row + j]);
      // Digits before this one agree. (A shift by 32 is not a shift: hence the case of the first round.)
      if (round == 0u || ((key ^ prefix) >> (shift + 8u)) == 0u) { atomicAdd(&histogram[(key >> shift) & 255u], 1u); }
    }
    workgroupBarrier();
    if (local == 0u) {
      var digit = 255u;
      var left = needed;
      while (digit > 0u && atomicLoad(&histogram[digit]) < left) {
        left -= atomicLoad(&histogram[digit]);
        digit--;
      }
      needed = left;
      threshold = prefix | (digit << shift);
    }
    workgroupBarrier();
  }
  let limit = threshold;
  let stretch = (n + 255u) / 256u;
  let begin = min(n, local * stretch);
  let end = min(n, begin + stretch);
  var num_better = 0u;
  var num_equal = 0u;
  for (var j = begin; j < end; j++) {
    let key = total_order(scores[row + j]);
    num_better += u32(key > limit);
    num_equal += u32(key == limit);
  }
  better[local] = num_better;
  equal[local] = num_equal;
  workgroupBarrier();
  var better_before = 0u;
  var equal_before = 0u;
  for (var i = 0u; i < local; i++) {
    better_before += better[i];
    equal_before += equal[i];
  }
  for (var j = begin; j < end; j++) {
    let key = total_order(scores[row + j]);
    let at = better_before + min(equal_before, needed);
    if (key > limit || (key == limit && equal_before < needed)) { ids[args.ids_offset + group.x * args.ids_stride + at] = j; }
    better_before += u32(key > limit);
    equal_before += u32(key == limit);
  }
  if (local == 0u) { counts[args.counts_offset + group.x] = wanted; }
}
