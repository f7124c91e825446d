//! Transcendental functions of 16 lanes, from exact and correctly rounded steps, so that all levels agree.

use super::Simd;

/// `|x|`
#[inline(always)]
pub(crate) fn abs<S: Simd>(s: S, x: S::F) -> S::F {
    s.cast_to_f(s.and(s.cast_to_i(x), s.splat_i(0x7fff_ffff)))
}

/// `e^x`, relative error below 2 units in the last place; below -87 it stops at 1.6e-38, above 88 at 1.7e38.
///
/// Cody-Waite reduction to `[-ln 2 / 2, ln 2 / 2]` and the polynomial of Cephes `expf`.
#[inline(always)]
pub(crate) fn exp<S: Simd>(s: S, x: S::F) -> S::F {
    let x = s.max(s.min(x, s.splat(88.0)), s.splat(-87.0));
    let n = s.to_i(s.mul(x, s.splat(std::f32::consts::LOG2_E)));
    let whole = s.to_f(n);
    // ln 2 in two parts: the first has so few bits that its product with n is exact.
    let r = s.mul_add(whole, s.splat(-355.0 / 512.0), x);
    let r = s.mul_add(whole, s.splat(2.121_944_4e-4), r);
    let mut p = s.splat(1.987_569_1e-4);
    p = s.mul_add(p, r, s.splat(1.398_199_9e-3));
    p = s.mul_add(p, r, s.splat(8.333_452e-3));
    p = s.mul_add(p, r, s.splat(4.166_579_6e-2));
    p = s.mul_add(p, r, s.splat(1.666_666_5e-1));
    p = s.mul_add(p, r, s.splat(0.5));
    let value = s.add(s.mul_add(p, s.mul(r, r), r), s.splat(1.0));
    s.mul(value, s.cast_to_f(s.shl(s.add_i(n, s.splat_i(127)), 23)))
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub(crate) fn sigmoid<S: Simd>(s: S, x: S::F) -> S::F {
    let one = s.splat(1.0);
    s.div(one, s.add(one, exp(s, s.sub(s.splat(0.0), x))))
}
