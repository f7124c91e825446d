// One token's attend_join.wgsl and the product of each head's values with a matrix of its own, as product.wgsl does it: a workgroup joins
// its head in workgroup memory, in the form that the product reads.
struct Args {
  num_heads: u32, value_dim: u32, num_parts: u32, window: u32, positions_offset: u32, counts_offset: u32, has_index: u32,
  sinks_offset: u32, has_sinks: u32, x_per_byte: u32,
  chunks: u32, block_columns: u32, scale_words: u32, x_part_step: u32,
  rows: u32, lanes: u32, groups: u32, out_offset: u32, has: u32, bias_offset: u32,
  forms: u32, part_stride: u32, part_cols: u32, part_chunks: u32, per_byte: u32,   // of out: forms.wgsl
}
var<immediate> args: Args;
@group(0) @binding(0) var<storage, read_write> parts: array<f32>;
@group(0) @binding(1) var<storage, read_write> positions: array<u32>;
@group(0) @binding(2) var<storage, read_write> index_counts: array<u32>;
@group(0) @binding(3) var<storage, read_write> sinks: array<f32>;
@group(0) @binding(4) var<storage, read_write> out: array<f32>;
@group(0) @binding(5) var<storage, read_write> form: array<u32>;
@group(0) @binding(6) var<storage, read> codes: array<{{WORD}}>;
@group(0) @binding(7) var<storage, read> scales: array<u32>;
@group(0) @binding(8) var<storage, read> extra: array<f32>;
const ROWS: u32 = {{ROWS}}u;
const TOKENS: u32 = {{TOKENS}}u;
var<workgroup> finals: array<f32, 256>;
var<workgroup> joined: array<u32, {{WORDS}}>;
{{PARTIAL}}

fn x_at(i: u32) -> {{X}} {
  return bitcast<{{X}}>(vec4<u32>(joined[4u * i], joined[4u * i + 1u], joined[4u * i + 2u], joined[4u * i + 3u]));
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let head = group.x / args.groups;
  let join = begin_join(head, 0u, local);
  for (var start_column = 0u; start_column < args.value_dim; start_column += 256u) {
    let column = start_column + local;
    var value = 0.0;
    if (column < args.value_dim) { value = join_column(join, column); }
{{KEEP}}
  }
  workgroupBarrier();
  side(head, group.x % args.groups, 0u, 1u, local);
}

{{JOIN}}
{{SIDE}}
