// Joins the parts of attend.wgsl (join_parts.wgsl). A workgroup a head and token.
struct Args {
  out_offset: u32, out_stride: u32, num_heads: u32, value_dim: u32, num_parts: u32, window: u32, positions_offset: u32,
  counts_offset: u32, has_index: u32, sinks_offset: u32, has_sinks: u32,
  forms: u32, part_count: u32, part_stride: u32, part_cols: u32, part_chunks: u32, per_byte: u32,   // of out: forms.wgsl
}
var<immediate> args: Args;
@group(0) @binding(0) var<storage, read_write> parts: array<f32>;
@group(0) @binding(1) var<storage, read_write> positions: array<u32>;
@group(0) @binding(2) var<storage, read_write> index_counts: array<u32>;
@group(0) @binding(3) var<storage, read_write> sinks: array<f32>;
@group(0) @binding(4) var<storage, read_write> out: array<f32>;
@group(0) @binding(5) var<storage, read_write> form: array<u32>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let head = group.x;
  let token = group.y;
  let join = begin_join(head, token, local);
  for (var start_column = 0u; start_column < args.value_dim; start_column += 256u) {
    let column = start_column + local;
    var value = 0.0;
    if (column < args.value_dim) {
      value = join_column(join, column);
      put(token, head * args.value_dim + column, value);
    }
    put_integers(token, head * args.value_dim + start_column, args.value_dim - start_column, value, local);
  }
}
