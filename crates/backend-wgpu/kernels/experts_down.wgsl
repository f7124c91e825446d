// The down projections of one token's experts and their weighted sum: out = plus + sum_i weights[i] (x_i W_ids[i]^T), in the order of i.
// A workgroup has {{ROWS}} rows of every expert in each of its passes, a team an expert at a time. Chunks and sums as in product.wgsl, and
// the weighted sum as in combine.wgsl: same bits as those two. `plus` is a row, or the product that makes it: the shared expert's, whose
// fields and bindings end in `_b` and whose activations are x's last part. Invocations behind the first 256 make it, up to 32 lanes of its
// team at a time.
struct Args {
  x_part_step: u32, chunks: u32, rows: u32, lanes: u32, out_offset: u32, plus_offset: u32, has_plus: u32,
  top_k: u32, ids_offset: u32, weights_offset: u32, bias_offset: u32, has: u32, block_columns: u32, scale_words: u32,
  passes: u32,
  chunks_b: u32, lanes_b: u32, bias_offset_b: u32, has_b: u32, scale_words_b: u32,
}
var<immediate> args: Args;
@group(0) @binding(0) var<storage, read_write> out: array<f32>;
@group(0) @binding(1) var<storage, read_write> plus: array<f32>;
@group(0) @binding(2) var<storage, read> x: array<{{X}}>;
@group(0) @binding(3) var<storage, read> ids: array<u32>;
@group(0) @binding(4) var<storage, read> weights: array<f32>;
@group(0) @binding(5) var<storage, read> codes: array<{{WORD}}>;
@group(0) @binding(6) var<storage, read> scales: array<u32>;
@group(0) @binding(7) var<storage, read> extra: array<f32>;   // global scales [matrices], then biases [matrices, rows]
{{SECOND}}
const ROWS: u32 = {{ROWS}}u;
const SHARED: bool = {{SHARED}};
const MOST: u32 = {{MOST}}u;   // sums of a pass, of up to 32 lanes each; the shared expert's are behind them
var<workgroup> results: array<vec4<f32>, {{RESULTS}}>;   // of two passes: one is added up while the other is made
var<workgroup> shares: array<f32, MOST>;
{{PARTIAL}}

@compute @workgroup_size({{WORKERS}})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let is_shared = SHARED && local >= 256u;
  let mine = local % 256u;
  let chunks = select(args.chunks, args.chunks_b, is_shared);
  let lanes = select(args.lanes, args.lanes_b, is_shared);
  let scale_words = select(args.scale_words, args.scale_words_b, is_shared);
  let rounds = (chunks + lanes - 1u) / lanes;
  // The shared expert's lanes take turns, experts do where there are more of them than teams.
  let teams = 256u / args.lanes;
  let parts = max(args.lanes / 32u, 1u);
  let turns_of_experts = (args.top_k + teams - 1u) / teams;
  let turns_of_shared = max(args.lanes_b / 32u, 1u);
  let turns = select(turns_of_experts, select(turns_of_shared, 0u, mine >= lanes), is_shared);
  let lane_here = select(mine % lanes, mine, is_shared);
  let end_team = (group.x + 1u) * args.passes;
  if (local < args.top_k) { shares[local] = weights[args.weights_offset + local]; }
  var team = group.x * args.passes;
  var turn = 0u;
  var next_round = 0u;
{{DECLARE}}
{{FIRST}}
  for (var row_pass = 0u; row_pass < args.passes; row_pass++) {
    let row = (group.x * args.passes + row_pass) * ROWS + local;
    let is_row = local < ROWS && row < args.rows;
    var before = 0.0;
    var total = 0.0;
    if (is_row && (args.has & 16u) != 0u) { before = out[args.out_offset + row]; }
    if (is_row && args.has_plus == 1u) { total = plus[args.plus_offset + row]; }
    let first_result = (row_pass % 2u) * (MOST + {{MOST_OF_SHARED}}u);
    for (var turn_here = 0u; turn_here < {{TURNS}}; turn_here++) {
      let is_busy = turn_here < turns;
      let slot = turn_here * teams + mine / lanes;
      // A team too many repeats the last expert.
      let x_row0 = select(min(slot, args.top_k - 1u), args.top_k, is_shared) * args.x_part_step;
      let lane = lane_here + select(0u, 32u * turn_here, is_shared);
{{START}}
{{ROUNDS}}
{{SUM}}
      if (is_busy && lane % 32u == 0u) {
        if (is_shared) {
          results[first_result + MOST + turn_here] = sum;
        } else if (slot < args.top_k) {
          results[first_result + slot * parts + lane / 32u] = sum;
        }
      }
    }
    workgroupBarrier();
    if (is_row) {
      if (SHARED) {
        var sum = results[first_result + MOST][local];
        for (var i = 1u; i < turns_of_shared; i++) { sum = sum + results[first_result + MOST + i][local]; }
        total = finished(sum, row, 0u, true);
      }
      for (var i = 0u; i < args.top_k; i++) {
        var sum = results[first_result + i * parts][local];
        for (var part = 1u; part < parts; part++) { sum = sum + results[first_result + i * parts + part][local]; }
        total = fma(shares[i], finished(sum, row, ids[args.ids_offset + i], false), total);
      }
      if ((args.has & 16u) != 0u) { total = before + total; }
      out[args.out_offset + row] = total;
    }
  }
}

fn finished(sum: f32, row: u32, matrix: u32, is_shared: bool) -> f32 {
  var global = 1.0;
  var bias = 0.0;
{{FINISHED}}
  return fma(sum, global, bias);
}
