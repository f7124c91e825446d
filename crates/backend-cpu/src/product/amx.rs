//! Packed tiles times several 8-bit rows with the tile registers of AMX.
//!
//! One instruction multiplies the columns that share a scale, up to 64, of a weight tile (lines of operands are exactly what it
//! wants) with up to 16 rows of activations. What it leaves are the integers that [`super::int8`] makes with dot products of
//! bytes; scales are applied to them by the same operations in the same order, so results are the same bits.
//!
//! Codes are unpacked a step of two to four sums at a time into a buffer in the nearest cache, and tile registers can only be read
//! through memory, so sums go through another one. Three steps are on their way at once: while tile instructions make the sums of one,
//! vector instructions unpack the next and scale the sums of the one before. Unpacking 512 columns first and multiplying them then, the
//! design before, leaves memory idle in between: 16 rows took 1.3 times as long (scratch runs of `kernel_speed`).
// Loops run over arrays of registers, several at once; iterators would hide vectors in closures.
#![allow(clippy::needless_range_loop)]

use super::codes::{Codes, E2m1Signed};
use super::{load_e8m0, load_scales, nvfp4_scales};
use crate::activations::{Across, Int8Layout};
use crate::layout::{BLOCK_COLS, Coding, LINE_BYTES, TILE_ROWS, TileLayout};
use crate::simd::amx::{Shape, configure};
use crate::simd::{Kernel, Simd};
use std::arch::asm;
use std::marker::PhantomData;
use std::mem::MaybeUninit;

/// Activation rows of a tile register.
pub(super) const ROWS: usize = Across::ROWS;
/// Sums of a step, each in a tile register, at most.
const MAX_STEP: usize = 4;
/// Bytes of an unpacked block.
const WIDE_BLOCK_BYTES: usize = 8 * LINE_BYTES;
/// Unpacked blocks of a step, at most.
const STEP_BLOCKS: usize = 4;
/// How far ahead lines are fetched into the nearest cache, and into the next one.
const NEAR_BYTES: usize = 1024;
const FAR_BYTES: usize = 4096;

/// What to multiply.
pub(super) struct AmxArgs<'a> {
    pub(super) layout: &'a TileLayout,
    pub(super) int8: &'a Int8Layout,
    /// A packed tile.
    pub(super) tile: *const u8,
    /// `num_rows` rows of codes, `stride_bytes` apart; rows up to a multiple of [`ROWS`] may be read as well.
    pub(super) rows: *const u8,
    pub(super) stride_bytes: usize,
    /// Their scales and sums.
    pub(super) across: Across,
    pub(super) num_rows: usize,
    /// Multiplied with every output.
    pub(super) factor: f32,
    /// `[num_rows up to a multiple of ROWS][16]`
    pub(super) out: *mut f32,
}

/// Memory between the parts of a step: one after the other, so that their addresses differ in the last 12 bits. Where they do not, loads
/// wait for stores that have nothing to do with them.
#[repr(C, align(64))]
struct Buffers {
    operands: [MaybeUninit<u8>; STEP_BLOCKS * WIDE_BLOCK_BYTES],
    /// `[sums of a step][rows of a register][16]`
    sums: [MaybeUninit<i32>; MAX_STEP * ROWS * TILE_ROWS],
}

/// A family of formats: what a sum is of, and how it becomes a float.
pub(super) trait Family {
    /// The codes.
    type Operand: Codes;
    /// Whether operands are signed.
    const SIGNED: bool = false;
    /// Columns of a sum: 16, 32 or 64.
    const COLS: usize;
    /// Sums of a step: 2 or 4, those of whole records.
    const STEP: usize;
    /// Blocks of a record.
    const RECORD: usize;

    /// Adds the first `count` sums of a step to the totals of `R` rows.
    ///
    /// # Safety
    /// Everything about the step is there; `args` is as [`Amx`] wants it.
    unsafe fn add<S: Simd, const R: usize>(
        s: S,
        args: &AmxArgs<'_>,
        step: &Step,
        sums: Sums,
        count: usize,
        total: &mut [S::F; R],
    );
}

