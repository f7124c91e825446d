  // Subgroups with rows of the second weight hand their sums to those with the same rows of the first.
  workgroupBarrier();
  let meets = ((row_tile % 2u + 2u * (warp / 4u)) * 32u + lane) * 2u;
  if (row_tile >= 2u) {
    d[meets] = totals[0];
    d[meets + 1u] = totals[1];
  }
  workgroupBarrier();
  for (var half = 0u; half < 2u; half++) {
    let token = 16u * (warp / 4u) + lane / 4u + 8u * half;
    if (row_tile < 2u && token < count) {
      var out_row = first + token;
      var column = args.first_row;
      if (args.is_list != 0u) {
        let choice = list[args.sorted_offset + out_row];
        out_row = choice / args.top_k;
        column += (choice % args.top_k) * args.matrix_rows;
      }
      let at = args.out_offset + out_row * args.out_stride + column;
      let ups = d[meets + half];
      for (var r = 0u; r < 4u; r++) {
        let row = 32u * group.x + 16u * row_tile + 4u * (lane % 4u) + r;
        if (row < args.rows) {
          out[at + row] = activated(finished(totals[half][r], row, matrix), finished_second(ups[r], row, matrix));
        }
      }
    }
  }
