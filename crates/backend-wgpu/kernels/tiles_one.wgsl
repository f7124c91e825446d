  for (var half = 0u; half < 2u; half++) {
    let token = 16u * (warp / 4u) + lane / 4u + 8u * half;
    if (token < count) {
      var out_row = first + token;
      if (args.is_list != 0u) { out_row = list[args.sorted_offset + out_row]; }
      var at = args.out_offset + out_row * args.out_stride + args.first_row;
      if (args.is_list == 0u) { at += matrix * args.out_matrix_step; }
      for (var r = 0u; r < 4u; r++) {
        let row = 64u * group.x + 16u * row_tile + 4u * (lane % 4u) + r;
        if (row < args.rows) {
          var value = finished(totals[half][r], row, matrix);
          if ((args.has & 16u) != 0u) { value = out[at + row] + value; }
          out[at + row] = value;
        }
      }
    }
  }
