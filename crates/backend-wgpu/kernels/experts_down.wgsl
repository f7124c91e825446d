// The down projections of one token's experts and their weighted sum: out = plus + sum_i weights[i] (x_i W_ids[i]^T), in the order of i.
// Teams, chunks and sums as in product.wgsl, and the weighted sum as in combine.wgsl: same bits as those two.
struct Args {
  x_part_step: u32, chunks: u32, rows: u32, lanes: u32, out_offset: u32, plus_offset: u32, has_plus: u32,
  top_k: u32, ids_offset: u32, weights_offset: u32, bias_offset: u32, has: u32, block_columns: u32, scale_words: u32,
}
var<immediate> args: Args;
@group(0) @binding(0) var<storage, read_write> out: array<f32>;
@group(0) @binding(1) var<storage, read_write> plus: array<f32>;
@group(0) @binding(2) var<storage, read> x: array<{{X}}>;
@group(0) @binding(3) var<storage, read> ids: array<u32>;
@group(0) @binding(4) var<storage, read> weights: array<f32>;
@group(0) @binding(5) var<storage, read> codes: array<{{WORD}}>;
@group(0) @binding(6) var<storage, read> scales: array<u32>;
@group(0) @binding(7) var<storage, read> extra: array<f32>;
{{SECOND}}
const ROWS: u32 = {{ROWS}}u;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let lane = local % args.lanes;
  let team = group.x * (256u / args.lanes) + local / args.lanes;
  // Every lane keeps the sums of its team.
  var total = vec4<f32>();
  if (args.has_plus != 0u) {
    for (var r = 0u; r < ROWS; r++) { total[r] = plus[args.plus_offset + min(team * ROWS + r, args.rows - 1u)]; }
  }
  for (var slot = 0u; slot < args.top_k; slot++) {
    let local_matrix = ids[args.ids_offset + slot];
    let x_row0 = slot * args.x_part_step;
{{START}}
    for (var chunk = lane; chunk < args.chunks; chunk += args.lanes) {
{{BODY}}
    }
{{FINISH}}
    var global = 1.0;
    if ((args.has & 2u) != 0u) { global = extra[local_matrix]; }
    var bias = vec4<f32>();
    if ((args.has & 1u) != 0u) {
      for (var r = 0u; r < ROWS; r++) {
        bias[r] = extra[args.bias_offset + local_matrix * args.rows + min(team * ROWS + r, args.rows - 1u)];
      }
    }
    total = fma(vec4<f32>(weights[args.weights_offset + slot]), fma(sum0_0, vec4<f32>(global), bias), total);
  }
  for (var r = lane; r < ROWS; r += args.lanes) {
    if (team * ROWS + r < args.rows) {
      let at = args.out_offset + team * ROWS + r;
      if ((args.has & 16u) != 0u) { out[at] = out[at] + total[r]; } else { out[at] = total[r]; }
    }
  }
}
