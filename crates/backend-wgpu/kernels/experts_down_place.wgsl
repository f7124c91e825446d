      {
        var local_matrix = 0u;
        if (!is_shared) { local_matrix = ids[args.ids_offset + min(turn * teams + mine / lanes, args.top_k - 1u)]; }
{{ROWS_OF_TEAM}}
      }
