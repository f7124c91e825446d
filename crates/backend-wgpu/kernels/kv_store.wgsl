// Appends rows to a cache: parts side by side, as f32 or bfloat16 (two to a word, rows padded to whole words).
struct Args {
  offset0: u32, stride0: u32, end0: u32, offset1: u32, stride1: u32, end1: u32, offset2: u32, stride2: u32, end2: u32,
  offset3: u32, stride3: u32, slots_offset: u32, width: u32, row_words: u32, is_bf16: u32,
}
var<immediate> args: Args;
@group(0) @binding(0) var<storage, read_write> part0: array<f32>;
@group(0) @binding(1) var<storage, read_write> part1: array<f32>;
@group(0) @binding(2) var<storage, read_write> part2: array<f32>;
@group(0) @binding(3) var<storage, read_write> part3: array<f32>;
@group(0) @binding(4) var<storage, read_write> slots: array<u32>;
@group(0) @binding(5) var<storage, read_write> cache: array<u32>;

// `end*` are the columns where parts end; those of parts that are not there equal the width.
fn value(token: u32, column: u32) -> f32 {
  if (column >= args.width) { return 0.0; }
  if (column < args.end0) { return part0[args.offset0 + token * args.stride0 + column]; }
  if (column < args.end1) { return part1[args.offset1 + token * args.stride1 + column - args.end0]; }
  if (column < args.end2) { return part2[args.offset2 + token * args.stride2 + column - args.end1]; }
  return part3[args.offset3 + token * args.stride3 + column - args.end2];
}

@compute @workgroup_size(128)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
  if (id.x >= args.row_words) { return; }
  let at = slots[args.slots_offset + id.y] * args.row_words + id.x;
  if (args.is_bf16 != 0u) {
    cache[at] = bf16_bits(value(id.y, 2u * id.x)) | (bf16_bits(value(id.y, 2u * id.x + 1u)) << 16u);
  } else {
    cache[at] = bitcast<u32>(value(id.y, id.x));
  }
}
