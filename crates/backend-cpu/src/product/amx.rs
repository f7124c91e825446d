//! Expanded tiles times several 8-bit rows with the tile registers of AMX.
//!
//! One instruction multiplies a block of 32 columns of a weight tile (eight lines of operands are exactly what it wants)
//! with up to 16 rows of activations. What it leaves are the integers that [`super::int8`] makes with dot products of
//! bytes; scales are applied to them by the same operations in the same order, so results are the same bits.
//!
//! Tile registers can only be read through memory, so sums of a record of columns go to a buffer in the nearest cache, and
//! vector instructions scale them from there. Three records are on their way at any time: one is multiplied, the one before
//! is stored, the one before that is scaled. What a processor with tiles does (measured with loops of these instructions
//! alone, an Intel Xeon 6): a product takes as many cycles as it has rows; a store takes 16, overlaps with products of other
//! registers and not with its own; while tile instructions run, one port instead of two takes vector products and sums.
// Loops run over arrays of registers, several at once; iterators would hide vectors in closures.
#![allow(clippy::needless_range_loop)]

use super::expanded::STREAMS;
use crate::activations::{Across, Int8Layout};
use crate::layout::{BLOCK_COLS, LINE_BYTES, TILE_ROWS, TileLayout};
use crate::simd::amx::{Shape, configure};
use crate::simd::{Kernel, Simd};
use std::arch::asm;
use std::mem::MaybeUninit;

/// Activation rows of a tile register.
pub(super) const ROWS: usize = Across::ROWS;
/// Sums of a record, in tile registers, at most.
const MAX_TILES: usize = 4;
/// Bytes of an expanded block.
const WIDE_BLOCK_BYTES: usize = 8 * LINE_BYTES;

/// What to multiply.
pub(super) struct AmxArgs<'a> {
    pub(super) layout: &'a TileLayout,
    pub(super) int8: &'a Int8Layout,
    /// Expanded parts of `streams` tiles.
    pub(super) parts: [*const u8; STREAMS],
    pub(super) streams: usize,
    /// `num_rows` rows of codes, `stride_bytes` apart; rows up to a multiple of [`ROWS`] may be read as well.
    pub(super) rows: *const u8,
    pub(super) stride_bytes: usize,
    /// Their scales and sums.
    pub(super) across: Across,
    pub(super) num_rows: usize,
    /// The blocks that `parts` hold, whole records.
    pub(super) first_block: usize,
    pub(super) end_block: usize,
    /// Multiplied with every output after the last block.
    pub(super) factor: f32,
    /// `[streams][num_rows up to a multiple of ROWS][16]`: sums over the blocks before, unless `first_block` is 0.
    pub(super) out: *mut f32,
    /// Packed lines that the next call's parts are expanded from, of each tile, and how many.
    pub(super) next: [*const u8; STREAMS],
    pub(super) next_lines: usize,
}

/// Records whose sums are in memory at a time.
const RING: usize = 2;

/// Sums of some records: `[RING][blocks][rows][16]` i32.
#[repr(align(64))]
struct RecordSums([MaybeUninit<i32>; RING * MAX_TILES * ROWS * TILE_ROWS]);

/// Bytes of an expanded record of `blocks` blocks: a line of scales and one of offsets follow them.
const fn record_bytes(blocks: usize) -> usize {
    blocks * WIDE_BLOCK_BYTES + 2 * LINE_BYTES
}

/// One record and where its sums go.
pub(super) struct Record {
    /// Number of its first block in the row.
    block: usize,
    codes: *const u8,
    /// The scales of the rows for its first block.
    x_scales: *const f32,
    sums: *mut i32,
    /// Numbers from one block's sums to the next one's.
    pitch: usize,
}