/// Where a step reads.
#[derive(Clone, Copy)]
pub(super) struct Step {
    /// Its records.
    records: *const u8,
    /// Bytes of one.
    record_bytes: usize,
    /// The codes of the first row.
    x: *const u8,
    /// The scales of the rows for its first columns, and the sums over them.
    x_scales: *const f32,
    x_sums: *const f32,
    /// Floats from a number of a row to the next.
    stride: usize,
}

impl Step {
    /// The next one.
    #[inline(always)]
    fn next<F: Family>(&self) -> Step {
        let cols = const { F::STEP * F::COLS };
        let records = const { F::STEP * F::COLS / (F::RECORD * BLOCK_COLS) };
        const { assert!((F::STEP * F::COLS).is_multiple_of(F::RECORD * BLOCK_COLS)) };
        // E2M1's two sums of 16 columns share a scale.
        let scales = const { if F::COLS < BLOCK_COLS { F::STEP * F::COLS / BLOCK_COLS } else { F::STEP } };
        Step {
            records: self.records.wrapping_add(records * self.record_bytes),
            x: self.x.wrapping_add(cols),
            x_scales: self.x_scales.wrapping_add(scales * self.stride),
            x_sums: self.x_sums.wrapping_add(records * self.stride),
            ..*self
        }
    }
}

/// `$body` for each of rows 0 to `$rows - 1`, at most 16, as so many statements: totals of a loop would be in memory.
macro_rules! each_row {
    ($rows:ident, |$row:ident| $body:expr) => {
        each_row!(@ $rows, $row, $body, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15)
    };
    (@ $rows:ident, $row:ident, $body:expr, $($number:literal)+) => {
        $(
            if $number < $rows {
                let $row: usize = $number;
                $body
            }
        )+
    };
}

/// Where the sums of a step are.
#[derive(Clone, Copy)]
pub(super) struct Sums {
    first: *mut i32,
    /// Numbers from those of a tile register to those of the next.
    pitch: usize,
}

impl Sums {
    /// Row `row` of sum `number` of the step.
    ///
    /// # Safety
    /// It is there.
    #[inline(always)]
    unsafe fn float<S: Simd>(&self, s: S, number: usize, row: usize) -> S::F {
        // SAFETY: the caller's promise.
        unsafe { s.to_f(s.load_i(self.first.add(number * self.pitch + row * TILE_ROWS).cast_const().cast())) }
    }
}

/// [`super::int8::Grouped`] with groups of `GROUP` blocks, `SCALE` of which share a scale of activations.
pub(super) struct Grouped<C, const GROUP: usize, const SCALE: usize>(PhantomData<C>);
/// [`super::int8::Mxfp4`]
pub(super) struct Mxfp4;
/// [`super::int8::Nvfp4`]
pub(super) struct Nvfp4;

impl<C: Codes, const GROUP: usize, const SCALE: usize> Family for Grouped<C, GROUP, SCALE> {
    type Operand = C;
    const COLS: usize = SCALE * BLOCK_COLS;
    const STEP: usize = 2;
    const RECORD: usize = GROUP;

    #[inline(always)]
    unsafe fn add<S: Simd, const R: usize>(
        s: S,
        args: &AmxArgs<'_>,
        step: &Step,
        sums: Sums,
        count: usize,
        total: &mut [S::F; R],
    ) {
        let each = const { GROUP / SCALE };
        let dtype = args.layout.scale_dtype;
        for group in 0..count / each {
            // SAFETY: the caller's promise; groups are whole, their scales follow their codes.
            unsafe {
                let at = step.records.add(group * step.record_bytes + GROUP * C::LINES * LINE_BYTES);
                let scale = load_scales(s, dtype, at);
                let offset = load_scales(s, dtype, at.add(TILE_ROWS * dtype.size_bytes()));
                let x_scales = step.x_scales.add(group * each * step.stride);
                let x_sums = step.x_sums.add(group * step.stride);
                each_row!(R, |row| {
                    let mut part = s.splat(0.0);
                    for i in 0..each {
                        let x_scale = s.splat(*x_scales.add(i * step.stride + row));
                        part = s.mul_add(sums.float(s, group * each + i, row), x_scale, part);
                    }
                    total[row] = s.mul_add(part, scale, total[row]);
                    total[row] = s.mul_add(offset, s.splat(*x_sums.add(row)), total[row]);
                });
            }
        }
    }
}

