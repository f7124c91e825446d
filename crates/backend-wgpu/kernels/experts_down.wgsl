// The down projections of one token's experts and their weighted sum: out = plus + sum_i weights[i] (x_i W_ids[i]^T), in the order of i.
// A workgroup has {{ROWS}} rows of every expert, a team an expert at a time. Chunks and sums as in product.wgsl, and the weighted sum as in
// combine.wgsl: same bits as those two. `plus` is a row, or the product that makes it: the shared expert's, whose fields and bindings end in
// `_b` and whose activations are x's last part. Invocations behind the first 256 make it, where sums go through registers.
struct Args {
  x_part_step: u32, chunks: u32, rows: u32, lanes: u32, out_offset: u32, plus_offset: u32, has_plus: u32,
  top_k: u32, ids_offset: u32, weights_offset: u32, bias_offset: u32, has: u32, block_columns: u32, scale_words: u32,
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
var<workgroup> results: array<vec4<f32>, {{MOST}}>;   // of every expert
var<workgroup> plus_here: vec4<f32>;

@compute @workgroup_size({{WORKERS}})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let team = group.x;
  {{BEFORE}}
  let chunks = args.chunks;
  let lanes = args.lanes;
  let lane = local % lanes;
  let teams = 256u / lanes;
  for (var first = 0u; first < args.top_k; first += teams) {
    let slot = first + local / lanes;
    // A team too many repeats the last.
    let place = min(slot, args.top_k - 1u);
    let local_matrix = ids[args.ids_offset + place];
    let x_row0 = place * args.x_part_step;
{{START}}
    for (var chunk = lane; chunk < chunks; chunk += lanes) {
{{BODY}}
    }
{{FINISH}}
    if (lane == 0u && slot < args.top_k) {
      var global = 1.0;
      if ((args.has & 2u) != 0u) { global = extra[local_matrix]; }
      var bias = vec4<f32>();
      if ((args.has & 1u) != 0u) {
        for (var r = 0u; r < ROWS; r++) {
          bias[r] = extra[args.bias_offset + local_matrix * args.rows + min(team * ROWS + r, args.rows - 1u)];
        }
      }
      results[slot] = fma(sum0_0, vec4<f32>(global), bias);
    }
  }
{{SHARED}}
  workgroupBarrier();
  let row = group.x * ROWS + local;
  if (local < ROWS && row < args.rows) {
    var total = 0.0;
    if (args.has_plus == 1u) { total = plus[args.plus_offset + row]; }
    if (args.has_plus == 2u) { total = plus_here[local]; }
    for (var slot = 0u; slot < args.top_k; slot++) {
      total = fma(weights[args.weights_offset + slot], results[slot][local], total);
    }
    if ((args.has & 16u) != 0u) { total = out[args.out_offset + row] + total; }
    out[args.out_offset + row] = total;
  }
}
