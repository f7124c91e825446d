  for (var row_pass = 0u; row_pass < passes; row_pass++) {
    let team = (group.x * passes + row_pass) * teams + local / lanes;
{{START}}
    for (var chunk = lane; chunk < chunks; chunk += lanes) {
{{BODY}}
    }
{{FINISH}}
    let here = (row_pass * teams + local / lanes) * ROWS;
{{KEEP}}
  }
