//! Integer and E2M1 weights times 8-bit activations.
// Loops run over arrays of registers, several at once; iterators would hide vectors in closures.
#![allow(clippy::needless_range_loop)]

use super::codes::{Codes, E2M1_FACTOR, prefetch_line};
use super::{TileArgs, TileKernel, fetch_ahead, finish, load_e8m0, load_scales, nvfp4_scales};
use crate::activations::Int8Layout;
use crate::layout::{BLOCK_COLS, LINE_BYTES, TILE_ROWS};
use crate::simd::Simd;
use std::marker::PhantomData;

/// Affine codes: `Σ_groups scale * Σ activation_scale * Σ codes x + offset * Σ x`.
pub(super) struct Grouped<C>(PhantomData<C>);
/// E2M1 with E8M0 scales per 32 columns.
pub(super) struct Mxfp4<C>(PhantomData<C>);
/// E2M1 with E4M3 scales per 16 columns.
pub(super) struct Nvfp4<C>(PhantomData<C>);

/// 32-bit sums of `T` tiles and `R` rows, and the products that are not yet in them.
struct Sums<S: Simd, const T: usize, const R: usize> {
    acc: [[S::I; R]; T],
    pairs: [[S::Pairs; R]; T],
}

impl<S: Simd, const T: usize, const R: usize> Sums<S, T, R> {
    /// All zeros.
    #[inline(always)]
    fn zero(s: S) -> Self {
        let zero = s.splat_i(0);
        Sums { acc: [[zero; R]; T], pairs: [[s.open_pairs(zero); R]; T] }
    }
}

