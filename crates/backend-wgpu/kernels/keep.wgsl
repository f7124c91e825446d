    // Every lane has the sums of all tokens: lanes share them out, so that nobody waits for one token after the other.
    for (var i = lane; i < TOKENS * ROWS; i += lanes) {
      let t = i / ROWS;
      let r = i % ROWS;
{{PICK}}
      let row = first_row + here + r;
      if (t < count && row < args.rows) {
{{PUT}}
      }
    }
