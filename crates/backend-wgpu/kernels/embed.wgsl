// Rows of a table as floats. An invocation has a chunk (32 columns) of a token; tokens of other shards of the table are left alone.
struct Args {
  ids_offset: u32, out_offset: u32, out_stride: u32, cols: u32, chunks: u32, first_row: u32, num_rows: u32,
  block_columns: u32, scale_words: u32, has_global: u32,
}
var<immediate> args: Args;
@group(0) @binding(0) var<storage, read_write> out: array<f32>;
@group(0) @binding(1) var<storage, read_write> token_ids: array<u32>;
@group(0) @binding(2) var<storage, read> codes: array<{{WORD}}>;
@group(0) @binding(3) var<storage, read> scales: array<u32>;
@group(0) @binding(4) var<storage, read> extra: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
  let chunk = id.x;
  let row0 = token_ids[args.ids_offset + id.y] - args.first_row;
  if (chunk >= args.chunks || row0 >= args.num_rows) { return; }
  var global = 1.0;
  if (args.has_global != 0u) { global = extra[0]; }
  let start = args.out_offset + id.y * args.out_stride + 32u * chunk;
  let columns = min(32u, args.cols - 32u * chunk);
  var values = array<f32, 32>();
{{BODY}}
  for (var i = 0u; i < columns; i++) { out[start + i] = values[i] * global; }
}
