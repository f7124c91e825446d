//! Kernels over single rows of floats: sums, norms, additions.
//!
//! `unsafe`: SIMD kernels over raw rows (which may be the same row).
#![allow(unsafe_code)]

use crate::simd::{Kernel, Level, Simd};

const LANES: usize = 16;

/// `out = x * factor * weight (+ bias)` with `factor` and a shift from the row's statistics.
struct Norm {
    x: *const f32,
    weight: *const f32,
    /// Layer norm: its bias. RMS norm: null.
    bias: *const f32,
    out: *mut f32,
    len: usize,
    eps: f32,
}

/// `x[i] += y[i]`
struct AddRow {
    x: *mut f32,
    y: *const f32,
    len: usize,
}

/// 16 floats from `first` on, or as many as there are, zeros after them.
///
/// # Safety
/// `from` is valid for reads of `len` floats, `first < len`.
#[inline(always)]
unsafe fn load_at<S: Simd>(s: S, from: *const f32, first: usize, len: usize) -> S::F {
    // SAFETY: the caller's promise.
    unsafe { if first + LANES <= len { s.load(from.add(first)) } else { s.load_partial(from.add(first), len - first) } }
}

/// The counterpart of [`load_at`].
///
/// # Safety
/// `to` is valid for writes of `len` floats, `first < len`.
#[inline(always)]
unsafe fn store_at<S: Simd>(s: S, x: S::F, to: *mut f32, first: usize, len: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        if first + LANES <= len { s.store(x, to.add(first)) } else { s.store_partial(x, to.add(first), len - first) }
    }
}

impl Kernel for Norm {
    type Args = Self;

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &Self) {
        let len = args.len;
        // SAFETY: rows hold `len` floats.
        unsafe {
            let centred = !args.bias.is_null();
            let mut mean = 0.0;
            if centred {
                let mut sum = s.splat(0.0);
                for first in (0..len).step_by(LANES) {
                    sum = s.add(sum, load_at(s, args.x, first, len));
                }
                mean = s.sum(sum) / len as f32;
            }
            // Four sums hide the latency of the additions.
            let mut squares = [s.splat(0.0); 4];
            let mut first = 0;
            while first < len {
                for sum in &mut squares {
                    if first < len {
                        let mut x = load_at(s, args.x, first, len);
                        if centred {
                            // Lanes behind the row stay zero: they are not part of the variance.
                            x = s.sub(x, s.load_partial([mean; LANES].as_ptr(), (len - first).min(LANES)));
                        }
                        *sum = s.mul_add(x, x, *sum);
                    }
                    first += LANES;
                }
            }
            let sum = s.sum(s.add(s.add(squares[0], squares[1]), s.add(squares[2], squares[3])));
            let inverse = s.splat(1.0 / (sum / len as f32 + args.eps).sqrt());
            for first in (0..len).step_by(LANES) {
                let x = load_at(s, args.x, first, len);
                let weight = load_at(s, args.weight, first, len);
                let value = if centred {
                    let x = s.mul(s.sub(x, s.splat(mean)), inverse);
                    s.mul_add(x, weight, load_at(s, args.bias, first, len))
                } else {
                    s.mul(s.mul(x, inverse), weight)
                };
                store_at(s, value, args.out, first, len);
            }
        }
    }
}

impl Kernel for AddRow {
    type Args = Self;

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &Self) {
        for first in (0..args.len).step_by(LANES) {
            // SAFETY: rows hold `len` floats.
            unsafe {
                let sum = s.add(load_at(s, args.x, first, args.len), load_at(s, args.y, first, args.len));
                store_at(s, sum, args.x, first, args.len);
            }
        }
    }
}

/// `out = x / sqrt(mean(x²) + eps) * weight`
///
/// # Safety
/// `x`, `weight` and `out` hold `len` floats; `out` is `x` or apart from it; nobody else touches `out`.
pub(crate) unsafe fn rms_norm_row(
    level: Level,
    x: *const f32,
    weight: *const f32,
    out: *mut f32,
    len: usize,
    eps: f32,
) {
    // SAFETY: the caller's promise.
    unsafe { level.call::<Norm>(&Norm { x, weight, bias: std::ptr::null(), out, len, eps }) }
}

/// `out = (x - mean) / sqrt(variance + eps) * weight + bias`
///
/// # Safety
/// As [`rms_norm_row`].
pub(crate) unsafe fn layer_norm_row(
    level: Level,
    x: *const f32,
    weight_and_bias: [*const f32; 2],
    out: *mut f32,
    len: usize,
    eps: f32,
) {
    let [weight, bias] = weight_and_bias;
    // SAFETY: the caller's promise.
    unsafe { level.call::<Norm>(&Norm { x, weight, bias, out, len, eps }) }
}

/// `x += y`
///
/// # Safety
/// Both hold `len` floats; nobody else touches `x`.
pub(crate) unsafe fn add_row(level: Level, x: *mut f32, y: *const f32, len: usize) {
    // SAFETY: the caller's promise.
    unsafe { level.call::<AddRow>(&AddRow { x, y, len }) }
}
