  // The product that makes `plus`, as product.wgsl would.
  {
    let lane = local % args.lanes_b;
    let local_matrix = 0u;
    let x_row0 = 0u;
{{START}}
    for (var chunk = select(args.chunks_b, lane, local < args.lanes_b); chunk < args.chunks_b; chunk += args.lanes_b) {
{{BODY}}
    }
{{FINISH}}
    if (local == 0u) {
      var global = 1.0;
      if ((args.has_b & 2u) != 0u) { global = extra_b[0]; }
      var bias = vec4<f32>();
      if ((args.has_b & 1u) != 0u) {
        for (var r = 0u; r < ROWS; r++) { bias[r] = extra_b[args.bias_offset_b + min(team * ROWS + r, args.rows - 1u)]; }
      }
      plus_here = fma(sum0_0, vec4<f32>(global), bias);
    }
  }
