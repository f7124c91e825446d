  if ((args.forms & 4u) != 0u) {
    workgroupBarrier();
    let group_rows = passes * teams * ROWS;
    let rows_here = min(group_rows, args.rows - first_row);
    for (var t = 0u; t < count; t++) {
      for (var start = 0u; start < group_rows; start += WORKERS) {
        let column = slots[t] * {{MATRIX_ROWS}} + {{SHARD_ROW}}first_row + start;
        put_integers(out_rows[t], column, max(rows_here, start) - start, finals[256u * t + min(start + local, 255u)], local);
      }
    }
  }
