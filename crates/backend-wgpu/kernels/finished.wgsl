// A row's sum with the weight's global scale and bias, as products of few rows and of many have it.
fn finished(sum: f32, row: u32, matrix: u32) -> f32 {
  var global = 1.0;
  if ((args.has & 2u) != 0u) { global = extra[matrix]; }
  var bias = 0.0;
  if ((args.has & 1u) != 0u) { bias = extra[args.bias_offset + matrix * args.matrix_rows + args.first_row + row]; }
  return fma(sum, global, bias);
}

