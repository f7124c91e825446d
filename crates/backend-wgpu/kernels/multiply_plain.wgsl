
// What cooperative matrices would do, for adapters that test the rest of this kernel.
fn multiply(of_a: u32, of_x: u32, to: u32, lane: u32) {
  for (var half = 0u; half < 2u; half++) {
    let token = lane / 4u + 8u * half;
    var combined = vec4<f32>();
    for (var r = 0u; r < 4u; r++) {
      var digit_sums = array<f32, DIGITS>();
      for (var digit = 0u; digit < DIGITS; digit++) {
        for (var i = 0u; i < 8u; i++) {
          let codes4 = vec4<f32>(a[of_a + (4u * (lane % 4u) + r) * ROW + i]);
          let digits4 = vec4<f32>(x[of_x + 128u * digit + 64u * (i / 4u) + 4u * token + i % 4u]);
          digit_sums[digit] += dot(codes4, digits4);
        }
      }
      combined[r] = {{COMBINED_PLAIN}};
    }
    d[to + 4u * token + lane % 4u] = combined;
  }
}