impl Family for Mxfp4 {
    type Operand = E2m1Signed;
    const SIGNED: bool = true;
    const COLS: usize = BLOCK_COLS;
    const STEP: usize = 4;
    const RECORD: usize = 4;

    #[inline(always)]
    unsafe fn add<S: Simd, const R: usize>(
        s: S,
        _args: &AmxArgs<'_>,
        step: &Step,
        sums: Sums,
        count: usize,
        total: &mut [S::F; R],
    ) {
        // SAFETY: the caller's promise; scales follow the codes, of which the last record may have fewer.
        unsafe {
            let scales = step.records.add(count * E2m1Signed::LINES * LINE_BYTES);
            for block in 0..count {
                let scale = load_e8m0(s, scales.add(block * TILE_ROWS));
                let x_scales = step.x_scales.add(block * step.stride);
                each_row!(R, |row| {
                    let float = s.mul(sums.float(s, block, row), scale);
                    total[row] = s.mul_add(float, s.splat(*x_scales.add(row)), total[row]);
                });
            }
        }
    }
}

impl Family for Nvfp4 {
    type Operand = E2m1Signed;
    const SIGNED: bool = true;
    const COLS: usize = BLOCK_COLS / 2;
    const STEP: usize = 4;
    const RECORD: usize = 2;

    #[inline(always)]
    unsafe fn add<S: Simd, const R: usize>(
        s: S,
        _args: &AmxArgs<'_>,
        step: &Step,
        sums: Sums,
        count: usize,
        total: &mut [S::F; R],
    ) {
        // SAFETY: as in `Mxfp4`.
        unsafe {
            let scales = step.records.add(count / 2 * E2m1Signed::LINES * LINE_BYTES);
            for block in 0..count / 2 {
                let [low, high] = nvfp4_scales(s, scales, block);
                let x_scales = step.x_scales.add(block * step.stride);
                each_row!(R, |row| {
                    let mut float = s.mul(sums.float(s, 2 * block, row), low);
                    float = s.mul_add(sums.float(s, 2 * block + 1, row), high, float);
                    total[row] = s.mul_add(float, s.splat(*x_scales.add(row)), total[row]);
                });
            }
        }
    }
}

/// Rows `$x` (`$stride` bytes apart) times operands `$codes` by `$instruction`, into register `$sums` through the others.
macro_rules! multiply_tile {
    ($instruction:literal, $sums:literal, $x_tile:literal, $operand:literal, $x:expr, $stride:expr, $codes:expr) => {
        asm!(
            // First what is there: tiles are loaded in this order, and operands wait for the stores that made them.
            concat!("tileloadd ", $x_tile, ", [{x} + {stride}]"),
            concat!("tileloadd ", $operand, ", [{codes} + {line}]"),
            concat!("tilezero ", $sums),
            concat!($instruction, " ", $sums, ", ", $x_tile, ", ", $operand),
            codes = in(reg) $codes,
            x = in(reg) $x,
            stride = in(reg) $stride,
            line = in(reg) LINE_BYTES,
            options(nostack, preserves_flags)
        )
    };
}

/// [`multiply_tile`] of signed activations with codes that are `$signed` or not.
macro_rules! multiply_codes {
    ($signed:expr, $($rest:tt)*) => {
        if $signed {
            multiply_tile!("tdpbssd", $($rest)*)
        } else {
            multiply_tile!("tdpbsud", $($rest)*)
        }
    };
}

/// A register of sums to memory.
macro_rules! store_tile {
    ($sums:literal, $to:expr) => {
        asm!(
            concat!("tilestored [{to} + {line}], ", $sums),
            to = in(reg) $to,
            line = in(reg) LINE_BYTES,
            options(nostack, preserves_flags)
        )
    };
}

/// How far ahead a pass over a tile fetches.
#[derive(Clone, Copy)]
struct Ahead {
    near: usize,
    far: usize,
}

