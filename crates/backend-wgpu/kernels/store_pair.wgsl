var<workgroup> finals: array<f32, 256>;

fn finished_second(sum: f32, row: u32, matrix: u32) -> f32 {
  var global = 1.0;
  if ((args.has & 8u) != 0u) { global = extra2[matrix]; }
  var bias = 0.0;
  if ((args.has & 4u) != 0u) { bias = extra2[args.bias_offset2 + matrix * args.matrix_rows + args.first_row + row]; }
  return fma(sum, global, bias);
}

// Writes the activations of a team's rows for one token.
fn store(gates: {{VECTOR}}, ups: {{VECTOR}}, token: u32, out_row: u32, group: u32, local: u32, lane: u32, count: u32, matrix: u32) {
  if (token >= count) { return; }
  let group_rows = 256u / args.lanes * ROWS;
  let here = local / args.lanes * ROWS;
  let column = args.first_row + group * group_rows;
  for (var r = lane; r < ROWS; r += args.lanes) {
    let row = group * group_rows + here + r;
    if (row < args.rows) {
      let value = activated(finished(gates[r], row, matrix), finished_second(ups[r], row, matrix));
      put(out_row, column + here + r, value);
      if ((args.forms & 4u) != 0u) { finals[here + r] = value; }
    }
  }
  if ((args.forms & 4u) != 0u) {
    workgroupBarrier();
    put_integers(out_row, column, min(group_rows, args.rows - group * group_rows), finals[local], local);
  }
}
