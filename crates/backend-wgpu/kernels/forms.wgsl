// Where a result goes. args.forms: 1: as a row of `out`, 2: as floats in the form of spread.wgsl, 4: as integers in that of digits.wgsl.
fn put(row: u32, column: u32, value: f32) {
  if ((args.forms & 1u) != 0u) { out[args.out_offset + row * args.out_stride + column] = value; }
  if ((args.forms & 2u) != 0u) {
    let c = column % args.part_stride;
    if (c < args.part_cols) {
      let first = 8u * args.part_chunks * (row * args.part_count + column / args.part_stride);
      floats[4u * (first + (c % 32u) / 4u * args.part_chunks + c / 32u) + c % 4u] = bitcast<u32>(value);
    }
  }
}

// The integers of 256 columns, from a multiple of 32 on: invocation `local` has column `first + local`, if there are so many.
fn put_integers(row: u32, first: u32, count: u32, value: f32, local: u32) {
  if ((args.forms & 4u) == 0u) { return; }
  let column = first + local - local % 32u;
  let c = column % args.part_stride;
  let is_written = local - local % 32u < count && c < args.part_cols;
  let start = 7u * args.part_chunks * (row * args.part_count + column / args.part_stride);
  let word = digits(value, args.per_byte, local);
  if (is_written && local % 32u < 26u) { form[digit_place(start, c / 32u, args.part_chunks, local % 32u)] = word; }
}

