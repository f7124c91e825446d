//! Integer and E2M1 weights times 8-bit activations.
// Loops run over arrays of registers, several at once; iterators would hide vectors in closures.
#![allow(clippy::needless_range_loop)]

use super::codes::{Codes, E2M1_FACTOR, E2m1, prefetch_line};
use super::{PREFETCH_BYTES, TileArgs, TileKernel, finish, load_e4m3, load_e8m0, load_scales};
use crate::activations::Int8Layout;
use crate::layout::{BLOCK_COLS, LINE_BYTES, TILE_ROWS};
use crate::simd::Simd;
use std::marker::PhantomData;

/// Affine codes: `Σ_groups scale * Σ_blocks activation_scale * Σ codes x + offset * Σ x`.
pub(super) struct Grouped<C>(PhantomData<C>);
/// E2M1 with E8M0 scales per 32 columns.
pub(super) struct Mxfp4;
/// E2M1 with E4M3 scales per 16 columns.
pub(super) struct Nvfp4;

/// Adds the products of columns `4 M .. 4 M + 4` of a block to `acc`.
///
/// # Safety
/// Each of `at` holds a block, each of `x` a block of 8-bit activations.
#[inline(always)]
unsafe fn step<S: Simd, C: Codes, const T: usize, const R: usize, const M: usize>(
    s: S,
    at: &[*const u8; T],
    x: &[*const u8; R],
    acc: &mut [[S::I; R]; T],
) {
    prefetch_line::<S, C, T, M>(s, at);
    // SAFETY: the caller's promise.
    unsafe {
        let mut operand = [s.splat_i(0); T];
        for t in 0..T {
            operand[t] = C::operand::<S, M>(s, at[t]);
        }
        for r in 0..R {
            let four = s.splat_4_bytes(x[r].add(4 * M));
            for t in 0..T {
                acc[t][r] = if C::FULL_BYTE {
                    s.dot4_u8(acc[t][r], operand[t], four)
                } else {
                    s.dot4_u7(acc[t][r], operand[t], four)
                };
            }
        }
    }
}

/// Columns 0 to 15 of a block.
///
/// # Safety
/// As [`step`].
#[inline(always)]
unsafe fn first_half<S: Simd, C: Codes, const T: usize, const R: usize>(
    s: S,
    at: &[*const u8; T],
    x: &[*const u8; R],
    acc: &mut [[S::I; R]; T],
) {
    // SAFETY: the caller's promise.
    unsafe {
        step::<S, C, T, R, 0>(s, at, x, acc);
        step::<S, C, T, R, 1>(s, at, x, acc);
        step::<S, C, T, R, 2>(s, at, x, acc);
        step::<S, C, T, R, 3>(s, at, x, acc);
    }
}

/// Columns 16 to 31 of a block.
///
/// # Safety
/// As [`step`].
#[inline(always)]
unsafe fn second_half<S: Simd, C: Codes, const T: usize, const R: usize>(
    s: S,
    at: &[*const u8; T],
    x: &[*const u8; R],
    acc: &mut [[S::I; R]; T],
) {
    // SAFETY: the caller's promise.
    unsafe {
        step::<S, C, T, R, 4>(s, at, x, acc);
        step::<S, C, T, R, 5>(s, at, x, acc);
        step::<S, C, T, R, 6>(s, at, x, acc);
        step::<S, C, T, R, 7>(s, at, x, acc);
    }
}

/// `sum += factor * acc` with a factor a row: the scale of block `block` of the activations.
///
/// # Safety
/// Rows hold that block.
#[inline(always)]
unsafe fn add_block<S: Simd, const T: usize, const R: usize>(
    s: S,
    scales: &[*const f32; R],
    block: usize,
    acc: &[[S::F; R]; T],
    sum: &mut [[S::F; R]; T],
) {
    for r in 0..R {
        // SAFETY: the caller's promise. Rows are whole lines, so their parts are aligned for f32.
        let scale = s.splat(unsafe { *scales[r].add(block) });
        for t in 0..T {
            sum[t][r] = s.mul_add(acc[t][r], scale, sum[t][r]);
        }
    }
}

