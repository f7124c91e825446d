      if (team < end_team) {
        let chunk = min(lane_here + select(0u, 32u * turn, is_shared) + lanes * next_round, chunks - 1u);
{{ASK}}
      }
