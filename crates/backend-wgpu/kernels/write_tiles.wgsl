// Rows of x as digits in f16, in the tiles that tiles.wgsl multiplies: the integers of digits.wgsl, cut into {{DIGITS}} digits.
// A block has 16 rows and a chunk: for each digit and half of the chunk, 16 rows of 16 columns; then {scale, sum} of rows 0 and 8, 1 and 9, ...
// Two columns of a word are those whose codes are a word of the weights after its shift. Blocks of a row of tiles are side by side; a tile
// of 32 rows is two rows of blocks. Rows that nobody has stay what they were.
struct Args {
  x_offset: u32, x_stride: u32, part_stride: u32, num_tiles: u32, num_tokens: u32, cols: u32, chunks: u32, halves: u32,
  is_list: u32, slots_in_x: u32, top_k: u32, sorted_offset: u32,
}
var<immediate> args: Args;
@group(0) @binding(0) var<storage, read_write> form: array<u32>;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> list: array<u32>;

const DIGITS: u32 = {{DIGITS}}u;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let row = group.z % 32u;
  let part = group.z / 32u;
  var token = 32u * group.y + row;
  var tile = part * args.num_tiles + group.y;
  var from_part = part;
  if (args.is_list != 0u) {
    if (group.y >= list[0] || row >= list[6u + 4u * group.y]) { return; }
    let choice = list[args.sorted_offset + list[5u + 4u * group.y] + row];
    token = choice / args.top_k;
    from_part = select(0u, choice % args.top_k, args.slots_in_x != 0u);
    tile = group.y;
  } else if (token >= args.num_tokens) { return; }
  let column = 256u * group.x + local;
  var value = 0.0;
  if (column < args.cols) { value = x[args.x_offset + token * args.x_stride + from_part * args.part_stride + column]; }
  let found = integer_of(value, local);
  integers[local] = found.integer;
  workgroupBarrier();
  let chunk = column / 32u;
  if (chunk >= args.chunks) { return; }
  let lane = local % 32u;
  let block = ((2u * tile + row / 16u) * args.chunks + chunk) * (256u * DIGITS + 32u);
  for (var word = lane; word < 16u * DIGITS; word += 32u) {
    let digit = word / 16u;
    let pair = word % 16u;
    let first = local - lane + pair / args.halves * 2u * args.halves + pair % args.halves;
    let both = vec2<f32>(digit_of(integers[first], digit), digit_of(integers[first + args.halves], digit));
    form[block + 256u * digit + 128u * (pair / 8u) + 8u * (row % 16u) + pair % 8u] = pack2x16float(both);
  }
  let place = block + 256u * DIGITS + 4u * (row % 8u) + 2u * (row % 16u / 8u);
  if (lane == 0u) { form[place] = bitcast<u32>(found.scale); }
  if (lane == 1u) { form[place + 1u] = bitcast<u32>(found.sum); }
}

// The highest digit first: 11 bits each where there are two, 8 where there are three.
fn digit_of(integer: i32, digit: u32) -> f32 {
  if (DIGITS == 2u) {
    let high = (integer + 1024) >> 11u;
    return f32(select(integer - (high << 11u), high, digit == 0u));
  }
  let middle = (integer + 128) >> 8u;
  let high = (middle + 128) >> 8u;
  return f32(select(select(integer - (middle << 8u), middle - (high << 8u), digit == 1u), high, digit == 0u));
}
