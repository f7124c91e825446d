      team = group.x * args.passes + row_pass;
      turn = turn_here;
{{PLACE}}
      for (var chunk = select(chunks, lane, is_busy); chunk < chunks; chunk += lanes) {
{{BODY}}
      }
