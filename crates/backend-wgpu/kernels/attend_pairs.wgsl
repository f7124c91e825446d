// What attend.wgsl does, where 32 invocations in a row can exchange values: a workgroup has up to {{HEADS}} heads that read the same keys and
// one part of 64 keys, of which each of its eight subgroups takes every eighth, two at a time. A lane has pairs of columns: of the queries,
// of the keys, of the sums of values, all in registers; scores are added up by shuffles. The eight meet at the end, in order.
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
const COLUMNS: u32 = {{COLUMNS}}u;           // of values that a subgroup's lanes have together
var<workgroup> sums: array<f32, {{SUMS}}>;   // [8][COLUMNS]: one head of every subgroup
var<workgroup> states: array<vec2<f32>, 32>; // [8][4]: largest score and sum of shares
var<workgroup> slots: array<u32, 64>;
var<workgroup> num_keys: u32;

// Loads stand in no branch, so that many are on their way at once.

// Two columns of a row, from an even one on.
fn pair(slot: u32, column: u32) -> vec2<f32> {
{{PAIR}}
}

// Two columns of a head's query; zeros behind its end.
fn query(token: u32, head: u32, column: u32) -> vec2<f32> {
  let at = args.q_offset + token * args.q_stride + head * args.q_dim + min(column, args.q_dim - 2u);
  let rope_first = args.rope_offset + token * args.rope_stride + head * args.rope_head_stride;
  // Where there is no such part q_rope is q again.
  let rope_at = select(at, rope_first + min(max(column, args.q_dim) - args.q_dim, max(args.rope_dim, 2u) - 2u), args.rope_dim != 0u);
  let plain = vec2<f32>(q[at], q[at + 1u]);
  let rotated = vec2<f32>(q_rope[rope_at], q_rope[rope_at + 1u]);
  let value = select(rotated, plain, column < args.q_dim);
  return select(vec2<f32>(), value, column < args.q_dim + args.rope_dim);
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let token = group.z;
  let lane = local % 32u;
  let subgroup = local / 32u;
  let first_head = group.y * args.heads_per_group;
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
  if (local < n) {
    let rank = group.x * PART + local;
    var key_position = first + rank;
    if (args.has_index != 0u) { key_position = index_ids[args.index_offset + token * args.index_stride + rank]; }
    slots[local] = slot_of(key_position, token);
  }
  // The last head again where there are fewer than four.
  let last = args.heads_per_group - 1u;
{{QUERIES}}
  let end = args.q_dim + args.rope_dim - 2u;
  let key_first = key_head * args.key_step;
  let value_first = args.value_first + key_head * args.value_step;
  var largest = {{SCORE}}(LOWEST);
  var sum = {{SCORE}}();
  workgroupBarrier();
  for (var key = subgroup; key < n; key += 16u) {
    let has_second = key + 8u < n;
    let slot = slots[key];
    let slot1 = slots[min(key + 8u, n - 1u)];
{{KEYS}}
    var score = {{SCORE}}();
    var score1 = {{SCORE}}();
{{SCORES}}
    for (var step = 16u; step > 0u; step >>= 1u) {
      score = score + subgroupShuffleXor(score, step);
      score1 = score1 + subgroupShuffleXor(score1, step);
    }
    let scale = {{SCORE}}(args.scale);
    {
      let larger = max(largest, score * scale);
      let kept = exp(largest - larger);
      let share = exp(fma(score, scale, -larger));
      largest = larger;
      sum = fma(sum, kept, share);
{{VALUES}}
    }
    if (has_second) {
      let larger = max(largest, score1 * scale);
      let kept = exp(largest - larger);
      let share = exp(fma(score1, scale, -larger));
      largest = larger;
      sum = fma(sum, kept, share);
{{VALUES1}}
    }
  }
  if (lane < {{HEADS}}u) { states[subgroup * 4u + lane] = vec2<f32>({{STATE}}); }
{{JOIN}}
}

// Adds up one head of the eight subgroups.
fn join(head_here: u32, token: u32, part: u32, first_head: u32, local: u32) {
  workgroupBarrier();
  if (head_here < args.heads_per_group) {
    var largest = LOWEST;
    for (var i = 0u; i < 8u; i++) { largest = max(largest, states[i * 4u + head_here].x); }
    let at = ((token * args.num_heads + first_head + head_here) * args.num_parts + part) * (2u + args.value_dim);
    for (var column = local; column < args.value_dim; column += 256u) {
      var value = 0.0;
      for (var i = 0u; i < 8u; i++) {
        value = fma(exp(states[i * 4u + head_here].x - largest), sums[i * COLUMNS + column], value);
      }
      parts[at + 2u + column] = value;
    }
    if (local == 0u) {
      var sum = 0.0;
      for (var i = 0u; i < 8u; i++) { sum = fma(exp(states[i * 4u + head_here].x - largest), states[i * 4u + head_here].y, sum); }
      parts[at] = largest;
      parts[at + 1u] = sum;
    }
  }
  workgroupBarrier();
}
