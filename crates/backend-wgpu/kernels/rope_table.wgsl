// table[t] = [cos | sin](position * inverse_frequency) * scale.
//
// Angles reach a million radians, and WGSL promises nothing about sin beyond [-pi, pi]. So the f32 angle is reduced exactly: its 24-bit
// mantissa times 1 / (2 pi), of which the 96 bits that matter for its exponent are taken (Payne and Hanek, 1983), in integers.
struct Args { positions_offset: u32, inverse_offset: u32, table_offset: u32, table_stride: u32, half: u32, scale: f32 }
var<immediate> args: Args;
@group(0) @binding(0) var<storage, read_write> positions: array<u32>;
@group(0) @binding(1) var<storage, read_write> inverse_frequencies: array<f32>;
@group(0) @binding(2) var<storage, read_write> table: array<f32>;

// Bits 32 i + 1 .. 32 i + 32 behind the binary point of 1 / (2 pi).
const TURN: array<u32, 7> =
  array<u32, 7>(0x28be60dbu, 0x9391054au, 0x7f09d5f4u, 0x7d4d3770u, 0x36d8a566u, 0x4f10e410u, 0x7f9458eau);

fn turn_word(i: i32) -> u32 {
  if (i < 0 || i > 6) { return 0u; }
  var words = TURN;
  return words[i];
}

// 32 bits of 1 / (2 pi) behind bit `first` (0: the first behind the point).
fn turn_bits(first: i32) -> u32 {
  let word = first >> 5u;
  let shift = u32(first & 31);
  let high = turn_word(word) << shift;
  if (shift == 0u) { return high; }
  return high | (turn_word(word + 1) >> (32u - shift));
}

// Upper 32 bits of a * b, by 16-bit limbs.
fn multiply_high(a: u32, b: u32) -> u32 {
  let a0 = a & 0xffffu;
  let a1 = a >> 16u;
  let b0 = b & 0xffffu;
  let b1 = b >> 16u;
  let p00 = a0 * b0;
  let p01 = a0 * b1;
  let p10 = a1 * b0;
  let middle = (p00 >> 16u) + (p01 & 0xffffu) + (p10 & 0xffffu);
  return a1 * b1 + (p01 >> 16u) + (p10 >> 16u) + (middle >> 16u);
}

// The angle's fraction of a turn, times 2^32.
fn turns(angle: f32) -> u32 {
  let bits = bitcast<u32>(angle);
  let biased = i32((bits >> 23u) & 255u);
  if (biased == 0) { return 0u; }
  let mantissa = (bits & 0x7fffffu) | 0x800000u;
  // angle = mantissa * 2^exponent; whole turns of the product are dropped by wrapping.
  let exponent = biased - 150;
  return mantissa * turn_bits(exponent) + multiply_high(mantissa, turn_bits(exponent + 32));
}

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let position = f32(positions[args.positions_offset + group.x]);
  for (var i = local; i < args.half; i += 64u) {
    let t = turns(position * inverse_frequencies[args.inverse_offset + i]);
    let quadrant = (t + 0x20000000u) >> 30u;
    let x = f32(bitcast<i32>(t - (quadrant << 30u))) * 1.4629180792671596e-9; // 2 pi / 2^32; |x| <= pi / 4
    let x2 = x * x;
    // Taylor to x^9 and x^10: the next terms are below 2e-9 at pi / 4.
    let s = x * fma(x2, fma(x2, fma(x2, fma(x2, 2.7557319e-6, -1.984127e-4), 8.333333e-3), -0.16666667), 1.0);
    let c = fma(x2, fma(x2, fma(x2, fma(x2, fma(x2, -2.755732e-7, 2.4801587e-5), -1.3888889e-3), 4.1666668e-2), -0.5), 1.0);
    let swap = (quadrant & 1u) != 0u;
    let cosine = select(c, s, swap);
    let sine = select(s, c, swap);
    let at = args.table_offset + group.x * args.table_stride + i;
    table[at] = select(cosine, -cosine, quadrant == 1u || quadrant == 2u) * args.scale;
    table[at + args.half] = select(sine, -sine, quadrant >= 2u) * args.scale;
  }
}
