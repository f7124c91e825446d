var<workgroup> finals: array<f32, 256>;

// Writes the sums of a team's rows for one token; the lanes share them.
fn store(sums: {{VECTOR}}, token: u32, out_row: u32, group: u32, local: u32, lane: u32, count: u32, matrix: u32) {
  if (token >= count) { return; }
  let group_rows = 256u / args.lanes * ROWS;
  let here = local / args.lanes * ROWS;
  let column = args.first_row + group * group_rows + matrix * args.out_matrix_step;
  for (var r = lane; r < ROWS; r += args.lanes) {
    let row = group * group_rows + here + r;
    if (row < args.rows) {
      var value = finished(sums[r], row, matrix);
      if ((args.has & 16u) != 0u) { value = out[args.out_offset + out_row * args.out_stride + column + here + r] + value; }
      put(out_row, column + here + r, value);
      if ((args.forms & 4u) != 0u) { finals[here + r] = value; }
    }
  }
  if ((args.forms & 4u) != 0u) {
    workgroupBarrier();
    put_integers(out_row, column, min(group_rows, args.rows - group * group_rows), finals[local], local);
  }
}
