// A tile of tiles.wgsl, for the self-test of cooperative matrices. `x` and `out` are the same memory: results (256 numbers, 16 rows of weights of
// each row of x), 16 rows of codes as f16, then a block as write_tiles.wgsl writes it.
@group(0) @binding(0) var<storage, read_write> out: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read_write> x: array<vec4<f16>>;
const DIGITS: u32 = {{DIGITS}}u;
const ROW: u32 = 10u;
var<workgroup> a: array<vec4<f16>, 16u * ROW>;
var<workgroup> d: array<vec4<f32>, 64>;

@compute @workgroup_size(32)
fn main(@builtin(local_invocation_index) local: u32) {
  for (var place = local; place < 128u; place += 32u) { a[place / 8u * ROW + place % 8u] = x[128u + place]; }
  workgroupBarrier();
  multiply(0u, 256u, 0u, local);
  workgroupBarrier();
  for (var place = local; place < 64u; place += 32u) { out[place] = d[place]; }
}
{{MULTIPLY}}
