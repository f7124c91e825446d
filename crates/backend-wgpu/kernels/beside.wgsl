// Products of rows of x, {{TOKENS}} at a time, with two weights of one format: one dispatch instead of two that would wait for each other.
// Workgroups of the first come first. A side is beside_side.wgsl, and fields, bindings and functions of the second one end in `_b`.
struct Args {
  chunks: u32, block_columns: u32, scale_words: u32, x_token_step: u32, num_tokens: u32,
  rows: u32, lanes: u32, groups: u32, out_offset: u32, out_stride: u32, has: u32, bias_offset: u32,
  forms: u32, part_count: u32, part_stride: u32, part_cols: u32, part_chunks: u32, per_byte: u32,   // of out: forms.wgsl
  rows_b: u32, lanes_b: u32, groups_b: u32, out_offset_b: u32, out_stride_b: u32, has_b: u32, bias_offset_b: u32,
  forms_b: u32, part_count_b: u32, part_stride_b: u32, part_cols_b: u32, part_chunks_b: u32, per_byte_b: u32,
}
var<immediate> args: Args;
@group(0) @binding(0) var<storage, read_write> out: array<f32>;
@group(0) @binding(1) var<storage, read_write> form: array<u32>;
@group(0) @binding(2) var<storage, read_write> out_b: array<f32>;
@group(0) @binding(3) var<storage, read_write> form_b: array<u32>;
@group(0) @binding(4) var<storage, read> x: array<{{X}}>;
{{WEIGHTS}}
const ROWS: u32 = {{ROWS}}u;
const TOKENS: u32 = {{TOKENS}}u;
var<workgroup> finals: array<f32, {{FINALS}}>;
{{PARTIAL}}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let first = group.z * TOKENS;
  let count = min(TOKENS, args.num_tokens - first);
  if (group.x < args.groups) {
    side(0u, group.x, first, count, local);
  } else {
    side_b(0u, group.x - args.groups, first, count, local);
  }
}

{{FIRST}}
{{SECOND}}
