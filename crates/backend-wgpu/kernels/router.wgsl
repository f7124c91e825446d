// One row's router: the product that makes its logits, by product.wgsl's sums, and route.wgsl's choice, made by the workgroup that is done
// last. What it reads of the others went past every cache (`@coherent`), and was there before they arrived.
struct Args {
  chunks: u32, block_columns: u32, scale_words: u32, rows: u32, lanes: u32, groups: u32, has: u32, bias_offset: u32,
  logits_offset: u32, correction_offset: u32, ids_offset: u32, ids_stride: u32, weights_offset: u32, weights_stride: u32,
  num_experts: u32, top_k: u32, scoring: u32, n_group: u32, topk_group: u32, has_bias: u32, norm: u32, factor: f32,
}
var<immediate> args: Args;
@group(0) @binding(0) @coherent var<storage, read_write> logits: array<f32>;
@group(0) @binding(1) var<storage, read_write> bias: array<f32>;
@group(0) @binding(2) var<storage, read_write> ids: array<u32>;
@group(0) @binding(3) var<storage, read_write> weights: array<f32>;
@group(0) @binding(4) var<storage, read_write> arrivals: array<atomic<u32>>;   // zero between dispatches
@group(0) @binding(5) var<storage, read> x: array<{{X}}>;
@group(0) @binding(6) var<storage, read> codes: array<{{WORD}}>;
@group(0) @binding(7) var<storage, read> scales: array<u32>;
@group(0) @binding(8) var<storage, read> extra: array<f32>;
const TOKENS: u32 = 1u;
const ROWS: u32 = {{ROWS}}u;
{{PARTIAL}}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let chunks = args.chunks;
  let lanes = args.lanes;
  let lane = local % lanes;
  let team = group.x * (256u / lanes) + local / lanes;
  let local_matrix = 0u;
  let x_row0 = 0u;
  let count = 1u;
{{START}}
  for (var chunk = lane; chunk < chunks; chunk += lanes) {
{{BODY}}
  }
{{FINISH}}
  let first_row = group.x * (256u / lanes) * ROWS;
  let here = local / lanes * ROWS;
{{KEEP}}
  if (is_last_of(args.groups, 0u, local)) { route(args.logits_offset, 0u, local); }
}

fn finished(sum: f32, row: u32) -> f32 {
  var global = 1.0;
  if ((args.has & 2u) != 0u) { global = extra[0]; }
  var bias = 0.0;
  if ((args.has & 1u) != 0u) { bias = extra[args.bias_offset + row]; }
  return fma(sum, global, bias);
}

{{ROUTE}}
