//! Plain floats times f32 activations: one fused multiply-add a column, in order.
// Loops run over arrays of registers, several at once; iterators would hide vectors in closures.
#![allow(clippy::needless_range_loop)]

use super::{TileArgs, TileKernel, fetch_ahead, finish};
use crate::layout::LINE_BYTES;
use crate::simd::Simd;

/// binary32: a line a column.
pub(super) struct F32;
/// binary16: half a line a column.
pub(super) struct F16;
/// bfloat16: a line is two columns, low and high halves of the lanes.
pub(super) struct Bf16;

/// A loop over lines of one or two columns: `$decode` makes the weights of the line at `$at`.
macro_rules! float_kernel {
    ($name:ident, $columns:literal, |$s:ident, $at:ident| $decode:expr) => {
        impl TileKernel for $name {
            #[inline(always)]
            unsafe fn run<S: Simd, const T: usize, const R: usize>($s: S, args: &TileArgs<'_>) {
                let mut total = [[$s.splat(0.0); R]; T];
                // SAFETY: tiles hold `padded_cols` columns (a multiple of 32), rows as many floats.
                unsafe {
                    for line in 0..args.layout.padded_cols() / $columns {
                        for t in 0..T {
                            let $at = args.tiles[t].add(line * LINE_BYTES);
                            fetch_ahead::<S, T>($s, $at);
                            let weights: [S::F; $columns] = $decode;
                            for j in 0..$columns {
                                for r in 0..R {
                                    let x = *args.rows[r].cast::<f32>().add(line * $columns + j);
                                    total[t][r] = $s.mul_add(weights[j], $s.splat(x), total[t][r]);
                                }
                            }
                        }
                    }
                    finish::<S, T, R>($s, args, 1.0, &total);
                }
            }
        }
    };
}

float_kernel!(F32, 1, |s, at| [s.load(at.cast())]);
float_kernel!(F16, 2, |s, at| [s.load_f16(at), s.load_f16(at.add(LINE_BYTES / 2))]);
float_kernel!(Bf16, 2, |s, at| {
    let pairs = s.load_i(at);
    let high = s.splat_i(0xffff_0000_u32 as i32);
    [s.cast_to_f(s.shl(pairs, 16)), s.cast_to_f(s.and(pairs, high))]
});