impl Record {
    /// Sums of block `block` of row `row`.
    ///
    /// # Safety
    /// They are there.
    #[inline(always)]
    unsafe fn sums<S: Simd>(&self, s: S, block: usize, row: usize) -> S::F {
        // SAFETY: the caller's promise.
        unsafe { s.to_f(s.load_i(self.sums.add(block * self.pitch + row * TILE_ROWS).cast_const().cast())) }
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

/// Adds a record of `BLOCKS` blocks to the totals of `R` rows, as [`super::int8::Grouped`] does.
///
/// # Safety
/// The record's sums are there, and the numbers of the rows.
#[inline(always)]
unsafe fn add<S: Simd, const BLOCKS: usize, const R: usize>(
    s: S,
    int8: &Int8Layout,
    across: Across,
    record: &Record,
    total: &mut [S::F; R],
) {
    // SAFETY: the caller's promise; two lines of scales follow the blocks of a record.
    unsafe {
        let scales = record.codes.add(BLOCKS * WIDE_BLOCK_BYTES).cast::<f32>();
        let (scale, offset) = (s.load(scales), s.load(scales.add(TILE_ROWS)));
        let x_sums = across.sum(int8, BLOCKS * BLOCK_COLS, record.block / BLOCKS);
        let stride = across.stride();
        each_row!(R, |row| {
            let mut part = s.splat(0.0);
            for block in 0..BLOCKS {
                let x_scale = s.splat(*record.x_scales.add(block * stride + row));
                part = s.mul_add(record.sums::<S>(s, block, row), x_scale, part);
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

/// Sums of block `block` of the row, whose codes are `codes`, into register `register` of four. `x`: the first row's codes.
///
/// # Safety
/// Registers have the shape for these rows; the block exists.
#[inline(always)]
unsafe fn multiply(x: *const u8, stride: usize, codes: *const u8, register: usize) {
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

/// Register `register` to memory.
///
/// # Safety
/// There is room for its rows.
#[inline(always)]
unsafe fn store(to: *mut i32, register: usize) {
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

/// Which records of which rows and tiles come next: all records of a tile with up to [`ROWS`] rows, then those of the next
/// tile, then the next rows.
#[derive(Clone, Copy)]
struct Place {
    first_row: usize,
    stream: usize,
    /// Number of the record in its part.
    number: usize,
    /// How many came before.
    count: usize,
}

/// A call's work that does not change.
struct Call<'a> {
    args: &'a AmxArgs<'a>,
    /// Records of a part.
    records: usize,
    /// Rows of a tile register.
    shape_rows: usize,
    sums: *mut i32,
}

impl Call<'_> {
    /// Where the sums of record `count` of all go.
    #[inline(always)]
    fn sums<const BLOCKS: usize>(&self, count: usize) -> *mut i32 {
        self.sums.wrapping_add(count % RING * BLOCKS * self.shape_rows * TILE_ROWS)
    }

    /// The register of block `block` of record `count`: those of two records differ where there are enough.
    #[inline(always)]
    fn register<const BLOCKS: usize>(count: usize, block: usize) -> usize {
        (count * BLOCKS + block) % MAX_TILES
    }

    /// Multiplies the record at `place`, stores the one before, and moves on.
    ///
    /// # Safety
    /// As [`Amx`]; registers have the shape.
    #[inline(always)]
    unsafe fn multiply_and_store<S: Simd, const BLOCKS: usize>(&self, s: S, place: &mut Place) {
        let args = self.args;
        let Place { first_row, stream, number, count } = *place;
        let exists = first_row < args.num_rows;
        let block = args.first_block + number * BLOCKS;
        let x = args.rows.wrapping_add(first_row * args.stride_bytes + block * BLOCK_COLS);
        let codes = args.parts[stream].wrapping_add(number * record_bytes(BLOCKS));
        let before = self.sums::<BLOCKS>(count.wrapping_sub(1));
        let pitch = self.shape_rows * TILE_ROWS;
        // SAFETY: the caller's promise; the record before was multiplied in the call before.
        unsafe {
            for block in 0..BLOCKS {
                // With as many blocks as registers, the register is needed for the new sums.
                if BLOCKS == MAX_TILES && count > 0 {
                    store(before.wrapping_add(block * pitch), Self::register::<BLOCKS>(count.wrapping_sub(1), block));
                }
                if exists {
                    let codes = codes.wrapping_add(block * WIDE_BLOCK_BYTES);
                    let x = x.wrapping_add(block * BLOCK_COLS);
                    multiply(x, args.stride_bytes, codes, Self::register::<BLOCKS>(count, block));
                }
                if BLOCKS != MAX_TILES && count > 0 {
                    store(before.wrapping_add(block * pitch), Self::register::<BLOCKS>(count.wrapping_sub(1), block));
                }
            }
        }
        if exists {
            self.fetch::<S, BLOCKS>(s, *place);
        }
        place.count += 1;
        place.number += 1;
        if place.number == self.records {
            place.number = 0;
            place.stream += 1;
            if place.stream == args.streams {
                place.stream = 0;
                place.first_row += ROWS;
            }
        }
    }

    /// Fetches what comes after this part: packed lines of the tiles while the first rows are multiplied, and the rows that
    /// come next. Few at a time: the processor waits once more lines are on their way than it has room for.
    #[inline(always)]
    fn fetch<S: Simd, const BLOCKS: usize>(&self, s: S, place: Place) {
        let args = self.args;
        if place.first_row == 0 {
            let lines = args.next_lines.div_ceil(self.records);
            for line in 0..lines {
                s.prefetch(args.next[place.stream].wrapping_add((place.number * lines + line) * LINE_BYTES));
            }
        }
        if place.stream + 1 == args.streams {
            let cols = (args.first_block + place.number * BLOCKS) * BLOCK_COLS;
            let next = if place.first_row + ROWS < args.num_rows {
                (place.first_row + ROWS) * args.stride_bytes + cols
            } else {
                cols + (args.end_block - args.first_block) * BLOCK_COLS
            };
            for row in 0..self.shape_rows {
                let line = args.rows.wrapping_add(next + row * args.stride_bytes);
                s.prefetch(line);
                if BLOCKS > 2 {
                    s.prefetch(line.wrapping_add(LINE_BYTES));
                }
            }
        }
    }

    /// All records of tile `stream` with `R` rows (those behind the last one of `args` are of no interest) from row
    /// `first_row` on; `ahead` is two records ahead.
    ///
    /// # Safety
    /// As [`Amx`]; registers have the shape for at least `R` rows.
    #[inline(always)]
    unsafe fn multiply_rows<S: Simd, const BLOCKS: usize, const R: usize>(
        &self,
        s: S,
        ahead: &mut Place,
        first_row: usize,
        stream: usize,
    ) {
        let args = self.args;
        let across = args.across.at_row(first_row);
        let out = args.out.wrapping_add((stream * args.num_rows.next_multiple_of(ROWS) + first_row) * TILE_ROWS);
        // SAFETY: the caller's promise; records below `records` are parts of the part.
        unsafe {
            let mut total = [s.splat(0.0); R];
            if args.first_block > 0 {
                each_row!(R, |row| total[row] = s.load(out.add(row * TILE_ROWS)));
            }
            for number in 0..self.records {
                let count = ahead.count - AHEAD;
                self.multiply_and_store::<S, BLOCKS>(s, ahead);
                let block = args.first_block + number * BLOCKS;
                let record = Record {
                    block,
                    codes: args.parts[stream].wrapping_add(number * record_bytes(BLOCKS)),
                    x_scales: across.scale(block),
                    sums: self.sums::<BLOCKS>(count),
                    pitch: self.shape_rows * TILE_ROWS,
                };
                add::<S, BLOCKS, R>(s, args.int8, across, &record, &mut total);
            }
            if args.end_block == args.layout.blocks {
                let factor = s.splat(args.factor);
                each_row!(R, |row| s.store(s.mul(total[row], factor), out.add(row * TILE_ROWS)));
            } else {
                each_row!(R, |row| s.store(total[row], out.add(row * TILE_ROWS)));
            }
        }
    }
}

/// Records that are multiplied before the first one is scaled.
const AHEAD: usize = 2;

/// The kernel for tiles of affine codes with groups of `BLOCKS` blocks, and any number of rows. E2M1 has none: NVFP4's
/// scales of 16 columns take an instruction each for half the products, and a prompt was hardly faster.
pub(super) struct Amx<const BLOCKS: usize>;

impl<const BLOCKS: usize> Kernel for Amx<BLOCKS> {
    type Args = AmxArgs<'static>;

    const BYTE_DOTS: bool = true;

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &AmxArgs<'static>) {
        let mut sums = RecordSums([MaybeUninit::uninit(); _]);
        let shape = Shape { rows: args.num_rows.next_multiple_of(4).min(ROWS), cols: BLOCK_COLS };
        let call = Call {
            args,
            records: (args.end_block - args.first_block) / BLOCKS,
            shape_rows: shape.rows,
            sums: sums.0.as_mut_ptr().cast(),
        };
        let mut ahead = Place { first_row: 0, stream: 0, number: 0, count: 0 };
        // SAFETY: `args` holds parts of tiles, rows and room for the outputs; only levels with tiles run this.
        unsafe {
            configure(shape);
            for _ in 0..AHEAD {
                call.multiply_and_store::<S, BLOCKS>(s, &mut ahead);
            }
            for first_row in (0..args.num_rows).step_by(ROWS) {
                for stream in 0..args.streams {
                    let ahead = &mut ahead;
                    match (args.num_rows - first_row).div_ceil(4) {
                        1 => call.multiply_rows::<S, BLOCKS, 4>(s, ahead, first_row, stream),
                        2 => call.multiply_rows::<S, BLOCKS, 8>(s, ahead, first_row, stream),
                        3 => call.multiply_rows::<S, BLOCKS, 12>(s, ahead, first_row, stream),
                        _ => call.multiply_rows::<S, BLOCKS, 16>(s, ahead, first_row, stream),
                    }
                }
            }
        }
    }
}
