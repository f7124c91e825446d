// What latent attention does between its products: the norm of a token's latent and the rotation of its key, both into the cache, and the
// rotation of its queries. The same operations as rms_norm.wgsl, rope.wgsl and kv_store.wgsl: same bits.

// The row of the cache.
const MAX_WIDTH: u32 = 1024u;
var<workgroup> values: array<f32, MAX_WIDTH>;

// Workgroup 0 of a token has latent and key, the others have 256 pairs of the queries each.
fn store_latent(group: u32, token: u32, local: u32) {
  let angles = args.table_offset + token * args.table_stride;
  if (group > 0u) {
    let id = (group - 1u) * 256u + local;
    if (id >= args.num_heads * args.half) { return; }
    let i = id % args.half;
    let start = args.q_offset + token * args.q_stride + (id / args.half) * args.head_stride;
    let first = start + select(i, 2u * i, (args.flags & 1u) != 0u);
    let second = start + select(i + args.half, 2u * i + 1u, (args.flags & 1u) != 0u);
    let cosine = table[angles + i];
    let sine = table[angles + args.half + i];
    let a = q[first];
    let b = q[second];
    q[first] = fma(a, cosine, -(b * sine));
    q[second] = fma(b, cosine, a * sine);
    return;
  }
  let row = args.latent_offset + token * args.latent_stride;
  var sum = 0.0;
  for (var c = local; c < args.latent_cols; c += 256u) {
    let value = latent[row + c];
    sum = fma(value, value, sum);
  }
  let scale = 1.0 / sqrt(workgroup_sum(sum, local) / f32(args.latent_cols) + args.eps);
  for (var c = local; c < args.latent_cols; c += 256u) {
    let value = latent[row + c] * scale * weight[args.weight_offset + c];
    values[c] = value;
    latent[row + c] = value;
  }
  let start = args.key_offset + token * args.key_stride;
  for (var i = local; i < args.half; i += 256u) {
    let first = select(i, 2u * i, (args.flags & 1u) != 0u);
    let second = select(i + args.half, 2u * i + 1u, (args.flags & 1u) != 0u);
    let cosine = table[angles + i];
    let sine = table[angles + args.half + i];
    let a = key[start + first];
    let b = key[start + second];
    values[args.latent_cols + first] = fma(a, cosine, -(b * sine));
    values[args.latent_cols + second] = fma(b, cosine, a * sine);
    key[start + first] = values[args.latent_cols + first];
    key[start + second] = values[args.latent_cols + second];
  }
  let width = args.latent_cols + 2u * args.half;
  workgroupBarrier();
  for (var i = local; i < args.row_words; i += 256u) {
    let at = slots[args.slots_offset + token] * args.row_words + i;
    if ((args.flags & 2u) != 0u) {
      var high = 0u;
      if (2u * i + 1u < width) { high = bf16_bits(values[2u * i + 1u]); }
      cache[at] = bf16_bits(values[2u * i]) | (high << 16u);
    } else {
      cache[at] = bitcast<u32>(values[i]);
    }
  }
}
