      partial[local] = {{SUMS}};
      workgroupBarrier();
      for (var step = 1u; step < 32u; step <<= 1u) {
        if (step < lanes && local % (2u * step) == 0u) { partial[local] = partial[local] + partial[local + step]; }
        workgroupBarrier();
      }
      let sum = partial[local];
      workgroupBarrier();
