//! Integer and E2M1 weights, dequantized to f32, times f32 activations: one fused multiply-add a column, in order.
//! For references and golden tests, so it comes in few sizes.
// Loops run over arrays of registers, several at once; iterators would hide vectors in closures.
#![allow(clippy::needless_range_loop)]

use super::codes::{Codes, E2M1_BIAS, E2M1_FACTOR};
use super::{TileArgs, TileKernel, finish, load_e4m3, load_e8m0, load_scales};
use crate::layout::{BLOCK_COLS, LINE_BYTES, TILE_ROWS};
use crate::simd::Simd;
use std::marker::PhantomData;

/// Rows of these kernels.
pub(super) const MAX_ROWS: usize = 2;

/// Affine codes: weights are `code * scale + offset`, rounded twice, as decoding does.
pub(super) struct Grouped<C>(PhantomData<C>);
/// E2M1 codes with a scale per `GROUP` columns (32: E8M0, 16: E4M3).
pub(super) struct Table<C, const GROUP: usize>(PhantomData<C>);

/// Adds columns `4 M .. 4 M + 4`: `weight` makes a weight of its code.
macro_rules! add_columns {
    ($s:ident, $m:literal, $codes:ty, $at:expr, $x:expr, $total:ident, |$code:ident| $weight:expr) => {{
        let bytes = <$codes as Codes>::operand::<S, $m>($s, $at);
        for j in 0..4 {
            let $code = $s.and($s.shr(bytes, 8 * j as u32), $s.splat_i(0xff));
            let weight = $weight;
            for r in 0..R {
                $total[r] = $s.mul_add(weight, $s.splat(*$x[r].add(4 * $m + j)), $total[r]);
            }
        }
    }};
}

/// All 32 columns of a block.
macro_rules! add_block {
    ($s:ident, $codes:ty, $at:expr, $x:expr, $total:ident, [$low:expr, $high:expr], |$code:ident, $scale:ident| $weight:expr) => {{
        let $scale = $low;
        add_columns!($s, 0, $codes, $at, $x, $total, |$code| $weight);
        add_columns!($s, 1, $codes, $at, $x, $total, |$code| $weight);
        add_columns!($s, 2, $codes, $at, $x, $total, |$code| $weight);
        add_columns!($s, 3, $codes, $at, $x, $total, |$code| $weight);
        let $scale = $high;
        add_columns!($s, 4, $codes, $at, $x, $total, |$code| $weight);
        add_columns!($s, 5, $codes, $at, $x, $total, |$code| $weight);
        add_columns!($s, 6, $codes, $at, $x, $total, |$code| $weight);
        add_columns!($s, 7, $codes, $at, $x, $total, |$code| $weight);
    }};
}

impl<C: Codes> TileKernel for Grouped<C> {
    const MAX_STREAMS: usize = 1;
    const MAX_ROWS: usize = MAX_ROWS;

    #[inline(always)]
    unsafe fn run<S: Simd, const T: usize, const R: usize>(s: S, args: &TileArgs<'_>) {
        let layout = args.layout;
        let offsets_at = TILE_ROWS * layout.scale_dtype.size_bytes();
        let mut totals = [[s.splat(0.0); R]; T];
        // SAFETY: tiles are records of `record_blocks` blocks and their scales; rows hold `padded_cols` floats.
        unsafe {
            for t in 0..T {
                let mut total = [s.splat(0.0); R];
                for block in 0..layout.blocks {
                    let at = args.tiles[t].add(layout.block_offset(block));
                    let scales = args.tiles[t].add(layout.scale_offset(block));
                    let factor = load_scales(s, layout.scale_dtype, scales);
                    let offset = load_scales(s, layout.scale_dtype, scales.add(offsets_at));
                    let mut x = [std::ptr::null::<f32>(); R];
                    for r in 0..R {
                        x[r] = args.rows[r].cast::<f32>().add(block * BLOCK_COLS);
                    }
                    add_block!(s, C, at, x, total, [factor, factor], |code, scale| s
                        .add(s.mul(s.to_f(code), scale), offset));
                }
                totals[t] = total;
            }
            finish::<S, T, R>(s, args, 1.0, &totals);
        }
    }
}

impl<C: Codes, const GROUP: usize> TileKernel for Table<C, GROUP> {
    const MAX_STREAMS: usize = 1;
    const MAX_ROWS: usize = MAX_ROWS;

    #[inline(always)]
    unsafe fn run<S: Simd, const T: usize, const R: usize>(s: S, args: &TileArgs<'_>) {
        let layout = args.layout;
        let mut totals = [[s.splat(0.0); R]; T];
        // SAFETY: tiles are records of up to `record_blocks` blocks and a line of scales; rows hold `padded_cols` floats.
        unsafe {
            for t in 0..T {
                let mut total = [s.splat(0.0); R];
                for block in 0..layout.blocks {
                    let at = args.tiles[t].add(layout.block_offset(block));
                    let scales = args.tiles[t].add(layout.scale_offset(block));
                    let within = block % layout.record_blocks;
                    let (low, high) = if GROUP == 32 {
                        let scale = load_e8m0(s, scales.add(within * TILE_ROWS));
                        (scale, scale)
                    } else {
                        let first = scales.add(within * 2 * TILE_ROWS);
                        (load_e4m3(s, first), load_e4m3(s, first.add(TILE_ROWS)))
                    };
                    let mut x = [std::ptr::null::<f32>(); R];
                    for r in 0..R {
                        x[r] = args.rows[r].cast::<f32>().add(block * BLOCK_COLS);
                    }
                    let bias = s.splat_i(E2M1_BIAS);
                    add_block!(s, C, at, x, total, [low, high], |code, scale| s
                        .mul(s.to_f(s.sub_i(code, bias)), scale));
                }
                totals[t] = total;
            }
            finish::<S, T, R>(s, args, 1.0 / E2M1_FACTOR, &totals);
        }
    }
}

const _: () = assert!(LINE_BYTES == 4 * TILE_ROWS, "a line is four bytes a row");
