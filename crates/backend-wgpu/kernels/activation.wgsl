// args.activation: 0: SwiGLU, 1: clamped.
fn activated(gate: f32, up: f32) -> f32 {
  if (args.activation == 1u) {
    let g = min(gate, args.limit);
    return (clamp(up, -args.limit, args.limit) + 1.0) * g * sigmoid(args.alpha * g);
  }
  return gate * sigmoid(gate) * up;
}