/// The eight operands of the block at `block`, which the next products read.
///
/// # Safety
/// `block` is a block, `to` has room for eight lines.
#[inline(always)]
unsafe fn unpack_block<S: Simd, C: Codes>(s: S, block: *const u8, ahead: Ahead, to: *mut u8) {
    macro_rules! store {
        ($($m:literal)+) => {
            $(
                if $m < C::LINES {
                    fetch(s, block.wrapping_add($m * LINE_BYTES), ahead);
                }
                s.store(s.cast_to_f(C::operand::<S, $m>(s, block)), to.add($m * LINE_BYTES).cast());
            )+
        };
    }
    // SAFETY: the caller's promise.
    unsafe {
        store!(0 1 2 3 4 5 6 7);
    }
}

#[inline(always)]
fn fetch<S: Simd>(s: S, at: *const u8, ahead: Ahead) {
    s.prefetch(at.wrapping_add(ahead.near));
    s.prefetch_far(at.wrapping_add(ahead.far));
}

/// A pass over a tile for up to [`ROWS`] rows.
struct Pass<'a, 'b> {
    args: &'a AmxArgs<'b>,
    ahead: Ahead,
    operands: *mut u8,
    sums: Sums,
}

impl Pass<'_, '_> {
    /// Unpacks the first `count` sums' columns of a step.
    ///
    /// # Safety
    /// They are there.
    #[inline(always)]
    unsafe fn unpack<S: Simd, F: Family>(&self, s: S, step: &Step, count: usize) {
        const { assert!(F::STEP * F::COLS <= STEP_BLOCKS * BLOCK_COLS) };
        for i in 0..const { F::STEP * F::COLS / BLOCK_COLS } {
            if i * BLOCK_COLS >= count * F::COLS {
                return;
            }
            let within = i % F::RECORD * F::Operand::LINES * LINE_BYTES;
            let from = step.records.wrapping_add(i / F::RECORD * step.record_bytes + within);
            // SAFETY: the caller's promise.
            unsafe { unpack_block::<S, F::Operand>(s, from, self.ahead, self.operands.add(i * WIDE_BLOCK_BYTES)) };
            if (i + 1).is_multiple_of(F::RECORD) {
                // Its scales.
                fetch(s, from.wrapping_add(F::Operand::LINES * LINE_BYTES), self.ahead);
            }
        }
    }

    /// Multiplies the operands of a step with the rows.
    ///
    /// # Safety
    /// They were unpacked; registers have their shape.
    #[inline(always)]
    unsafe fn multiply<F: Family>(&self, step: &Step, count: usize) {
        let stride = self.args.stride_bytes;
        let operand_bytes = const { F::COLS / 4 * LINE_BYTES };
        let x = |i: usize| step.x.wrapping_add(i * F::COLS);
        let operands = |i: usize| self.operands.wrapping_add(i * operand_bytes);
        // SAFETY: the caller's promise; strides are those of rows and of lines. Nothing else touches tile registers.
        unsafe {
            multiply_codes!(F::SIGNED, "tmm0", "tmm4", "tmm6", x(0), stride, operands(0));
            if count > 1 {
                multiply_codes!(F::SIGNED, "tmm1", "tmm5", "tmm7", x(1), stride, operands(1));
            }
            if F::STEP > 2 && count > 2 {
                multiply_codes!(F::SIGNED, "tmm2", "tmm4", "tmm6", x(2), stride, operands(2));
            }
            if F::STEP > 2 && count > 3 {
                multiply_codes!(F::SIGNED, "tmm3", "tmm5", "tmm7", x(3), stride, operands(3));
            }
        }
    }

    /// Stores the sums of a step.
    ///
    /// # Safety
    /// As [`Pass::multiply`], which came before.
    #[inline(always)]
    unsafe fn store<F: Family>(&self, count: usize) {
        let to = |i: usize| self.sums.first.wrapping_add(i * self.sums.pitch);
        // SAFETY: the caller's promise.
        unsafe {
            store_tile!("tmm0", to(0));
            if count > 1 {
                store_tile!("tmm1", to(1));
            }
            if F::STEP > 2 && count > 2 {
                store_tile!("tmm2", to(2));
            }
            if F::STEP > 2 && count > 3 {
                store_tile!("tmm3", to(3));
            }
        }
    }

