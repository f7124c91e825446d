        let gate = finished(sums0[r], row, matrix, is_shared);
        let value = activated(gate, finished_second(sums1[r], row, matrix, is_shared));
        // Slots lie side by side in a row of out.
        put(out_rows[t], slots[t] * {{MATRIX_ROWS}} + {{SHARD_ROW}}row, value);
        if ((args.forms & 4u) != 0u) { finals[256u * t + here + r] = value; }
