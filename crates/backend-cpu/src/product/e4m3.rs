//! E4M3 weights (FP8 blocks, MXFP8) times f32 activations: products of a group are summed without its scale, then
//! scaled once.
// Loops run over arrays of registers, several at once; iterators would hide vectors in closures.
#![allow(clippy::needless_range_loop)]

use super::{TileArgs, TileKernel, e4m3_value, fetch_ahead, finish, load_e8m0};
use crate::layout::{BLOCK_COLS, Coding, LINE_BYTES, TILE_ROWS};
use crate::simd::Simd;

/// Both formats: they differ in where scales stand.
pub(super) struct E4m3;

/// Columns of a line: four bytes a row.
const LINE_COLS: usize = 4;

/// Adds `lines` lines (four columns each) to `part` and moves on.
///
/// # Safety
/// Tiles hold that many lines at `at`, rows that many columns at `x`.
#[inline(always)]
unsafe fn add_lines<S: Simd, const T: usize, const R: usize>(
    s: S,
    lines: usize,
    at: &mut [*const u8; T],
    x: &mut [*const f32; R],
    part: &mut [[S::F; R]; T],
) {
    // SAFETY: the caller's promise.
    unsafe {
        for _ in 0..lines {
            for t in 0..T {
                fetch_ahead::<S, T>(s, at[t]);
                let line = s.load_i(at[t]);
                at[t] = at[t].add(LINE_BYTES);
                for j in 0..LINE_COLS {
                    let weight = e4m3_value(s, s.shl(line, 24 - 8 * j as u32));
                    for r in 0..R {
                        part[t][r] = s.mul_add(weight, s.splat(*x[r].add(j)), part[t][r]);
                    }
                }
            }
            for r in 0..R {
                x[r] = x[r].add(LINE_COLS);
            }
        }
    }
}

impl TileKernel for E4m3 {
    #[inline(always)]
    unsafe fn run<S: Simd, const T: usize, const R: usize>(s: S, args: &TileArgs<'_>) {
        let layout = args.layout;
        let zero = s.splat(0.0);
        let mut total = [[zero; R]; T];
        let mut at = [args.tiles[0]; T];
        at[..T].copy_from_slice(&args.tiles[..T]);
        let mut x = [std::ptr::null::<f32>(); R];
        for r in 0..R {
            x[r] = args.rows[r].cast();
        }
        // SAFETY: FP8 tiles are a header of scales and `blocks` blocks, MXFP8 tiles records of up to `record_blocks`
        // blocks and a line of scales; rows hold `padded_cols` floats.
        unsafe {
            if layout.coding == Coding::Fp8Block {
                for t in 0..T {
                    at[t] = at[t].add(layout.header_bytes);
                }
                let lines = layout.padded_cols() / LINE_COLS;
                let group_lines = layout.fp8_block_cols / LINE_COLS;
                let (mut line, mut group) = (0, 0);
                while line < lines {
                    // Padding behind the last group of columns is zeros and joins it.
                    let is_last = (group + 1) * layout.fp8_block_cols >= layout.cols;
                    let count = if is_last { lines - line } else { group_lines };
                    let mut part = [[zero; R]; T];
                    add_lines::<S, T, R>(s, count, &mut at, &mut x, &mut part);
                    for t in 0..T {
                        let scales = args.tiles[t].cast::<f32>().add(group * layout.fp8_scale_lanes);
                        let scale = if layout.fp8_scale_lanes == 1 { s.splat(*scales) } else { s.load(scales) };
                        for r in 0..R {
                            total[t][r] = s.mul_add(part[t][r], scale, total[t][r]);
                        }
                    }
                    line += count;
                    group += 1;
                }
            } else {
                let mut block = 0;
                while block < layout.blocks {
                    let count = layout.record_blocks.min(layout.blocks - block);
                    for within in 0..count {
                        let mut part = [[zero; R]; T];
                        let mut scales = at;
                        for t in 0..T {
                            scales[t] = at[t].add((count - within) * layout.block_bytes + within * TILE_ROWS);
                        }
                        add_lines::<S, T, R>(s, BLOCK_COLS / LINE_COLS, &mut at, &mut x, &mut part);
                        for t in 0..T {
                            let scale = load_e8m0(s, scales[t]);
                            for r in 0..R {
                                total[t][r] = s.mul_add(part[t][r], scale, total[t][r]);
                            }
                        }
                    }
                    block += count;
                    for t in 0..T {
                        fetch_ahead::<S, T>(s, at[t]);
                        at[t] = at[t].add(layout.record_scale_bytes);
                    }
                }
            }
            finish::<S, T, R>(s, args, 1.0, &total);
        }
    }
}
