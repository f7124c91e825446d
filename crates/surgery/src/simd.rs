//! Runs a kernel compiled for the widest vectors that the processor has. Kernels are plain loops over arrays of 16 lanes;
//! wider instructions change their speed and not one bit of their results (no fused multiply-add, a fixed order of sums).
//!
//! `unsafe`: calling a function that was compiled for instructions beyond the baseline, after asking for them.
#![allow(unsafe_code, reason = "calls to functions with target features, each behind its run-time check")]

/// A computation whose `run` is inlined into functions compiled for different instruction sets.
pub(crate) trait Kernel {
    type Output;

    /// Must be `#[inline(always)]`, and everything hot below it too.
    fn run(self) -> Self::Output;
}

/// Runs `kernel` with the best instructions there are.
#[cfg(target_arch = "x86_64")]
pub(crate) fn dispatch<K: Kernel>(kernel: K) -> K::Output {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    fn with_avx512<K: Kernel>(kernel: K) -> K::Output {
        kernel.run()
    }
    #[target_feature(enable = "avx2")]
    fn with_avx2<K: Kernel>(kernel: K) -> K::Output {
        kernel.run()
    }
    let avx512 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("fma");
    if avx512 {
        // SAFETY: the processor has every feature that the function is compiled for, as just asked.
        unsafe { with_avx512(kernel) }
    } else if is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2, as just asked.
        unsafe { with_avx2(kernel) }
    } else {
        kernel.run()
    }
}

/// Runs `kernel`: the baseline of other architectures has vectors of its own.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn dispatch<K: Kernel>(kernel: K) -> K::Output {
    kernel.run()
}

/// Lanes that every kernel sums in.
pub(crate) const LANES: usize = 16;

/// `x` rounded to the nearest integer, ties to even, for `|x| < 2^22`: two additions instead of a call into libm.
#[inline(always)]
pub(crate) fn round_even(x: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0; // 1.5 * 2^23: the sum has no fraction bits left
    (x + MAGIC) - MAGIC
}

/// Sum of lanes in a fixed tree, in f64.
#[inline(always)]
pub(crate) fn sum_lanes(lanes: &[f32; LANES]) -> f64 {
    let mut wide = [0.0f64; LANES];
    for (wide, &lane) in wide.iter_mut().zip(lanes) {
        *wide = f64::from(lane);
    }
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            wide[i] += wide[i + width];
        }
        width /= 2;
    }
    wide[0]
}
