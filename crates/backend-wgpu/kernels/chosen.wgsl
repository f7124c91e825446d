// Products of rows with the matrices of the experts that they chose: items of a work list, or all choices of one row; and where {{WITH_SHARED}}
// is true, behind them in the grid, with the shared expert's, which every row meets (bindings and fields that end in `_b`). One weight, or a
// pair (gate and up) that meets in an activation. Rows of weights, chunks and sums are as in product.wgsl: same bits.
struct Args {
  x_token_step: u32, x_part_step: u32,   // 16-byte elements between the rows of x and between their slots
  chunks: u32, rows: u32, lanes: u32,
  passes: u32,           // of a workgroup, each with the next rows of the weights
  out_offset: u32, out_stride: u32, num_tokens: u32,
  is_list: u32, slots_in_x: u32, top_k: u32, list_offset: u32, sorted_offset: u32,
  bias_offset: u32, bias_offset2: u32,
  has: u32,              // bits: bias, global scale, those of the second weight of a pair
  block_columns: u32, scale_words: u32,
  forms: u32, part_count: u32, part_stride: u32, part_cols: u32, part_chunks: u32, per_byte: u32,   // of out: forms.wgsl
  activation: u32, alpha: f32, limit: f32,
{{MORE_ARGS}}
}
var<immediate> args: Args;
@group(0) @binding(0) var<storage, read_write> out: array<f32>;
@group(0) @binding(1) var<storage, read_write> form: array<u32>;
@group(0) @binding(2) var<storage, read> x: array<{{X}}>;
@group(0) @binding(3) var<storage, read> list: array<u32>;
{{WEIGHTS}}
const TOKENS: u32 = {{TOKENS}}u;
const ROWS: u32 = {{ROWS}}u;
const WORKERS: u32 = {{WORKERS}}u;
{{PARTIAL}}

@compute @workgroup_size({{WORKERS}})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let chunks = args.chunks;
  let is_shared = {{IS_SHARED}};
  var matrix = 0u;
  var first = {{FIRST_SHARED_ROW}};
  var count = min(TOKENS, args.num_tokens - first);
  if (!is_shared) {
    if (args.is_list != 0u) {
{{LIST_ITEM}}
    } else {
      matrix = list[args.list_offset + group.y];
      first = group.y;
      count = 1u;
    }
  }
{{SHARD}}
  // Rows of x, and rows and slots of out, of each token; a token too many repeats the first. The shared expert's slot is the last.
  var x_rows = array<u32, TOKENS>();
  var out_rows = array<u32, TOKENS>();
  var slots = array<u32, TOKENS>();
  for (var t = 0u; t < TOKENS; t++) {
    var row = first + select(0u, t, t < count);
    var slot = args.top_k;
    if (!is_shared) {
      if (args.is_list != 0u) { row = list[args.sorted_offset + row]; }
      slot = row % args.top_k;
      row = row / args.top_k;
    }
    out_rows[t] = row;
    slots[t] = slot;
    x_rows[t] = row * args.x_token_step + select(0u, slot * args.x_part_step, args.slots_in_x != 0u);
  }
{{X_ROWS}}
  let lanes = {{LANES_HERE}};
  let lane = local % lanes;
  let teams = WORKERS / lanes;
  // Larger teams of the shared expert have fewer rows in a pass.
  let passes = args.passes * lanes / args.lanes;
  let first_row = group.x * passes * teams * ROWS;
{{ROUNDS}}
{{END}}
}

fn finished(sum: f32, row: u32, matrix: u32, is_shared: bool) -> f32 {
  var global = 1.0;
  var bias = 0.0;
{{FINISHED}}
  return fma(sum, global, bias);
}

{{FINISHED_SECOND}}
