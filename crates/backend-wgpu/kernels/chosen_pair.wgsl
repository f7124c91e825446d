    for (var r = lane; r < ROWS; r += lanes) {
      let row = first_row + here + r;
      if (row < args.rows && {{TOKEN}}u < count) {
        let gate = finished(sum{{TOKEN}}_0[r], row, matrix, is_shared);
        let value = activated(gate, finished_second(sum{{TOKEN}}_1[r], row, matrix, is_shared));
        // Slots lie side by side in a row of out.
        put(out_rows[{{TOKEN}}], slots[{{TOKEN}}] * {{MATRIX_ROWS}} + {{SHARD_ROW}}row, value);
        if ((args.forms & 4u) != 0u) { finals[256u * {{TOKEN}}u + here + r] = value; }
      }
    }
