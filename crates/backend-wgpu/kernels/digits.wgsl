// Activations as integers, for products with integer codes: a chunk (32 columns) is x = scale * (65536 d0 + 256 d1 + d2), digits of eight
// bits with a sign, scale a power of two such that the chunk's largest number keeps 22 bits. Eight words a digit; word m has the columns
// whose codes are word m of the weights after its shift: with `per_byte` codes a byte, column (m / p) 4 p + j p + m % p in byte j.
// A chunk is seven vec4, which lie as in spread.wgsl: digits 0, 0, 1, 1, 2, 2, then {scale, sum of x}.
var<workgroup> integers: array<i32, 256>;
var<workgroup> largest_of: array<u32, 256>;

{{LANES}}

struct Integer { integer: i32, scale: f32, sum: f32 }

// The integer of the column that invocation `local` has, scale and sum of its chunk.
fn integer_of(value: f32, local: u32) -> Integer {
  let largest = largest_of_lanes(bitcast<u32>(value) & 0x7fffffffu, local);
  // Not a number, or infinite: so is the scale. Very small: the scale stays a normal number.
  let exponent = max(largest >> 23u, 32u);
  let scale = select(bitcast<f32>((exponent - 21u) << 23u), bitcast<f32>(largest), exponent == 255u);
  var integer = 0;
  if (exponent != 255u) { integer = i32(round(value * bitcast<f32>((275u - exponent) << 23u))); }
  return Integer(integer, scale, f32(sum_of_lanes(integer, local)) * scale);
}

// 256 columns, of which invocation `local` has one: the word of its chunk that lane `local % 32` writes, if it is below 26. Every invocation
// of the workgroup takes part.
fn digits(value: f32, per_byte: u32, local: u32) -> u32 {
  let lane = local % 32u;
  let found = integer_of(value, local);
  integers[local] = found.integer;
  workgroupBarrier();
  var word = 0u;
  if (lane < 24u) {
    let m = lane % 8u;
    let column = local - lane + (m / per_byte) * 4u * per_byte + m % per_byte;
    for (var j = 0u; j < 4u; j++) {
      let low = integers[column + j * per_byte];
      let middle = (low + 128) >> 8u;
      let high = (middle + 128) >> 8u;
      let digit = select(select(low, middle, lane < 16u), high, lane < 8u);
      word |= (u32(digit) & 0xffu) << (8u * j);
    }
  } else {
    word = bitcast<u32>(select(found.sum, found.scale, lane == 24u));
  }
  workgroupBarrier();
  return word;
}

// Where that word stands: `first` is the vec4 where the row's part starts. Words of digit d: vec4 2 d and 2 d + 1; scale and sum: x and y
// of vec4 6.
fn digit_place(first: u32, chunk: u32, chunks: u32, lane: u32) -> u32 {
  return 4u * (first + (lane / 4u) * chunks + chunk) + lane % 4u;
}
