// Reads memory and does nothing with it: what the adapter can do at best. Eight loads of 16 bytes in flight an invocation.
struct Args { len: u32, step: u32 }
var<immediate> args: Args;
@group(0) @binding(0) var<storage, read_write> out: array<u32>;
@group(0) @binding(1) var<storage, read> memory: array<vec4<u32>>;

@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
  var x = vec4<u32>();
  for (var at = id.x; at + 7u * args.step < args.len; at += 8u * args.step) {
    let a = memory[at];
    let b = memory[at + args.step];
    let c = memory[at + 2u * args.step];
    let d = memory[at + 3u * args.step];
    let e = memory[at + 4u * args.step];
    let f = memory[at + 5u * args.step];
    let g = memory[at + 6u * args.step];
    let h = memory[at + 7u * args.step];
    x ^= a ^ b ^ c ^ d ^ e ^ f ^ g ^ h;
  }
  // Practically never, but the compiler cannot know.
  if (x.x == 0x9e3779b9u && x.y == 0x7f4a7c15u) { out[0] = x.z; }
}
