// out = x W^T, or out = f(x G^T, x U^T), for many rows of x: tiles of 16 rows of weights by 16 rows of x, multiplied by cooperative matrices.
//
// The bits are those of product.wgsl. There, 32 columns of a row of x and a row of weights meet in integers, whose sum is scaled and added to
// what a lane of a team has; sums of lanes are added in pairs, then pairs of pairs. Here, digits of x (write_tiles.wgsl) and codes of weights
// are f16 numbers, whose products and sums f32 holds exactly. One subgroup goes through the lanes that a team would have, one after the
// other, and keeps one sum of each size that still waits for its neighbour.
//
// A workgroup has 64 rows of weights (of a pair: 32 of each) and 32 rows of x. {{STAGE}} chunks of its weights at a time become f16 in
// workgroup memory.
struct Args {
{{SHARD_ARGS}}
  is_list: u32,          // items of a work list instead of rows 32 group.y + ..
  top_k: u32, sorted_offset: u32,
}
var<immediate> args: Args;
@group(0) @binding(0) var<storage, read_write> out: array<f32>;
@group(0) @binding(1) var<storage, read> x: array<vec4<f16>>;
@group(0) @binding(2) var<storage, read> x_scales: array<vec4<f32>>;   // the same memory
@group(0) @binding(3) var<storage, read> list: array<u32>;
@group(0) @binding(4) var<storage, read> codes: array<{{WORD}}>;
@group(0) @binding(5) var<storage, read> scales: array<u32>;
@group(0) @binding(6) var<storage, read> extra: array<f32>;   // global scales [matrices], then biases [matrices, rows]
{{SECOND}}
const PAIR: bool = {{PAIR}};
const STAGE: u32 = {{STAGE}}u;
const DIGITS: u32 = {{DIGITS}}u;
const BLOCK: u32 = 64u * DIGITS + 8u;   // elements of 16 bytes of 16 rows of x and a chunk
const ROW: u32 = 10u;                   // of 8 bytes of a row of weights and a chunk: 8, and two against conflicts of banks

