// The form in which products read activations: 32 columns (a chunk) are eight quads, and quad q of all chunks of a row lie side by side,
// so that neighbouring invocations, which have neighbouring chunks, read neighbouring 16 bytes. Rows may be cut into parts (heads, the
// slots of a token's experts); columns beyond a part's end are zeros.
struct Args { x_offset: u32, x_stride: u32, part_stride: u32, num_parts: u32, cols: u32, chunks: u32 }
var<immediate> args: Args;
@group(0) @binding(0) var<storage, read_write> x: array<f32>;
@group(0) @binding(1) var<storage, read_write> spread: array<vec4<f32>>;

@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
  // One invocation a quad, in the order of x.
  if (id.x >= 8u * args.chunks) { return; }
  let start = args.x_offset + id.z * args.x_stride + id.y * args.part_stride;
  var quad = vec4<f32>();
  for (var i = 0u; i < 4u; i++) {
    if (4u * id.x + i < args.cols) { quad[i] = x[start + 4u * id.x + i]; }
  }
  let row = (id.z * args.num_parts + id.y) * 8u * args.chunks;
  spread[row + (id.x % 8u) * args.chunks + id.x / 8u] = quad;
}
