// What an adapter does where WGSL leaves it a choice. out: [binary16 subnormal through unpack2x16float as bits, f32 subnormal product as
// bits, f32 subnormal stored and loaded, fma of values that differ only in the last bit if rounded once].
@group(0) @binding(0) var<storage, read_write> out: array<u32>;

@compute @workgroup_size(1)
fn main() {
  out[0] = bitcast<u32>(unpack2x16float(out[4]).x);
  out[1] = bitcast<u32>(bitcast<f32>(out[5]) * bitcast<f32>(out[6]));
  out[2] = bitcast<u32>(bitcast<f32>(out[7]) + 0.0);
  out[3] = bitcast<u32>(fma(bitcast<f32>(out[8]), bitcast<f32>(out[9]), bitcast<f32>(out[10])));
}
