// What kernels that read paged caches share: binding 0 the cache, 1 positions, 2 sequences, 3 the block table.
@group(0) @binding(0) var<storage, read_write> cache: array<u32>;
@group(0) @binding(1) var<storage, read_write> positions: array<u32>;
@group(0) @binding(2) var<storage, read_write> sequences: array<u32>;
@group(0) @binding(3) var<storage, read_write> block_table: array<u32>;

fn slot_of(position: u32, token: u32) -> u32 {
  let sequence = sequences[args.sequences_offset + token];
  let block = block_table[args.table_offset + sequence * args.table_stride + position / args.block_size];
  return block * args.block_size + position % args.block_size;
}

// Element `column` of a row. Rows of bfloat16 have two to a word.
fn cached(slot: u32, column: u32) -> f32 {
  if (args.cache_bf16 != 0u) {
    let word = cache[slot * args.row_words + (column >> 1u)];
    return bitcast<f32>(select(word << 16u, word & 0xffff0000u, (column & 1u) != 0u));
  }
  return bitcast<f32>(cache[slot * args.row_words + column]);
}
