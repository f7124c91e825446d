// One of the two weights of beside.wgsl, or that of latent_heads.wgsl: chunks, sums and results as in product.wgsl: same bits.
fn put(row: u32, column: u32, value: f32) {
  if ((args.forms & 1u) != 0u) { out[args.out_offset + {{OUT_ROW}}column] = value; }
  if ((args.forms & 2u) != 0u) {
    let c = column % args.part_stride;
    if (c < args.part_cols) {
      let first = 8u * args.part_chunks * ({{PART_ROW}}column / args.part_stride);
      form[4u * (first + (c % 32u) / 4u * args.part_chunks + c / 32u) + c % 4u] = bitcast<u32>(value);
    }
  }
}

fn put_integers(row: u32, first: u32, count: u32, value: f32, local: u32) {
  let lane = local % 32u;
  let column = first + local - lane;
  let c = column % args.part_stride;
  let word = digits(value, args.per_byte, local);
  if (local - lane < count && c < args.part_cols && lane < 26u) {
    let start = 7u * args.part_chunks * ({{PART_ROW}}column / args.part_stride);
    form[digit_place(start, c / 32u, args.part_chunks, lane)] = word;
  }
}

fn finished(sum: f32, row: u32, matrix: u32) -> f32 {
  var global = 1.0;
  if ((args.has & 2u) != 0u) { global = extra[matrix]; }
  var bias = 0.0;
  if ((args.has & 1u) != 0u) { bias = extra[args.bias_offset + matrix * args.rows + row]; }
  return fma(sum, global, bias);
}

// `count` rows of x and of out from `first` on.
fn side(matrix: u32, group: u32, first: u32, count: u32, local: u32) {
  let chunks = args.chunks;
  let lanes = args.lanes;
  let lane = local % lanes;
  let team = group * (256u / lanes) + local / lanes;
  let local_matrix = matrix;
{{X_ROWS}}
{{START}}
  for (var chunk = lane; chunk < chunks; chunk += lanes) {
{{BODY}}
  }
{{FINISH}}
  let group_rows = 256u / lanes * ROWS;
  let first_row = group * group_rows;
  let here = local / lanes * ROWS;
{{KEEP}}
  if ((args.forms & 4u) != 0u) {
    workgroupBarrier();
    let column = matrix * args.rows + first_row;
    for (var t = 0u; t < count; t++) {
      put_integers(first + t, column, min(group_rows, args.rows - first_row), finals[256u * t + local], local);
    }
  }
}