/// Where the parts of each row stand.
struct RowParts<const R: usize> {
    codes: [*const u8; R],
    scales: [*const f32; R],
}

/// # Safety
/// `args` holds `R` 8-bit rows.
#[inline(always)]
unsafe fn row_parts<const R: usize>(args: &TileArgs<'_>, int8: &Int8Layout) -> RowParts<R> {
    let mut parts = RowParts { codes: [std::ptr::null(); R], scales: [std::ptr::null(); R] };
    for r in 0..R {
        parts.codes[r] = args.rows[r];
        // SAFETY: the caller's promise.
        parts.scales[r] = unsafe { args.rows[r].add(int8.scales).cast() };
    }
    parts
}

impl<C: Codes> TileKernel for Grouped<C> {
    const BYTE_DOTS: bool = true;

    #[inline(always)]
    unsafe fn run<S: Simd, const T: usize, const R: usize>(s: S, args: &TileArgs<'_>) {
        let layout = args.layout;
        let Some(int8) = args.int8 else { unreachable!("8-bit rows come with their layout") };
        let blocks_per_group = layout.record_blocks;
        let offsets_at = TILE_ROWS * layout.scale_dtype.size_bytes();
        let zero = s.splat(0.0);
        let mut total = [[zero; R]; T];
        // SAFETY: tiles are `blocks / blocks_per_group` records of that many blocks and their scales; rows hold
        // `blocks` blocks and one sum a group.
        unsafe {
            let mut at = [args.tiles[0]; T];
            at[..T].copy_from_slice(&args.tiles[..T]);
            let row = row_parts::<R>(args, int8);
            let mut x = row.codes;
            let mut sums = [std::ptr::null::<f32>(); R];
            for r in 0..R {
                sums[r] = args.rows[r].add(int8.sums_of_group(blocks_per_group * BLOCK_COLS)).cast();
            }
            let mut block = 0;
            for group in 0..layout.blocks / blocks_per_group {
                let mut part = [[zero; R]; T];
                for _ in 0..blocks_per_group {
                    let mut acc = [[s.splat_i(0); R]; T];
                    first_half::<S, C, T, R>(s, &at, &x, &mut acc);
                    second_half::<S, C, T, R>(s, &at, &x, &mut acc);
                    let mut float = [[zero; R]; T];
                    for t in 0..T {
                        at[t] = at[t].add(C::LINES * LINE_BYTES);
                        for r in 0..R {
                            float[t][r] = s.to_f(acc[t][r]);
                        }
                    }
                    for r in 0..R {
                        x[r] = x[r].add(BLOCK_COLS);
                    }
                    add_block::<S, T, R>(s, &row.scales, block, &float, &mut part);
                    block += 1;
                }
                for t in 0..T {
                    let scale = load_scales(s, layout.scale_dtype, at[t]);
                    let offset = load_scales(s, layout.scale_dtype, at[t].add(offsets_at));
                    s.prefetch(at[t].wrapping_add(PREFETCH_BYTES));
                    for r in 0..R {
                        total[t][r] = s.mul_add(part[t][r], scale, total[t][r]);
                        total[t][r] = s.mul_add(offset, s.splat(*sums[r].add(group)), total[t][r]);
                    }
                    at[t] = at[t].add(layout.record_scale_bytes);
                }
            }
            finish::<S, T, R>(s, args, 1.0, &total);
        }
    }
}

impl TileKernel for Mxfp4 {
    const BYTE_DOTS: bool = true;

