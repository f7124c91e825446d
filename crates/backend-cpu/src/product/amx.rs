//! Expanded tiles times several 8-bit rows with the tile registers of AMX.
//!
//! One instruction multiplies 32 or 64 columns of a weight tile, those that share a scale of activations (lines of operands
//! are exactly what it wants), with up to 16 rows of activations. What it leaves are the integers that [`super::int8`] makes with dot products of
//! bytes; scales are applied to them by the same operations in the same order, so results are the same bits.
//!
//! Tile registers can only be read through memory, so sums of one or two records of columns, a step, go to a buffer in the
//! nearest cache. While the vector units scale the sums of one step, tile instructions make those of the next.
// Loops run over arrays of registers, several at once; iterators would hide vectors in closures.
#![allow(clippy::needless_range_loop)]

use crate::activations::{Across, Int8Layout};
use crate::layout::{BLOCK_COLS, LINE_BYTES, TILE_ROWS, TileLayout};
use crate::simd::amx::{Shape, configure};
use crate::simd::{Kernel, Simd};
use std::arch::asm;
use std::mem::MaybeUninit;

/// Activation rows of a tile register.
pub(super) const ROWS: usize = Across::ROWS;
/// Sums of a step, in tile registers, at most.
const MAX_TILES: usize = 4;
/// Bytes of an expanded block.
const WIDE_BLOCK_BYTES: usize = 8 * LINE_BYTES;

/// What to multiply.
pub(super) struct AmxArgs<'a> {
    pub(super) layout: &'a TileLayout,
    pub(super) int8: &'a Int8Layout,
    /// An expanded part of a tile.
    pub(super) part: *const u8,
    /// `num_rows` rows of codes, `stride_bytes` apart; rows up to a multiple of [`ROWS`] may be read as well.
    pub(super) rows: *const u8,
    pub(super) stride_bytes: usize,
    /// Their scales and sums.
    pub(super) across: Across,
    pub(super) num_rows: usize,
    /// The blocks that `part` holds, whole records.
    pub(super) first_block: usize,
    pub(super) end_block: usize,
    /// Multiplied with every output after the last block.
    pub(super) factor: f32,
    /// `[num_rows up to a multiple of ROWS][16]`: sums over the blocks before, unless `first_block` is 0.
    pub(super) out: *mut f32,
    /// Packed lines that the next call's tiles are expanded from, and how many.
    pub(super) next: *const u8,
    pub(super) next_lines: usize,
}

/// Sums of two steps: `[2][tiles][rows][16]` i32.
#[repr(align(64))]
struct RecordSums([MaybeUninit<i32>; 2 * MAX_TILES * ROWS * TILE_ROWS]);

/// Bytes of an expanded record of `blocks` blocks: a line of scales and one of offsets follow them.
const fn record_bytes(blocks: usize) -> usize {
    blocks * WIDE_BLOCK_BYTES + 2 * LINE_BYTES
}

/// One record and where its sums go.
pub(super) struct Record {
    /// Number of its first block in the row.
    block: usize,
    codes: *const u8,
    /// The scales of the rows for its first columns.
    x_scales: *const f32,
    sums: *mut i32,
    /// Numbers from one tile's sums to the next one's.
    pitch: usize,
}