/// Adds the products of columns `4 M .. 4 M + 4` of a block to `sums`; after columns `4 STEPS k` they are in `acc`.
///
/// # Safety
/// Each of `at` holds a block, each of `x` a block of 8-bit activations.
#[inline(always)]
unsafe fn step<S: Simd, C: Codes, const T: usize, const R: usize, const M: usize>(
    s: S,
    at: &[*const u8; T],
    x: &[*const u8; R],
    sums: &mut Sums<S, T, R>,
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
                let (acc, pairs) = (&mut sums.acc[t][r], &mut sums.pairs[t][r]);
                if C::FULL_BYTE {
                    *acc = s.dot4_u8(*acc, operand[t], four);
                    continue;
                }
                if M.is_multiple_of(C::STEPS) {
                    *pairs = s.open_pairs(*acc);
                }
                *pairs = s.dot4_pairs(*pairs, operand[t], four);
                if M % C::STEPS == C::STEPS - 1 {
                    *acc = s.close_pairs(*acc, *pairs);
                }
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
    sums: &mut Sums<S, T, R>,
) {
    // SAFETY: the caller's promise.
    unsafe {
        step::<S, C, T, R, 0>(s, at, x, sums);
        step::<S, C, T, R, 1>(s, at, x, sums);
        step::<S, C, T, R, 2>(s, at, x, sums);
        step::<S, C, T, R, 3>(s, at, x, sums);
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
    sums: &mut Sums<S, T, R>,
) {
    // SAFETY: the caller's promise.
    unsafe {
        step::<S, C, T, R, 4>(s, at, x, sums);
        step::<S, C, T, R, 5>(s, at, x, sums);
        step::<S, C, T, R, 6>(s, at, x, sums);
        step::<S, C, T, R, 7>(s, at, x, sums);
    }
}

/// All columns of a block.
///
/// # Safety
/// As [`step`].
#[inline(always)]
unsafe fn whole_block<S: Simd, C: Codes, const T: usize, const R: usize>(
    s: S,
    args: &TileArgs<'_>,
    at: &[*const u8; T],
    x: &[*const u8; R],
    sums: &mut Sums<S, T, R>,
) {
    // SAFETY: the caller's promise.
    unsafe {
        if C::WIDE {
            wide_steps::<S, C, T, R>(s, args, at, x, [0, 8], sums);
        } else {
            first_half::<S, C, T, R>(s, at, x, sums);
            second_half::<S, C, T, R>(s, at, x, sums);
        }
    }
}

/// `sum += factor * acc` with a factor a row: scale `number` of the activations.
///
/// # Safety
/// Rows hold that scale.
#[inline(always)]
unsafe fn add_block<S: Simd, const T: usize, const R: usize>(
    s: S,
    scales: &[*const f32; R],
    number: usize,
    acc: &[[S::F; R]; T],
    sum: &mut [[S::F; R]; T],
) {
    for r in 0..R {
        // SAFETY: the caller's promise. Rows are whole lines, so their parts are aligned for f32.
        let scale = s.splat(unsafe { *scales[r].add(number) });
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

/// Columns `4 FIRST .. 4 (FIRST + COUNT)` of a block of expanded codes. A loop whose end the compiler does not know: it
/// would unroll it, move all loads to the top and spill them.
///
/// # Safety
/// As [`step`].
#[inline(always)]
unsafe fn wide_steps<S: Simd, C: Codes, const T: usize, const R: usize>(
    s: S,
    args: &TileArgs<'_>,
    at: &[*const u8; T],
    x: &[*const u8; R],
    [first, count]: [usize; 2],
    sums: &mut Sums<S, T, R>,
) {
    if S::EIGHTS {
        for t in 0..T {
            // SAFETY: the caller's promise.
            let dots = unsafe { s.dot_eights::<R>(at[t], x, [first, count]) };
            for r in 0..R {
                sums.acc[t][r] = s.add_i(sums.acc[t][r], dots[r]);
            }
        }
        return;
    }
    let mut start = first;
    while start < first + count {
        for t in 0..T {
            for r in 0..R {
                sums.pairs[t][r] = s.open_pairs(sums.acc[t][r]);
            }
        }
        // SAFETY: the caller's promise; `wide_steps` is `C::STEPS`.
        unsafe {
            for m in start..start + args.wide_steps {
                let mut operand = [s.splat_i(0); T];
                for t in 0..T {
                    operand[t] = s.load_i(at[t].add(m * LINE_BYTES));
                }
                for r in 0..R {
                    let four = s.splat_4_bytes(x[r].add(4 * m));
                    for t in 0..T {
                        sums.pairs[t][r] = s.dot4_pairs(sums.pairs[t][r], operand[t], four);
                    }
                }
            }
        }
        for t in 0..T {
            for r in 0..R {
                sums.acc[t][r] = s.close_pairs(sums.acc[t][r], sums.pairs[t][r]);
            }
        }
        start += C::STEPS;
    }
}

/// Blocks that a call multiplies: all of a tile, or the part of it that was expanded.
#[inline(always)]
fn blocks_of_call<C: Codes>(args: &TileArgs<'_>) -> std::ops::Range<usize> {
    if C::WIDE { args.first_block..args.end_block } else { 0..args.layout.blocks }
}

/// What calls for earlier parts of the tiles left in `args.out`, else zeros.
///
/// # Safety
/// `args.out` has room for `T * R * 16` floats.
#[inline(always)]
unsafe fn totals_before<S: Simd, C: Codes, const T: usize, const R: usize>(
    s: S,
    args: &TileArgs<'_>,
) -> [[S::F; R]; T] {
    let mut total = [[s.splat(0.0); R]; T];
    if C::WIDE && args.first_block > 0 {
        for t in 0..T {
            for r in 0..R {
                // SAFETY: the caller's promise.
                total[t][r] = unsafe { s.load(args.out.add((t * R + r) * TILE_ROWS)) };
            }
        }
    }
    total
}

/// Leaves the totals for the next part of the tiles, or finishes them.
///
/// # Safety
/// As [`totals_before`].
#[inline(always)]
unsafe fn leave_totals<S: Simd, C: Codes, const T: usize, const R: usize>(
    s: S,
    args: &TileArgs<'_>,
    factor: f32,
    total: &[[S::F; R]; T],
) {
    // SAFETY: the caller's promise.
    unsafe {
        if C::WIDE && args.end_block < args.layout.blocks {
            for t in 0..T {
                for r in 0..R {
                    s.store(total[t][r], args.out.add((t * R + r) * TILE_ROWS));
                }
            }
        } else {
            finish::<S, T, R>(s, args, factor, total);
        }
    }
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
    const WIDE_DOTS: bool = C::WIDE;
    const LOOKS_UP: bool = C::LOOKS_UP;

    #[inline(always)]
    unsafe fn run<S: Simd, const T: usize, const R: usize>(s: S, args: &TileArgs<'_>) {
        let layout = args.layout;
        let Some(int8) = args.int8 else { unreachable!("8-bit rows come with their layout") };
        let blocks_per_group = layout.record_blocks;
        let offsets_at = TILE_ROWS * layout.scale_dtype.size_bytes();
        let zero = s.splat(0.0);
        let blocks = blocks_of_call::<C>(args);
        // SAFETY: tiles are `blocks / blocks_per_group` records of that many blocks and their scales; rows hold
        // `blocks` blocks, their scales and one sum a group. Groups are whole numbers of these scales.
        unsafe {
            let mut total = totals_before::<S, C, T, R>(s, args);
            let mut at = [args.tiles[0]; T];
            at[..T].copy_from_slice(&args.tiles[..T]);
            let row = row_parts::<R>(args, int8);
            let mut x = row.codes;
            let mut sums = [std::ptr::null::<f32>(); R];
            for r in 0..R {
                x[r] = x[r].add(blocks.start * BLOCK_COLS);
                sums[r] = args.rows[r].add(int8.sums_of_group(blocks_per_group * BLOCK_COLS)).cast();
            }
            let mut number = blocks.start / layout.scale_blocks;
            for group in blocks.start / blocks_per_group..blocks.end / blocks_per_group {
                let mut part = [[zero; R]; T];
                for _ in 0..blocks_per_group / layout.scale_blocks {
                    let mut dots = Sums::zero(s);
                    for _ in 0..layout.scale_blocks {
                        whole_block::<S, C, T, R>(s, args, &at, &x, &mut dots);
                        for t in 0..T {
                            at[t] = at[t].add(C::LINES * LINE_BYTES);
                        }
                        for r in 0..R {
                            x[r] = x[r].add(BLOCK_COLS);
                        }
                    }
                    let mut float = [[zero; R]; T];
                    for t in 0..T {
                        for r in 0..R {
                            float[t][r] = s.to_f(dots.acc[t][r]);
                        }
                    }
                    add_block::<S, T, R>(s, &row.scales, number, &float, &mut part);
                    number += 1;
                }
                for t in 0..T {
                    let (scale, offset) = if C::WIDE {
                        (s.load(at[t].cast()), s.load(at[t].add(LINE_BYTES).cast()))
                    } else {
                        fetch_ahead::<S, T>(s, at[t]);
                        (
                            load_scales(s, layout.scale_dtype, at[t]),
                            load_scales(s, layout.scale_dtype, at[t].add(offsets_at)),
                        )
                    };
                    for r in 0..R {
                        total[t][r] = s.mul_add(part[t][r], scale, total[t][r]);
                        total[t][r] = s.mul_add(offset, s.splat(*sums[r].add(group)), total[t][r]);
                    }
                    at[t] = at[t].add(if C::WIDE { 2 * LINE_BYTES } else { layout.record_scale_bytes });
                }
            }
            leave_totals::<S, C, T, R>(s, args, 1.0, &total);
        }
    }
}

impl<C: Codes> TileKernel for Mxfp4<C> {
    const BYTE_DOTS: bool = true;
    const WIDE_DOTS: bool = C::WIDE;
    const LOOKS_UP: bool = C::LOOKS_UP;

    #[inline(always)]
    unsafe fn run<S: Simd, const T: usize, const R: usize>(s: S, args: &TileArgs<'_>) {
        let layout = args.layout;
        let Some(int8) = args.int8 else { unreachable!("8-bit rows come with their layout") };
        let zero = s.splat(0.0);
        let blocks = blocks_of_call::<C>(args);
        // SAFETY: tiles are records of up to `record_blocks` blocks and a line of scales; rows hold `blocks` blocks.
        unsafe {
            let mut total = totals_before::<S, C, T, R>(s, args);
            let mut at = [args.tiles[0]; T];
            at[..T].copy_from_slice(&args.tiles[..T]);
            let row = row_parts::<R>(args, int8);
            let mut block = blocks.start;
            while block < blocks.end {
                let count = layout.record_blocks.min(blocks.end - block);
                for within in 0..count {
                    let mut dots = Sums::zero(s);
                    let mut x = row.codes;
                    for r in 0..R {
                        x[r] = row.codes[r].add(block * BLOCK_COLS);
                        let start = s.splat_4_bytes(args.rows[r].add(int8.e2m1_starts_32 + 4 * block));
                        for t in 0..T {
                            dots.acc[t][r] = start;
                        }
                    }
                    whole_block::<S, C, T, R>(s, args, &at, &x, &mut dots);
                    let mut float = [[zero; R]; T];
                    for t in 0..T {
                        let scales = at[t].add((count - within) * C::LINES * LINE_BYTES);
                        let scale = if C::WIDE {
                            s.load(scales.add(within * LINE_BYTES).cast())
                        } else {
                            load_e8m0(s, scales.add(within * TILE_ROWS))
                        };
                        at[t] = at[t].add(C::LINES * LINE_BYTES);
                        for r in 0..R {
                            float[t][r] = s.mul(s.to_f(dots.acc[t][r]), scale);
                        }
                    }
                    add_block::<S, T, R>(s, &row.scales, block, &float, &mut total);
                    block += 1;
                }
                for t in 0..T {
                    if C::WIDE {
                        at[t] = at[t].add(count * LINE_BYTES);
                    } else {
                        fetch_ahead::<S, T>(s, at[t]);
                        at[t] = at[t].add(layout.record_scale_bytes);
                    }
                }
            }
            leave_totals::<S, C, T, R>(s, args, 1.0 / E2M1_FACTOR, &total);
        }
    }
}

impl<C: Codes> TileKernel for Nvfp4<C> {
    const BYTE_DOTS: bool = true;
    const WIDE_DOTS: bool = C::WIDE;
    const LOOKS_UP: bool = C::LOOKS_UP;

    #[inline(always)]
    unsafe fn run<S: Simd, const T: usize, const R: usize>(s: S, args: &TileArgs<'_>) {
        let layout = args.layout;
        let Some(int8) = args.int8 else { unreachable!("8-bit rows come with their layout") };
        let zero = s.splat(0.0);
        let blocks = blocks_of_call::<C>(args);
        // SAFETY: as in `Mxfp4`.
        unsafe {
            let mut total = totals_before::<S, C, T, R>(s, args);
            let mut at = [args.tiles[0]; T];
            at[..T].copy_from_slice(&args.tiles[..T]);
            let row = row_parts::<R>(args, int8);
            let mut block = blocks.start;
            while block < blocks.end {
                let count = layout.record_blocks.min(blocks.end - block);
                for within in 0..count {
                    let (mut low, mut high) = (Sums::zero(s), Sums::zero(s));
                    let mut x = row.codes;
                    for r in 0..R {
                        x[r] = row.codes[r].add(block * BLOCK_COLS);
                        let starts = args.rows[r].add(int8.e2m1_starts_16 + 8 * block);
                        for t in 0..T {
                            low.acc[t][r] = s.splat_4_bytes(starts);
                            high.acc[t][r] = s.splat_4_bytes(starts.add(4));
                        }
                    }
                    if C::WIDE {
                        wide_steps::<S, C, T, R>(s, args, &at, &x, [0, 4], &mut low);
                        wide_steps::<S, C, T, R>(s, args, &at, &x, [4, 4], &mut high);
                    } else {
                        first_half::<S, C, T, R>(s, &at, &x, &mut low);
                        second_half::<S, C, T, R>(s, &at, &x, &mut high);
                    }
                    let mut float = [[zero; R]; T];
                    for t in 0..T {
                        let scales = at[t].add((count - within) * C::LINES * LINE_BYTES);
                        let (scale_low, scale_high) = if C::WIDE {
                            let scales = scales.add(within * 2 * LINE_BYTES);
                            (s.load(scales.cast()), s.load(scales.add(LINE_BYTES).cast()))
                        } else {
                            let [low, high] = nvfp4_scales(s, scales, within);
                            (low, high)
                        };
                        at[t] = at[t].add(C::LINES * LINE_BYTES);
                        for r in 0..R {
                            float[t][r] = s.mul(s.to_f(low.acc[t][r]), scale_low);
                            float[t][r] = s.mul_add(s.to_f(high.acc[t][r]), scale_high, float[t][r]);
                        }
                    }
                    add_block::<S, T, R>(s, &row.scales, block, &float, &mut total);
                    block += 1;
                }
                for t in 0..T {
                    if C::WIDE {
                        at[t] = at[t].add(count * 2 * LINE_BYTES);
                    } else {
                        fetch_ahead::<S, T>(s, at[t]);
                        at[t] = at[t].add(layout.record_scale_bytes);
                    }
                }
            }
            leave_totals::<S, C, T, R>(s, args, 1.0 / E2M1_FACTOR, &total);
        }
    }
}
