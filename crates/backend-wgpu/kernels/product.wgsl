// out = x W^T: one kernel a weight format and number of rows of x ({{TOKENS}} here) that weights in registers are used for. The matrices of a
// weight (one, or heads side by side) each meet every row. Or out = f(x G^T, x U^T), a pair of weights of one shape.
//
// A team of `lanes` invocations has {{ROWS}} rows of weights; lane l has the chunks (32 columns) l, l + lanes, .. of each. So neighbours
// read neighbouring bytes of the weights, which lie as in the checkpoint, row after row, and of x in the form of spread.wgsl, or, where
// codes are integers of bits that divide a byte, of digits.wgsl. Sums over a team are a tree. `lanes` is a function of the weight's shape
// alone, and the kernels for one and for many rows of x, alone and in pairs, perform the same operations on a row in the same order: same
// bits.
struct Args {
{{SHARD_ARGS}}
  x_token_step: u32,     // 16-byte elements between the rows of x
  x_part_step: u32,      // and between the parts of a row (heads)
  forms: u32, part_count: u32, part_stride: u32, part_cols: u32, part_chunks: u32, per_byte: u32,   // of out: forms.wgsl
}
var<immediate> args: Args;
@group(0) @binding(0) var<storage, read_write> out: array<f32>;
@group(0) @binding(1) var<storage, read_write> form: array<u32>;
@group(0) @binding(2) var<storage, read> x: array<{{X}}>;
@group(0) @binding(3) var<storage, read> codes: array<{{WORD}}>;
@group(0) @binding(4) var<storage, read> scales: array<u32>;
@group(0) @binding(5) var<storage, read> extra: array<f32>;   // global scales [matrices], then biases [matrices, rows]
{{SECOND}}

const TOKENS: u32 = {{TOKENS}}u;
const ROWS: u32 = {{ROWS}}u;
var<workgroup> finals: array<f32, {{FINALS}}>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let chunks = args.chunks;
  let lanes = args.lanes;
  let lane = local % lanes;
  let team = group.x * (256u / lanes) + local / lanes;
  let local_matrix = group.y;
  let matrix = args.first_matrix + local_matrix;
  let first = group.z * TOKENS;
  let count = min(TOKENS, args.num_tokens - first);
  // A row of x too many repeats the first.
  var x_rows = array<u32, TOKENS>();
  for (var t = 0u; t < TOKENS; t++) {
    x_rows[t] = (first + select(0u, t, t < count)) * args.x_token_step + matrix * args.x_part_step;
  }
{{START}}
  for (var chunk = lane; chunk < chunks; chunk += lanes) {
{{BODY}}
  }
{{FINISH}}
  let group_rows = 256u / lanes * ROWS;
  let first_row = group.x * group_rows;
  let here = local / lanes * ROWS;
{{KEEP}}
  if ((args.forms & 4u) != 0u) {
    workgroupBarrier();
    let column = args.first_row + first_row + matrix * args.out_matrix_step;
    for (var t = 0u; t < count; t++) {
      put_integers(first + t, column, min(group_rows, args.rows - first_row), finals[256u * t + local], local);
    }
  }
}
