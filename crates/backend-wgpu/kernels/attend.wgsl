// Attention over paged caches, grouped-query and latent alike: a workgroup has up to four heads that read the same keys and one part of
// 64 keys; parts are joined by attend_join.wgsl in order. Which keys make a part depends on their rank in the row's own list alone.
// Scores: keys go through workgroup memory, 64 columns at a time. Values are read once a head, neighbouring columns together.
struct Args {
  q_offset: u32, q_stride: u32, rope_offset: u32, rope_stride: u32, rope_head_stride: u32, q_dim: u32, rope_dim: u32,
  num_heads: u32, heads_per_group: u32, heads_per_key: u32, row_words: u32, cache_bf16: u32,
  key_step: u32, value_first: u32, value_step: u32, value_dim: u32, window: u32, num_parts: u32,
  positions_offset: u32, sequences_offset: u32, table_offset: u32, table_stride: u32, block_size: u32,
  index_offset: u32, index_stride: u32, counts_offset: u32, has_index: u32, scale: f32,
}
var<immediate> args: Args;
@group(0) @binding(4) var<storage, read_write> q: array<f32>;
@group(0) @binding(5) var<storage, read_write> q_rope: array<f32>;
@group(0) @binding(6) var<storage, read_write> index_ids: array<u32>;
@group(0) @binding(7) var<storage, read_write> index_counts: array<u32>;
@group(0) @binding(8) var<storage, read_write> parts: array<f32>;  // [tokens, heads, num_parts, 2 + value_dim]

const PART: u32 = 64u;
const HEADS: u32 = 4u;
const COLUMNS: u32 = {{COLUMNS}}u; // of values, an invocation
var<workgroup> keys: array<f32, 4160>;    // [64][65]: padded, so that the same column of 32 keys lies in 32 banks
var<workgroup> query: array<f32, 256>;    // [4][64]
var<workgroup> scores: array<f32, 256>;   // [4][64]
var<workgroup> slots: array<u32, 64>;
var<workgroup> num_keys: u32;

@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let token = group.z;
  let lane = local % 32u;
  let head_here = local / 32u;
  let first_head = group.y * args.heads_per_group;
  let head = first_head + head_here;
  let active_head = head_here < args.heads_per_group;
  let key_head = first_head / args.heads_per_key;

  let position = positions[args.positions_offset + token];
  var first = 0u;
  var total = position + 1u;
  if (args.has_index != 0u) {
    total = index_counts[args.counts_offset + token];
  } else if (args.window != 0u && position + 1u > args.window) {
    first = position + 1u - args.window;
    total = args.window;
  }
  if (local == 0u) { num_keys = select(0u, min(PART, total - group.x * PART), total > group.x * PART); }
  let n = workgroupUniformLoad(&num_keys);
  if (n == 0u) { return; }
  if (local < PART) {
    var slot = 0u;
    if (local < n) {
      let rank = group.x * PART + local;
      var key_position = first + rank;
      if (args.has_index != 0u) { key_position = index_ids[args.index_offset + token * args.index_stride + rank]; }
      slot = slot_of(key_position, token);
    }
    slots[local] = slot;
  }
  var score0 = 0.0;
  var score1 = 0.0;
  let dim = args.q_dim + args.rope_dim;
  for (var start = 0u; start < dim; start += 64u) {
    workgroupBarrier();
    for (var i = local; i < 256u; i += 128u) {
      let h = i / 64u;
      let d = start + i % 64u;
      var value = 0.0;
      if (h < args.heads_per_group && d < dim) {
        if (d < args.q_dim) {
          value = q[args.q_offset + token * args.q_stride + (first_head + h) * args.q_dim + d];
        } else {
          value = q_rope[args.rope_offset + token * args.rope_stride + (first_head + h) * args.rope_head_stride + d - args.q_dim];
        }
      }
      query[i] = value;
    }
    for (var i = local; i < 4096u; i += 128u) {
      let key = i / 64u;
      let d = start + i % 64u;
      var value = 0.0;
      if (key < n && d < dim) { value = cached(slots[key], key_head * args.key_step + d); }
      keys[key * 65u + i % 64u] = value;
    }
    workgroupBarrier();
    for (var d = 0u; d < 64u; d++) {
      let value = query[head_here * 64u + d];
      score0 = fma(value, keys[lane * 65u + d], score0);
      score1 = fma(value, keys[(lane + 32u) * 65u + d], score1);
    }
  }
  scores[head_here * 64u + lane] = score0 * args.scale;
  scores[head_here * 64u + lane + 32u] = score1 * args.scale;
  workgroupBarrier();
  var largest = LOWEST;
  for (var key = 0u; key < n; key++) { largest = max(largest, scores[head_here * 64u + key]); }
  let share0 = select(0.0, exp(scores[head_here * 64u + lane] - largest), lane < n);
  let share1 = select(0.0, exp(scores[head_here * 64u + lane + 32u] - largest), lane + 32u < n);
  workgroupBarrier();
  scores[head_here * 64u + lane] = share0;
  scores[head_here * 64u + lane + 32u] = share1;
  workgroupBarrier();
  if (!active_head) { return; }
  var sum = 0.0;
  var values = array<f32, COLUMNS>();
  let column = args.value_first + key_head * args.value_step + lane;
  for (var key = 0u; key < n; key++) {
    let share = scores[head_here * 64u + key];
    sum = sum + share;
    let slot = slots[key];
{{VALUES}}
  }
  let at = ((token * args.num_heads + head) * args.num_parts + group.x) * (2u + args.value_dim);
  if (lane == 0u) {
    parts[at] = largest;
    parts[at + 1u] = sum;
  }
{{STORES}}
}