    #[inline(always)]
    unsafe fn run<S: Simd, const T: usize, const R: usize>(s: S, args: &TileArgs<'_>) {
        let layout = args.layout;
        let Some(int8) = args.int8 else { unreachable!("8-bit rows come with their layout") };
        let zero = s.splat(0.0);
        let mut total = [[zero; R]; T];
        // SAFETY: tiles are records of up to `record_blocks` blocks and a line of scales; rows hold `blocks` blocks.
        unsafe {
            let mut at = [args.tiles[0]; T];
            at[..T].copy_from_slice(&args.tiles[..T]);
            let row = row_parts::<R>(args, int8);
            let mut block = 0;
            while block < layout.blocks {
                let count = layout.record_blocks.min(layout.blocks - block);
                for within in 0..count {
                    let mut acc = [[s.splat_i(0); R]; T];
                    let mut x = row.codes;
                    for r in 0..R {
                        x[r] = row.codes[r].add(block * BLOCK_COLS);
                        let start = s.splat_4_bytes(args.rows[r].add(int8.e2m1_starts_32 + 4 * block));
                        for t in 0..T {
                            acc[t][r] = start;
                        }
                    }
                    first_half::<S, E2m1, T, R>(s, &at, &x, &mut acc);
                    second_half::<S, E2m1, T, R>(s, &at, &x, &mut acc);
                    let mut float = [[zero; R]; T];
                    for t in 0..T {
                        let left = (count - within) * E2m1::LINES * LINE_BYTES;
                        let scale = load_e8m0(s, at[t].add(left + within * TILE_ROWS));
                        at[t] = at[t].add(E2m1::LINES * LINE_BYTES);
                        for r in 0..R {
                            float[t][r] = s.mul(s.to_f(acc[t][r]), scale);
                        }
                    }
                    add_block::<S, T, R>(s, &row.scales, block, &float, &mut total);
                    block += 1;
                }
                for t in 0..T {
                    s.prefetch(at[t].wrapping_add(PREFETCH_BYTES));
                    at[t] = at[t].add(layout.record_scale_bytes);
                }
            }
            finish::<S, T, R>(s, args, 1.0 / E2M1_FACTOR, &total);
        }
    }
}

impl TileKernel for Nvfp4 {
    const BYTE_DOTS: bool = true;

    #[inline(always)]
    unsafe fn run<S: Simd, const T: usize, const R: usize>(s: S, args: &TileArgs<'_>) {
        let layout = args.layout;
        let Some(int8) = args.int8 else { unreachable!("8-bit rows come with their layout") };
        let zero = s.splat(0.0);
        let mut total = [[zero; R]; T];
        // SAFETY: as in `Mxfp4`.
        unsafe {
            let mut at = [args.tiles[0]; T];
            at[..T].copy_from_slice(&args.tiles[..T]);
            let row = row_parts::<R>(args, int8);
            let mut block = 0;
            while block < layout.blocks {
                let count = layout.record_blocks.min(layout.blocks - block);
                for within in 0..count {
                    let mut low = [[s.splat_i(0); R]; T];
                    let mut high = [[s.splat_i(0); R]; T];
                    let mut x = row.codes;
                    for r in 0..R {
                        x[r] = row.codes[r].add(block * BLOCK_COLS);
                        let starts = args.rows[r].add(int8.e2m1_starts_16 + 8 * block);
                        for t in 0..T {
                            low[t][r] = s.splat_4_bytes(starts);
                            high[t][r] = s.splat_4_bytes(starts.add(4));
                        }
                    }
                    first_half::<S, E2m1, T, R>(s, &at, &x, &mut low);
                    second_half::<S, E2m1, T, R>(s, &at, &x, &mut high);
                    let mut float = [[zero; R]; T];
                    for t in 0..T {
                        let left = (count - within) * E2m1::LINES * LINE_BYTES;
                        let scales = at[t].add(left + within * 2 * TILE_ROWS);
                        let (scale_low, scale_high) = (load_e4m3(s, scales), load_e4m3(s, scales.add(TILE_ROWS)));
                        at[t] = at[t].add(E2m1::LINES * LINE_BYTES);
                        for r in 0..R {
                            float[t][r] = s.mul(s.to_f(low[t][r]), scale_low);
                            float[t][r] = s.mul_add(s.to_f(high[t][r]), scale_high, float[t][r]);
                        }
                    }
                    add_block::<S, T, R>(s, &row.scales, block, &float, &mut total);
                    block += 1;
                }
                for t in 0..T {
                    s.prefetch(at[t].wrapping_add(PREFETCH_BYTES));
                    at[t] = at[t].add(layout.record_scale_bytes);
                }
            }
            finish::<S, T, R>(s, args, 1.0 / E2M1_FACTOR, &total);
        }
    }
}
