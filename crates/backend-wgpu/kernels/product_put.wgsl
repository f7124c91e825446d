        var value = {{VALUE}};
        let column = args.first_row + row + matrix * args.out_matrix_step;
        if ((args.has & 16u) != 0u) { value = out[args.out_offset + (first + t) * args.out_stride + column] + value; }
        put(first + t, column, value);
        if ((args.forms & 4u) != 0u) { finals[256u * t + here + r] = value; }