impl Record {
    /// Sums of tile `tile` of row `row`.
    ///
    /// # Safety
    /// They are there.
    #[inline(always)]
    unsafe fn sums<S: Simd>(&self, s: S, tile: usize, row: usize) -> S::F {
        // SAFETY: the caller's promise.
        unsafe { s.to_f(s.load_i(self.sums.add(tile * self.pitch + row * TILE_ROWS).cast_const().cast())) }
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

/// Adds a record of `BLOCKS` blocks, `SCALE` of which share a scale of activations, to the totals of `R` rows, as
/// [`super::int8::Grouped`] does.
///
/// # Safety
/// The record's sums are there, and the numbers of the rows.
#[inline(always)]
unsafe fn add<S: Simd, const BLOCKS: usize, const SCALE: usize, const R: usize>(
    s: S,
    args: &AmxArgs<'_>,
    record: &Record,
    total: &mut [S::F; R],
) {
    // SAFETY: the caller's promise; two lines of scales follow the blocks of a record.
    unsafe {
        let scales = record.codes.add(BLOCKS * WIDE_BLOCK_BYTES).cast::<f32>();
        let (scale, offset) = (s.load(scales), s.load(scales.add(TILE_ROWS)));
        let x_sums = args.across.sum(args.int8, BLOCKS * BLOCK_COLS, record.block / BLOCKS);
        let stride = args.across.stride();
        each_row!(R, |row| {
            let mut part = s.splat(0.0);
            for tile in 0..BLOCKS / SCALE {
                let x_scale = s.splat(*record.x_scales.add(tile * stride + row));
                part = s.mul_add(record.sums::<S>(s, tile, row), x_scale, part);
            }
            total[row] = s.mul_add(part, scale, total[row]);
            total[row] = s.mul_add(offset, s.splat(*x_sums.add(row)), total[row]);
        });
    }
}

/// Rows `$x` (`$stride` bytes apart) times operands `$codes`, into register `$sums` through the others.
macro_rules! multiply_tile {
    ($sums:literal, $x_tile:literal, $operand:literal, $x:expr, $stride:expr, $codes:expr) => {
        asm!(
            concat!("tileloadd ", $operand, ", [{codes} + {line}]"),
            concat!("tileloadd ", $x_tile, ", [{x} + {stride}]"),
            concat!("tilezero ", $sums),
            // Affine codes are below 128, so they are signed numbers as well.
            concat!("tdpbssd ", $sums, ", ", $x_tile, ", ", $operand),
            codes = in(reg) $codes,
            x = in(reg) $x,
            stride = in(reg) $stride,
            line = in(reg) LINE_BYTES,
            options(nostack, preserves_flags)
        )
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

/// Sums of the record's blocks from `block` on that share a scale, into register `register` of four. `x`: the codes of the
/// first row.
///
/// # Safety
/// Registers have the shape for these rows and columns; the record exists.
#[inline(always)]
unsafe fn multiply(args: &AmxArgs<'_>, x: *const u8, record: &Record, block: usize, register: usize) {
    let x = x.wrapping_add((record.block + block) * BLOCK_COLS);
    let codes = record.codes.wrapping_add(block * WIDE_BLOCK_BYTES);
    let stride = args.stride_bytes;
    // SAFETY: the caller's promise; strides are those of rows and of lines. Nothing else touches tile registers.
    unsafe {
        match register {
            0 => multiply_tile!("tmm0", "tmm4", "tmm6", x, stride, codes),
            1 => multiply_tile!("tmm1", "tmm5", "tmm7", x, stride, codes),
            2 => multiply_tile!("tmm2", "tmm4", "tmm6", x, stride, codes),
            _ => multiply_tile!("tmm3", "tmm5", "tmm7", x, stride, codes),
        }
    }
}

/// Register `register` to the place of tile `tile` in the sums of a record.
///
/// # Safety
/// As [`multiply`].
#[inline(always)]
unsafe fn store(record: &Record, tile: usize, register: usize) {
    let to = record.sums.wrapping_add(tile * record.pitch);
    // SAFETY: the caller's promise.
    unsafe {
        match register {
            0 => store_tile!("tmm0", to),
            1 => store_tile!("tmm1", to),
            2 => store_tile!("tmm2", to),
            _ => store_tile!("tmm3", to),
        }
    }
}

/// `R` rows (those behind the last one of `args` are of no interest) from row `first_row` on, `RECORDS` records a step.
///
/// # Safety
/// As [`Amx`]; registers have the shape for `shape_rows` rows, at least `R`.
#[inline(always)]
unsafe fn multiply_rows<S: Simd, const BLOCKS: usize, const SCALE: usize, const RECORDS: usize, const R: usize>(
    s: S,
    args: &AmxArgs<'_>,
    first_row: usize,
    shape_rows: usize,
    sums: &mut RecordSums,
) {
    let out = args.out.wrapping_add(first_row * TILE_ROWS);
    let records = (args.end_block - args.first_block) / BLOCKS;
    let (whole_steps, first_row) = (records / RECORDS * RECORDS, Rows { first: first_row, shape: shape_rows });
    // SAFETY: the caller's promise; records below `records` are parts of the part.
    unsafe {
        let mut total = [s.splat(0.0); R];
        if args.first_block > 0 {
            each_row!(R, |row| total[row] = s.load(out.add(row * TILE_ROWS)));
        }
        if whole_steps > 0 {
            steps::<S, BLOCKS, SCALE, RECORDS, R>(s, args, &first_row, 0..whole_steps, sums, &mut total);
        }
        if whole_steps < records {
            steps::<S, BLOCKS, SCALE, 1, R>(s, args, &first_row, whole_steps..records, sums, &mut total);
        }
        let factor = s.splat(if args.end_block == args.layout.blocks { args.factor } else { 1.0 });
        each_row!(R, |row| s.store(s.mul(total[row], factor), out.add(row * TILE_ROWS)));
    }
}

/// Which rows a call multiplies, and for how many the registers have their shape.
struct Rows {
    first: usize,
    shape: usize,
}

/// Adds records `records` of the part, `RECORDS` a step, to `total`.
///
/// # Safety
/// As [`multiply_rows`]; there is a step, and no part of one.
#[inline(always)]
unsafe fn steps<S: Simd, const BLOCKS: usize, const SCALE: usize, const RECORDS: usize, const R: usize>(
    s: S,
    args: &AmxArgs<'_>,
    rows: &Rows,
    records: std::ops::Range<usize>,
    sums: &mut RecordSums,
    total: &mut [S::F; R],
) {
    let tiles = const { BLOCKS / SCALE };
    const { assert!(BLOCKS / SCALE * RECORDS <= MAX_TILES) };
    let sums = sums.0.as_mut_ptr().cast::<i32>();
    let pitch = rows.shape * TILE_ROWS;
    let x = args.rows.wrapping_add(rows.first * args.stride_bytes);
    let across = args.across.at_row(rows.first);
    let row_args = AmxArgs { across, ..*args };
    let record_at = |number: usize| {
        let block = args.first_block + number * BLOCKS;
        let sums = sums.wrapping_add(number % (2 * RECORDS) * tiles * pitch);
        let codes = args.part.wrapping_add(number * record_bytes(BLOCKS));
        Record { block, codes, x_scales: across.scale(block / SCALE), sums, pitch }
    };
    // Few at a time: the processor waits once more lines are on their way than it has room for.
    let all_records = (args.end_block - args.first_block) / BLOCKS;
    let next_lines = if rows.first == 0 { args.next_lines.div_ceil(all_records) * RECORDS } else { 0 };
    let mut number = records.start;
    // SAFETY: the caller's promise.
    unsafe {
        for i in 0..RECORDS {
            for tile in 0..tiles {
                multiply(args, x, &record_at(number + i), tile * SCALE, i * tiles + tile);
                store(&record_at(number + i), tile, i * tiles + tile);
            }
        }
        while number < records.end {
            for line in 0..next_lines {
                s.prefetch(args.next.wrapping_add((number / RECORDS * next_lines + line) * LINE_BYTES));
            }
            let next = number + RECORDS;
            if next < records.end {
                for i in 0..RECORDS {
                    for tile in 0..tiles {
                        multiply(args, x, &record_at(next + i), tile * SCALE, i * tiles + tile);
                    }
                }
            }
            for i in 0..RECORDS {
                add::<S, BLOCKS, SCALE, R>(s, &row_args, &record_at(number + i), total);
            }
            if next < records.end {
                for i in 0..RECORDS {
                    for tile in 0..tiles {
                        store(&record_at(next + i), tile, i * tiles + tile);
                    }
                }
            }
            number = next;
        }
    }
}

/// The kernel for one tile of affine codes with groups of `BLOCKS` blocks, `SCALE` of which share a scale of activations,
/// and any number of rows; `RECORDS` records a step. E2M1 has none: NVFP4's scales of 16 columns take an instruction each for
/// half the products, and a prompt was hardly faster.
pub(super) struct Amx<const BLOCKS: usize, const SCALE: usize, const RECORDS: usize>;

impl<const BLOCKS: usize, const SCALE: usize, const RECORDS: usize> Kernel for Amx<BLOCKS, SCALE, RECORDS> {
    type Args = AmxArgs<'static>;

    const BYTE_DOTS: bool = true;

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &AmxArgs<'static>) {
        let mut sums = RecordSums([MaybeUninit::uninit(); _]);
        let shape = Shape { rows: args.num_rows.next_multiple_of(4).min(ROWS), cols: SCALE * BLOCK_COLS };
        // SAFETY: `args` holds a part of a tile, rows and room for the outputs; only levels with tiles run this.
        unsafe {
            configure(shape);
            for first_row in (0..args.num_rows).step_by(ROWS) {
                match (args.num_rows - first_row).div_ceil(4) {
                    1 => multiply_rows::<S, BLOCKS, SCALE, RECORDS, 4>(s, args, first_row, shape.rows, &mut sums),
                    2 => multiply_rows::<S, BLOCKS, SCALE, RECORDS, 8>(s, args, first_row, shape.rows, &mut sums),
                    3 => multiply_rows::<S, BLOCKS, SCALE, RECORDS, 12>(s, args, first_row, shape.rows, &mut sums),
                    _ => multiply_rows::<S, BLOCKS, SCALE, RECORDS, 16>(s, args, first_row, shape.rows, &mut sums),
                }
            }
        }
    }
}