    /// All of the tile, from step `first` on: results to `out`.
    ///
    /// # Safety
    /// As [`Amx`].
    #[inline(always)]
    unsafe fn run<S: Simd, F: Family, const R: usize>(&self, s: S, first: Step, out: *mut f32) {
        let sums = self.args.layout.padded_cols() / F::COLS;
        let (steps, rest) = (sums / F::STEP, sums % F::STEP);
        // SAFETY: the caller's promise. A buffer is written again only after the instructions that read it.
        unsafe {
            let mut total = [s.splat(0.0); R];
            let (mut before, mut step) = (first, first);
            if steps > 0 {
                self.unpack::<S, F>(s, &step, F::STEP);
            }
            for number in 0..steps {
                let next = step.next::<F>();
                self.multiply::<F>(&step, F::STEP);
                if number + 1 < steps {
                    self.unpack::<S, F>(s, &next, F::STEP);
                }
                if number > 0 {
                    F::add::<S, R>(s, self.args, &before, self.sums, F::STEP, &mut total);
                }
                self.store::<F>(F::STEP);
                (before, step) = (step, next);
            }
            if steps > 0 {
                F::add::<S, R>(s, self.args, &before, self.sums, F::STEP, &mut total);
            }
            if rest > 0 {
                self.unpack::<S, F>(s, &step, rest);
                self.multiply::<F>(&step, rest);
                self.store::<F>(rest);
                F::add::<S, R>(s, self.args, &step, self.sums, rest, &mut total);
            }
            let factor = s.splat(self.args.factor);
            each_row!(R, |row| s.store(s.mul(total[row], factor), out.add(row * TILE_ROWS)));
        }
    }
}

/// The kernel for one tile of a family and any number of rows, [`ROWS`] at a time.
pub(super) struct Amx<F>(PhantomData<F>);

impl<F: Family> Kernel for Amx<F> {
    type Args = AmxArgs<'static>;

    const BYTE_DOTS: bool = true;
    const LOOKS_UP: bool = F::Operand::LOOKS_UP;

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &AmxArgs<'static>) {
        let mut buffers = MaybeUninit::<Buffers>::uninit();
        let buffers = buffers.as_mut_ptr();
        let shape = Shape { rows: args.num_rows.next_multiple_of(4).min(ROWS), cols: F::COLS };
        // SAFETY: `args` holds a tile, rows and room for the outputs; only levels with tiles run this.
        unsafe {
            configure(shape);
            let layout = args.layout;
            let record_bytes = F::RECORD * F::Operand::LINES * LINE_BYTES + layout.record_scale_bytes;
            let has_sums = matches!(layout.coding, Coding::Affine { .. });
            for first_row in (0..args.num_rows).step_by(ROWS) {
                let across = args.across.at_row(first_row);
                let first = Step {
                    records: args.tile,
                    record_bytes,
                    x: args.rows.wrapping_add(first_row * args.stride_bytes),
                    x_scales: across.scale(0),
                    x_sums: if has_sums { across.sum(args.int8, F::RECORD * BLOCK_COLS, 0) } else { across.scale(0) },
                    stride: across.stride(),
                };
                let is_first = first_row == 0;
                let pass = Pass {
                    args,
                    // Later passes find the tile in a cache, and have the next one come to it.
                    ahead: Ahead { near: NEAR_BYTES, far: if is_first { FAR_BYTES } else { layout.tile_bytes } },
                    operands: (&raw mut (*buffers).operands).cast(),
                    sums: Sums { first: (&raw mut (*buffers).sums).cast(), pitch: shape.rows * TILE_ROWS },
                };
                let out = args.out.wrapping_add(first_row * TILE_ROWS);
                match (args.num_rows - first_row).div_ceil(4) {
                    1 => pass.run::<S, F, 4>(s, first, out),
                    2 => pass.run::<S, F, 8>(s, first, out),
                    3 => pass.run::<S, F, 12>(s, first, out),
                    _ => pass.run::<S, F, 16>(s, first, out),
                }
            }
        }
    }
}
