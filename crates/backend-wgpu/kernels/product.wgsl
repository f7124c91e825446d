// out = x W^T: one kernel a weight format and number of rows of x ({{TOKENS}} here) that weights in registers are used for.
// Or out = f(x G^T, x U^T), a pair of weights of one shape.
//
// A team of `lanes` invocations has {{ROWS}} rows of weights; lane l has the chunks (32 columns) l, l + lanes, .. of each. So neighbours
// read neighbouring bytes of the weights, which lie as in the checkpoint, row after row, and of x in the form of spread.wgsl, or, where
// codes are integers of bits that divide a byte, of digits.wgsl. Sums over a team are a tree. `lanes` is a function of the weight's shape alone, and the kernels for one and for many rows of x, alone and
// in pairs, perform the same operations on a row in the same order: same bits.
struct Args {
  x_token_step: u32,     // 16-byte elements between the rows of x
  x_part_step: u32,      // and between the parts of a row (heads, slots)
  chunks: u32, rows: u32, lanes: u32,
  out_offset: u32, out_stride: u32, out_matrix_step: u32,
  num_tokens: u32,
  first_row: u32, first_matrix: u32, num_matrices: u32, matrix_rows: u32,
  mode: u32,             // 0: matrix = group.y, tokens from group.z; 1: items of a work list; 2: choice group.y of one token
  slots_in_x: u32, top_k: u32, list_offset: u32, sorted_offset: u32,
  bias_offset: u32, bias_offset2: u32,
  has: u32,              // bits: bias, global scale, those of the second weight of a pair, out is added to
  block_columns: u32,    // columns that share a scale, where they are more than a chunk
  scale_words: u32,      // words of scales a row
  forms: u32, part_count: u32, part_stride: u32, part_cols: u32, part_chunks: u32, per_byte: u32,   // of out: forms.wgsl
  activation: u32, alpha: f32, limit: f32,
}
var<immediate> args: Args;
@group(0) @binding(0) var<storage, read_write> out: array<f32>;
@group(0) @binding(1) var<storage, read_write> form: array<u32>;
@group(0) @binding(2) var<storage, read> x: array<{{X}}>;
@group(0) @binding(3) var<storage, read> list: array<u32>;
@group(0) @binding(4) var<storage, read> codes: array<{{WORD}}>;
@group(0) @binding(5) var<storage, read> scales: array<u32>;
@group(0) @binding(6) var<storage, read> extra: array<f32>;   // global scales [matrices], then biases [matrices, rows]
{{SECOND}}

const TOKENS: u32 = {{TOKENS}}u;
const ROWS: u32 = {{ROWS}}u;

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

fn finished(sum: f32, row: u32, matrix: u32) -> f32 {
  var global = 1.0;
  if ((args.has & 2u) != 0u) { global = extra[matrix]; }
  var bias = 0.0;
  if ((args.has & 1u) != 0u) { bias = extra[args.bias_offset + matrix * args.matrix_rows + args.first_row + row]; }
  return fma(sum, global, bias);
}

{{STORE}}
