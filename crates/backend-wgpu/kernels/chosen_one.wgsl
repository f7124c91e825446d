    // Sums of row and slot; behind those of all choices the shared expert's.
    for (var r = lane; r < ROWS; r += lanes) {
      let row = first_row + here + r;
      if (row < args.rows && {{TOKEN}}u < count) {
        let place = select(out_rows[{{TOKEN}}] * args.top_k + slots[{{TOKEN}}], args.num_tokens * args.top_k + out_rows[{{TOKEN}}], is_shared);
        out[args.out_offset + place * args.out_stride + {{SHARD_ROW}}row] = finished(sum{{TOKEN}}_0[r], row, matrix, is_shared);
      }
    }
