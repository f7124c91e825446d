        // Sums of row and slot; behind those of all choices the shared expert's.
        let place = select(out_rows[t] * args.top_k + slots[t], args.num_tokens * args.top_k + out_rows[t], is_shared);
        out[args.out_offset + place * args.out_stride + {{SHARD_ROW}}row] = finished(sums0[r], row, matrix, is_shared);
