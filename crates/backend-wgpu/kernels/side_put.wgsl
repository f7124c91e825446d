        let value = finished(sums0[r], row, matrix);
        // Heads lie side by side in a row of out.
        put(first + t, matrix * args.rows + row, value);
        if ((args.forms & 4u) != 0u) { finals[256u * t + here + r] = value; }
