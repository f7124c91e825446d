// store_latent.wgsl, a kernel of its own.
struct Args {
  latent_offset: u32, latent_stride: u32, latent_cols: u32, weight_offset: u32, eps: f32,
  key_offset: u32, key_stride: u32, q_offset: u32, q_stride: u32, num_heads: u32, head_stride: u32,
  table_offset: u32, table_stride: u32, half: u32, slots_offset: u32, row_words: u32,
  flags: u32,   // bits: pairs of columns are neighbours, the cache is bfloat16
}
var<immediate> args: Args;
@group(0) @binding(0) var<storage, read_write> latent: array<f32>;
@group(0) @binding(1) var<storage, read_write> key: array<f32>;
@group(0) @binding(2) var<storage, read_write> q: array<f32>;
@group(0) @binding(3) var<storage, read_write> cache: array<u32>;
@group(0) @binding(4) var<storage, read> table: array<f32>;
@group(0) @binding(5) var<storage, read> slots: array<u32>;
@group(0) @binding(6) var<storage, read> weight: array<f32>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  store_latent(group.x, group.y, local);
}
