// Numbers out of codes. HALF_SUBNORMALS: whether this adapter keeps binary16 subnormals (the self-test says); without them small codes
// are made with integers.
const HALF_SUBNORMALS: bool = {{HALF_SUBNORMALS}};
// Quads are a power of two away from their numbers; whoever scales them multiplies the scale instead.
const E4M3_FACTOR: f32 = {{E4M3_FACTOR}};
const E2M1_FACTOR: f32 = {{E2M1_FACTOR}};

// E4M3 in the low byte.
fn e4m3(code: u32) -> f32 {
  if (HALF_SUBNORMALS) { return unpack2x16float(((code & 0x80u) << 8u) | ((code & 0x7fu) << 7u)).x * 256.0; }
  let exponent = (code >> 3u) & 15u;
  let normal = bitcast<f32>((((code & 0x7fu) << 20u) + (120u << 23u)));
  let value = select(normal, f32(code & 7u) * 0.001953125, exponent == 0u);
  return select(value, -value, (code & 0x80u) != 0u);
}

// Four E4M3 codes of a word, divided by E4M3_FACTOR.
fn e4m3_quad(word: u32) -> vec4<f32> {
  if (HALF_SUBNORMALS) {
    let even = ((word & 0x00800080u) << 8u) | ((word & 0x007f007fu) << 7u);
    let odd = (word & 0x80008000u) | ((word & 0x7f007f00u) >> 1u);
    let a = unpack2x16float(even);
    let b = unpack2x16float(odd);
    return vec4<f32>(a.x, b.x, a.y, b.y);
  }
  return vec4<f32>(e4m3(word), e4m3(word >> 8u), e4m3(word >> 16u), e4m3(word >> 24u));
}

// Four E2M1 codes of the low half of a word, divided by E2M1_FACTOR.
fn e2m1_quad(codes: u32) -> vec4<f32> {
  if (HALF_SUBNORMALS) {
    // Codes 0 and 1, then 2 and 3, as binary16 times 2^-14.
    let low = (codes & 0xffu) | ((codes & 0xff00u) << 8u);
    let even = ((low << 12u) & 0x80008000u) | ((low << 9u) & 0x0e000e00u);
    let odd = ((low << 8u) & 0x80008000u) | ((low << 5u) & 0x0e000e00u);
    let a = unpack2x16float(even);
    let b = unpack2x16float(odd);
    return vec4<f32>(a.x, b.x, a.y, b.y);
  }
  // Twice the magnitude is a nibble of the table.
  let c = vec4<u32>(codes, codes >> 4u, codes >> 8u, codes >> 12u);
  let doubled = (vec4<u32>(0xc8643210u) >> ((c & vec4<u32>(7u)) * 4u)) & vec4<u32>(15u);
  let value = vec4<f32>(doubled) * 0.5;
  return select(value, -value, (c & vec4<u32>(8u)) != vec4<u32>(0u));
}

// E8M0: a power of two; 2^-127 may be flushed to zero, as adapters may.
fn e8m0(code: u32) -> f32 { return bitcast<f32>(select(code << 23u, 0x00400000u, code == 0u)); }
