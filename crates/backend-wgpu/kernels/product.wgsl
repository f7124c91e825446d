// out = x W^T: one kernel a weight format and number of rows of x ({{TOKENS}} here) that weights in registers are used for.
//
// A team of `lanes` invocations has {{ROWS}} rows of weights; lane l has the chunks (32 columns) l, l + lanes, .. of each. So neighbours
// read neighbouring bytes of the weights, which lie as in the checkpoint, row after row, and of x in the form of spread.wgsl. Sums
// over a team are a tree in workgroup memory. `lanes` is a function of the weight's shape alone, and the kernels for one and for
// many rows of x perform the same operations on a row in the same order: same bits.
struct Args {
  x_token_step: u32,     // 16-byte elements between the rows of x
  x_part_step: u32,      // and between the parts of a row (heads, slots)
  chunks: u32, rows: u32, lanes: u32,
  out_offset: u32, out_stride: u32, out_matrix_step: u32,
  num_tokens: u32,
  first_row: u32, first_matrix: u32, num_matrices: u32, matrix_rows: u32,
  mode: u32,             // 0: matrix = group.y, tokens from group.z; 1: items of a work list; 2: choice group.y of one token
  slots_in_x: u32, top_k: u32, list_offset: u32, sorted_offset: u32,
  bias_offset: u32, has_bias: u32, has_global: u32,
  block_columns: u32,    // columns that share a scale, where they are more than a chunk
  scale_words: u32,      // words of scales a row
}
var<immediate> args: Args;
@group(0) @binding(0) var<storage, read_write> out: array<f32>;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> codes: array<{{WORD}}>;
@group(0) @binding(3) var<storage, read> scales: array<u32>;
@group(0) @binding(4) var<storage, read> extra: array<f32>;   // global scales [matrices], then biases [matrices, rows]
@group(0) @binding(5) var<storage, read> list: array<u32>;

const TOKENS: u32 = {{TOKENS}}u;
const ROWS: u32 = {{ROWS}}u;
var<workgroup> partial: array<vec4<f32>, {{PARTIAL}}>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let lane = local % args.lanes;
  let team = group.x * (256u / args.lanes) + local / args.lanes;
  var matrix = args.first_matrix + group.y;
  var first = group.z * TOKENS;
  var count = min(TOKENS, args.num_tokens - first);
  if (args.mode == 1u) {
    if (group.y >= list[0]) { return; }
    matrix = list[4u + 4u * group.y];
    first = list[5u + 4u * group.y];
    count = list[6u + 4u * group.y];
  } else if (args.mode == 2u) {
    matrix = list[args.list_offset + group.y];
    first = group.y;
    count = 1u;
  }
  if (matrix < args.first_matrix || matrix >= args.first_matrix + args.num_matrices) { return; }
  // Rows of x and of out of each token; a token too many repeats the first.
  var x_rows = array<u32, TOKENS>();
  var out_rows = array<u32, TOKENS>();
  for (var t = 0u; t < TOKENS; t++) {
    var row = first + select(0u, t, t < count);
    if (args.mode == 1u) { row = list[args.sorted_offset + row]; }
    out_rows[t] = row;
    if (args.mode == 0u) {
      x_rows[t] = row * args.x_token_step + matrix * args.x_part_step;
    } else if (args.slots_in_x != 0u) {
      x_rows[t] = (row / args.top_k) * args.x_token_step + (row % args.top_k) * args.x_part_step;
    } else {
      x_rows[t] = (row / args.top_k) * args.x_token_step;
    }
  }
  let local_matrix = matrix - args.first_matrix;
{{START}}
  for (var chunk = lane; chunk < args.chunks; chunk += args.lanes) {
{{BODY}}
  }
{{FINISH}}
}

// Writes the sums of a team's rows for one token; the lanes share them.
fn store(sums: vec4<f32>, token: u32, out_row: u32, team: u32, lane: u32, count: u32, matrix: u32) {
  if (token >= count) { return; }
  for (var r = lane; r < ROWS; r += args.lanes) {
    let row = team * ROWS + r;
    if (row < args.rows) {
      var global = 1.0;
      if (args.has_global != 0u) { global = extra[matrix]; }
      var bias = 0.0;
      if (args.has_bias != 0u) { bias = extra[args.bias_offset + matrix * args.matrix_rows + args.first_row + row]; }
      var at = args.out_offset + out_row * args.out_stride + args.first_row + row;
      if (args.mode == 0u) { at += matrix * args.out_matrix_step; }
      out[at] = fma(sums[r], global, bias);
    }
  }
}
