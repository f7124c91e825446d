// The router: logits to chosen experts, best first (the lower index first where equal), with their weights. A workgroup a token.
struct Args {
  logits_offset: u32, logits_stride: u32, correction_offset: u32, ids_offset: u32, ids_stride: u32, weights_offset: u32, weights_stride: u32,
  num_experts: u32, top_k: u32, scoring: u32, n_group: u32, topk_group: u32, has_bias: u32, norm: u32, factor: f32,
}
var<immediate> args: Args;
@group(0) @binding(0) var<storage, read_write> logits: array<f32>;
@group(0) @binding(1) var<storage, read_write> bias: array<f32>;
@group(0) @binding(2) var<storage, read_write> ids: array<u32>;
@group(0) @binding(3) var<storage, read_write> weights: array<f32>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  route(args.logits_offset + group.x * args.logits_stride, group.x, local);
}

{{ROUTE}}
