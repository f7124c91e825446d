      for (var round = select(rounds, 0u, is_busy); round < rounds; round++) {
{{TAKE}}
        next_round++;
        if (next_round == rounds) {
          next_round = 0u;
          turn++;
          if (turn == turns) {
            turn = 0u;
            team++;
          }
{{PLACE}}
        }
{{ASK}}
        let chunk = lane + lanes * round;
        if (chunk < chunks) {
{{BODY}}
        }
      }
