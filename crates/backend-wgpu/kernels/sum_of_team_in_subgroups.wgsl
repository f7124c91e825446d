      var sum = {{SUMS}};
      for (var step = 1u; step < min(lanes, 32u); step <<= 1u) { sum = sum + subgroupShuffleXor(sum, step); }
