
// A tile of integers: 16 rows of weights from element `of_a` of `a`, 16 rows of x from element `of_x` of `x`, to element `to` of `d`.
fn multiply(of_a: u32, of_x: u32, to: u32, lane: u32) {
  let a0 = coopLoadT<coop_mat16x16<f16, A>>(&a[of_a], ROW);
  let a1 = coopLoadT<coop_mat16x16<f16, A>>(&a[of_a + 4u], ROW);
{{DIGIT_SUMS}}
  coopStore({{COMBINED}}, &d[to], 4u);
}
