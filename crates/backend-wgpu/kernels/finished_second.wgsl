// The same of a pair's second weight.
fn finished_second(sum: f32, row: u32, matrix: u32) -> f32 {
  var global = 1.0;
  if ((args.has & 8u) != 0u) { global = extra2[matrix]; }
  var bias = 0.0;
  if ((args.has & 4u) != 0u) { bias = extra2[args.bias_offset2 + matrix * args.matrix_rows + args.first_row + row]; }
  return fma(sum, global, bias);
}

