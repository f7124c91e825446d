// Products of one row of x with two weights of one format (or two pairs: gate and up), the first of which may be the chosen experts' of the
// token: one dispatch instead of two that would wait for each other. Workgroups of the first come first. A side is beside_side.wgsl, and
// fields, bindings and functions of the second one end in `_b`.
struct Args {
  chunks: u32, block_columns: u32, scale_words: u32, activation: u32, alpha: f32, limit: f32,
  top_k: u32,            // matrices of the first weight that the token chose; 0: it has one
  ids_offset: u32,
  rows: u32, lanes: u32, groups: u32, out_offset: u32, has: u32, bias_offset: u32, second_bias: u32,
  forms: u32, part_stride: u32, part_cols: u32, part_chunks: u32, per_byte: u32,   // of out: forms.wgsl
  rows_b: u32, lanes_b: u32, groups_b: u32, out_offset_b: u32, has_b: u32, bias_offset_b: u32, second_bias_b: u32,
  forms_b: u32, part_stride_b: u32, part_cols_b: u32, part_chunks_b: u32, per_byte_b: u32,
}
var<immediate> args: Args;
@group(0) @binding(0) var<storage, read_write> out: array<f32>;
@group(0) @binding(1) var<storage, read_write> form: array<u32>;
@group(0) @binding(2) var<storage, read_write> out_b: array<f32>;
@group(0) @binding(3) var<storage, read_write> form_b: array<u32>;
@group(0) @binding(4) var<storage, read> x: array<{{X}}>;
@group(0) @binding(5) var<storage, read> ids: array<u32>;
{{WEIGHTS}}
const ROWS: u32 = {{ROWS}}u;
var<workgroup> finals: array<f32, 256>;
{{PARTIAL}}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let first_groups = args.groups * max(args.top_k, 1u);
  if (group.x < first_groups) {
    let slot = group.x / args.groups;
    var matrix = 0u;
    if (args.top_k != 0u) { matrix = ids[args.ids_offset + slot]; }
    side(slot, matrix, group.x % args.groups, local);
  } else {
    side_b(0u, 0u, group.x - first_groups, local);
  }
}

{{FIRST}}
{{SECOND}}
