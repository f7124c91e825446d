  // The words of the next round are on their way while those of this one are multiplied.
  let rounds = (chunks + lanes - 1u) / lanes;
  let end_team = (group.x + 1u) * passes * teams;
  var team = group.x * passes * teams + local / lanes;
  var next_round = 0u;
{{DECLARE}}
{{PLACE}}
  {
    let chunk = min(lane, chunks - 1u);
{{ASK}}
  }
  for (var row_pass = 0u; row_pass < passes; row_pass++) {
{{START}}
    for (var round = 0u; round < rounds; round++) {
{{TAKE}}
      next_round++;
      if (next_round == rounds) {
        next_round = 0u;
        team += teams;
{{PLACE}}
      }
      if (team < end_team) {
        let chunk = min(lane + lanes * next_round, chunks - 1u);
{{ASK}}
      }
      let chunk = lane + lanes * round;
      if (chunk < chunks) {
{{BODY}}
      }
    }
{{FINISH}}
    let here = (row_pass * teams + local / lanes) * ROWS;
{{KEEP}}
  }
