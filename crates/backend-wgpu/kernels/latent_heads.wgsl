// One token's store_latent.wgsl, in the first workgroups, and the product of each head's query with a matrix of its own, as product.wgsl
// does it: neither reads what the other writes.
struct Args {
  latent_offset: u32, latent_stride: u32, latent_cols: u32, weight_offset: u32, eps: f32,
  key_offset: u32, key_stride: u32, q_offset: u32, q_stride: u32, num_heads: u32, head_stride: u32,
  table_offset: u32, table_stride: u32, half: u32, slots_offset: u32, row_words: u32,
  flags: u32,   // bits: pairs of columns are neighbours, the cache is bfloat16
  chunks: u32, block_columns: u32, scale_words: u32, x_part_step: u32,
  rows: u32, lanes: u32, groups: u32, out_offset: u32, has: u32, bias_offset: u32,
  forms: u32, part_stride: u32, part_cols: u32, part_chunks: u32, per_byte: u32,   // of out: forms.wgsl
}
var<immediate> args: Args;
@group(0) @binding(0) var<storage, read_write> latent: array<f32>;
@group(0) @binding(1) var<storage, read_write> key: array<f32>;
@group(0) @binding(2) var<storage, read_write> q: array<f32>;
@group(0) @binding(3) var<storage, read_write> cache: array<u32>;
@group(0) @binding(4) var<storage, read_write> out: array<f32>;
@group(0) @binding(5) var<storage, read_write> form: array<u32>;
@group(0) @binding(6) var<storage, read> table: array<f32>;
@group(0) @binding(7) var<storage, read> slots: array<u32>;
@group(0) @binding(8) var<storage, read> weight: array<f32>;
@group(0) @binding(9) var<storage, read> x: array<{{X}}>;
@group(0) @binding(10) var<storage, read> codes: array<{{WORD}}>;
@group(0) @binding(11) var<storage, read> scales: array<u32>;
@group(0) @binding(12) var<storage, read> extra: array<f32>;
const ROWS: u32 = {{ROWS}}u;
const TOKENS: u32 = {{TOKENS}}u;
var<workgroup> finals: array<f32, 256>;
{{PARTIAL}}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let first_groups = 1u + (args.num_heads * args.half + 255u) / 256u;
  if (group.x < first_groups) {
    store_latent(group.x, 0u, local);
  } else {
    let matrix = (group.x - first_groups) / args.groups;
    side(matrix, (group.x - first_groups) % args.groups, 0u, 1u, local);
  }
}

{{LATENT}}
{{SIDE}}
