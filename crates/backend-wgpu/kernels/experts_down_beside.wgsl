  } else {
    // The product that makes `plus`, as product.wgsl would: a team of up to 64 lanes.
    let mine = local - 256u;
    let chunks = args.chunks_b;
    let lanes = args.lanes_b;
    let lane = mine % lanes;
    let local_matrix = 0u;
    let x_row0 = args.top_k * args.x_part_step;
{{START}}
    for (var chunk = select(chunks, lane, mine < lanes); chunk < chunks; chunk += lanes) {
{{BODY}}
    }
    var sum = {{SUMS}};
    for (var step = 1u; step < min(lanes, 32u); step <<= 1u) { sum = sum + subgroupShuffleXor(sum, step); }
    if (mine % 32u == 0u) { partial[mine / 32u] = sum; }
  }
  workgroupBarrier();
  if (local == 0u) {
    var sum = partial[0];
    if (args.lanes_b > 32u) { sum = sum + partial[1]; }
    var global = 1.0;
    if ((args.has_b & 2u) != 0u) { global = extra_b[0]; }
    var bias = vec4<f32>();
    if ((args.has_b & 1u) != 0u) {
      for (var r = 0u; r < ROWS; r++) { bias[r] = extra_b[args.bias_offset_b + min(team * ROWS + r, args.rows - 1u)]; }
    }
    plus_here = fma(sum, vec4<f32>(global), bias);
  }