var<workgroup> a: array<vec4<f16>, 64u * STAGE * ROW>;
var<workgroup> scales_here: array<vec2<f32>, 128u * STAGE>;   // scale and offset of each row, of this stage and of the next
var<workgroup> d: array<vec4<f32>, 8u * STAGE * 64u>;   // of each subgroup, tiles of 16 rows of x by 16 rows of weights

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  var matrix = args.first_matrix + group.z;
  var first = 32u * group.y;
  var count = min(32u, args.num_tokens - first);
  var tile = group.y;
  if (args.is_list != 0u) {
{{LIST_ITEM}}
  } else {
    tile += matrix * ((args.num_tokens + 31u) / 32u);
  }
  if (matrix < args.first_matrix || matrix >= args.first_matrix + args.num_matrices) { return; }
  let local_matrix = matrix - args.first_matrix;
  let warp = local / 32u;
  let lane = local % 32u;
  let row_tile = warp % 4u;
  let x_tile = (2u * tile + warp / 4u) * args.chunks * BLOCK;
  // A half tile without rows of x still takes part in barriers.
  let is_idle = 16u * (warp / 4u) >= count;

  // The row of weights that this invocation unpacks, in which chunk of a stage.
  let slot = local / 64u;
  let a_row = local % 64u;
  let row_in_weight = select(64u * group.x + a_row, 32u * group.x + a_row % 32u, PAIR);
  let row0 = local_matrix * args.rows + min(row_in_weight, args.rows - 1u);
  let is_second = PAIR && a_row >= 32u;

  // A team's lane `l` has chunks l, l + lanes, ..: step l * rounds + r is chunk l + lanes * r. Whoever unpacks is a stage ahead.
  let rounds = (args.chunks + args.lanes - 1u) / args.lanes;
  let steps = args.lanes * rounds;
  var l = 0u;
  var r = 0u;
  var next_l = slot / rounds;
  var next_r = slot % rounds;
  // Two rows of x, four rows of weights each: sums of the lane that is at work, and of 1, 2, 4, 8, 16 lanes that wait.
  var sums = array<vec4<f32>, 2>();
  var totals = array<vec4<f32>, 2>();
{{WAITING}}
  {
    let chunk = min(next_l + args.lanes * next_r, args.chunks - 1u);
{{LOAD}}
  }
  var flip = 0u;
  for (var start = 0u; start < steps; start += STAGE) {
    if (slot < STAGE) {
      let at = (slot * 64u + a_row) * ROW;
{{UNPACK}}
      scales_here[flip + slot * 64u + a_row] = vec2<f32>(row_scale, row_offset);
    }
    workgroupBarrier();
    if (slot < STAGE && start + STAGE < steps) {
      next_r += STAGE;
      for (; next_r >= rounds; next_r -= rounds) { next_l++; }
      let chunk = min(next_l + args.lanes * next_r, args.chunks - 1u);
{{LOAD}}
    }
    let l_before = l;
    let r_before = r;
    for (var s = 0u; s < STAGE; s++) {
      let chunk = l + args.lanes * r;
      if (!is_idle && l < args.lanes && chunk < args.chunks) {
        multiply((s * 64u + 16u * row_tile) * ROW, 2u * (x_tile + chunk * BLOCK), (warp * STAGE + s) * 64u, lane);
      }
      r++;
      if (r == rounds) {
        r = 0u;
        l++;
      }
    }
    workgroupBarrier();
    l = l_before;
    r = r_before;
    for (var s = 0u; s < STAGE; s++) {
      let chunk = l + args.lanes * r;
      if (!is_idle && l < args.lanes && chunk < args.chunks) {
        let row = flip + 64u * s + 16u * row_tile + 4u * (lane % 4u);
        let of_rows = array<vec2<f32>, 4>(scales_here[row], scales_here[row + 1u], scales_here[row + 2u], scales_here[row + 3u]);
        let scale4 = vec4<f32>(of_rows[0].x, of_rows[1].x, of_rows[2].x, of_rows[3].x);
        let offset4 = vec4<f32>(of_rows[0].y, of_rows[1].y, of_rows[2].y, of_rows[3].y);
        // Scale and sum of rows lane / 4 and lane / 4 + 8 of x.
        let of_x = x_scales[x_tile + chunk * BLOCK + 64u * DIGITS + lane / 4u];
        let place = (warp * STAGE + s) * 64u + lane;
        sums[0] = fma(offset4, vec4<f32>(of_x.y), fma(scale4, d[place] * of_x.x, sums[0]));
        sums[1] = fma(offset4, vec4<f32>(of_x.w), fma(scale4, d[place + 32u] * of_x.z, sums[1]));
      }
      r++;
      if (r == rounds) {
        // A lane of the team is complete: it meets its neighbours, and every 32 lanes are added to those before.
        let done = l % 32u + 1u;
{{MEET}}
        if (done == min(args.lanes, 32u)) {
          if (l < 32u) {
            totals = sums;
          } else if (l < args.lanes) {
            totals[0] = totals[0] + sums[0];
            totals[1] = totals[1] + sums[1];
          }
        }
        sums = array<vec4<f32>, 2>();
        r = 0u;
        l++;
      }
    }
    flip = 64u * STAGE - flip;
  }
{{STORE}}
}

// Two words of codes, each two numbers of up to eight bits in 16: 1024 and a code is 0x6400 and its bits.
fn halves(first: u32, second: u32) -> vec4<f16> {
  let both = vec4<f16>(vec2<f16>(unpack2x16float(first | 0x64006400u)), vec2<f16>(unpack2x16float(second | 0x64006400u)));
  return both - vec4<f16>({{ZERO}}h);
}

{{MULTIPLY}}
