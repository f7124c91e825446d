//! Expanded tiles times many 8-bit rows with the tile registers of AMX.
//!
//! One instruction multiplies a block of 32 columns of a weight tile (eight lines of operands are exactly what it wants)
//! with up to 16 rows of activations. What it leaves are the integers that [`super::int8`] makes with dot products of
//! bytes; scales are applied to them by the same operations in the same order, so results are the same bits.
//!
//! Tile registers can only be read through memory, so sums of a group of columns go to a buffer in the nearest cache.
//! While the vector units scale the sums of one group, tile instructions make those of the next. Both groups
//! together stay within 4 KiB (but for groups of 128): a load waits for every older store whose address ends in the same
//! 12 bits, and stores of tiles take long.
// Loops run over arrays of registers, several at once; iterators would hide vectors in closures.
#![allow(clippy::needless_range_loop)]

use crate::activations::Int8Layout;
use crate::layout::{BLOCK_COLS, LINE_BYTES, TILE_ROWS, TileLayout};
use crate::simd::amx::{TileConfig, release};
use crate::simd::{Kernel, Simd};
use std::arch::asm;
use std::mem::MaybeUninit;
use std::ops::Range;

/// Activation rows of a tile register.
const ROWS: usize = 16;
/// Sums in memory at a time, in tile registers: those of two chunks, four blocks each at most.
const MAX_TILES: usize = 8;
/// Bytes of an expanded block.
const WIDE_BLOCK_BYTES: usize = 8 * LINE_BYTES;

/// What to multiply.
pub(super) struct AmxArgs<'a> {
    pub(super) layout: &'a TileLayout,
    pub(super) int8: &'a Int8Layout,
    /// An expanded part of a tile.
    pub(super) part: *const u8,
    /// `num_rows` 8-bit rows, `stride_bytes` apart.
    pub(super) rows: *const u8,
    pub(super) stride_bytes: usize,
    pub(super) num_rows: usize,
    /// The blocks that `part` holds, whole records.
    pub(super) first_block: usize,
    pub(super) end_block: usize,
    /// Multiplied with every output after the last block.
    pub(super) factor: f32,
    /// `[num_rows][16]`: sums over the blocks before, unless `first_block` is 0.
    pub(super) out: *mut f32,
}

/// The kernel for affine codes with groups of `BLOCKS` blocks. E2M1 has none: its sums need more work than dot products
/// of bytes save here (NVFP4 was 8 % slower this way).
pub(super) struct Amx<const BLOCKS: usize>;

/// Sums of two chunks: `[2][blocks][ROWS][16]` i32.
#[repr(align(64))]
struct ChunkSums([MaybeUninit<i32>; MAX_TILES * ROWS * TILE_ROWS]);

/// A chunk: the blocks of a group, and their sums.
struct Chunk {
    /// Number of the first block in the row.
    block: usize,
    /// Whether it is in the part at all.
    exists: bool,
    codes: *const u8,
    sums: *mut i32,
}

impl Chunk {
    /// The sums of row `row` over block `block`.
    #[inline(always)]
    fn sums(&self, block: usize, row: usize) -> *const u8 {
        self.sums.wrapping_add((block * ROWS + row) * TILE_ROWS).cast_const().cast()
    }
}

/// Adds a chunk, which is a group, to the totals of rows `rows` of those that start at row `first_row`.
///
/// # Safety
/// The chunk's sums are there; `args` is whole.
#[inline(always)]
unsafe fn add<S: Simd, const BLOCKS: usize>(
    s: S,
    args: &AmxArgs<'_>,
    chunk: &Chunk,
    first_row: usize,
    rows: Range<usize>,
) {
    // SAFETY: two lines of scales follow the blocks of every group; rows hold all blocks, and `out` all rows.
    unsafe {
        let scales = chunk.codes.add(BLOCKS * WIDE_BLOCK_BYTES).cast::<f32>();
        let (scale, offset) = (s.load(scales), s.load(scales.add(TILE_ROWS)));
        let x = args.rows.add(first_row * args.stride_bytes);
        let x_scales = x.add(args.int8.scales + 4 * chunk.block);
        let sums = x.add(args.int8.sums_of_group(BLOCKS * BLOCK_COLS) + chunk.block / BLOCKS * 4);
        for row in rows {
            let (x_scales, sum) = (x_scales.add(row * args.stride_bytes), sums.add(row * args.stride_bytes));
            let mut part = s.splat(0.0);
            for block in 0..BLOCKS {
                let x_scale = s.splat(*x_scales.cast::<f32>().add(block));
                part = s.mul_add(s.to_f(s.load_i(chunk.sums(block, row))), x_scale, part);
            }
            let out = args.out.add((first_row + row) * TILE_ROWS);
            let total = s.mul_add(part, scale, s.load(out));
            s.store(s.mul_add(offset, s.splat(*sum.cast::<f32>()), total), out);
        }
    }
}

/// Sums of a block: rows `$x` (`$stride` bytes apart) times operands `$codes`, to `$sums`, through the registers named.
macro_rules! multiply_tile {
    ($sum:literal, $x_tile:literal, $operand:literal, $x:expr, $stride:expr, $codes:expr, $sums:expr) => {
        asm!(
            concat!("tileloadd ", $operand, ", [{codes} + {line}]"),
            concat!("tileloadd ", $x_tile, ", [{x} + {stride}]"),
            concat!("tilezero ", $sum),
            // Signed activations times unsigned codes.
            concat!("tdpbsud ", $sum, ", ", $x_tile, ", ", $operand),
            concat!("tilestored [{sums} + {line}], ", $sum),
            codes = in(reg) $codes,
            x = in(reg) $x,
            stride = in(reg) $stride,
            sums = in(reg) $sums,
            line = in(reg) LINE_BYTES,
            options(nostack, preserves_flags)
        )
    };
}

/// Sums of block `block` of a chunk: the rows of the configuration, from `x` on. `register`: which of four takes the sums;
/// it is free again only when they are stored, so the next blocks take others.
///
/// # Safety
/// Tiles are configured as [`configure`] does; the block and its place in the sums exist.
#[inline(always)]
unsafe fn multiply_block(args: &AmxArgs<'_>, x: *const u8, chunk: &Chunk, block: usize, register: usize) {
    let x = x.wrapping_add((chunk.block + block) * BLOCK_COLS);
    let codes = chunk.codes.wrapping_add(block * WIDE_BLOCK_BYTES);
    let (stride, sums) = (args.stride_bytes, chunk.sums(block, 0));
    // SAFETY: the caller's promise; strides are those of rows and of lines. Nothing else touches tile registers.
    unsafe {
        match register {
            0 => multiply_tile!("tmm0", "tmm4", "tmm6", x, stride, codes, sums),
            1 => multiply_tile!("tmm1", "tmm5", "tmm7", x, stride, codes, sums),
            2 => multiply_tile!("tmm2", "tmm4", "tmm6", x, stride, codes, sums),
            _ => multiply_tile!("tmm3", "tmm5", "tmm7", x, stride, codes, sums),
        }
    }
}

/// Shapes the registers: four of sums, two of activations of `rows` rows, two of operands.
///
/// # Safety
/// The level has tiles.
#[inline(always)]
unsafe fn configure(rows: usize) {
    let (sums, x, operands) = ((rows, LINE_BYTES), (rows, BLOCK_COLS), (BLOCK_COLS / 4, LINE_BYTES));
    // SAFETY: the caller's promise.
    unsafe { TileConfig::new([sums, sums, sums, sums, x, x, operands, operands]).load() }
}

/// Makes the sums of chunk `next` with the registers from `register` on, and adds those of `chunk` to the totals, by turns.
///
/// # Safety
/// As [`Amx`]; the sums of `chunk` were made.
#[inline(always)]
unsafe fn add_and_multiply<S: Simd, const BLOCKS: usize>(
    s: S,
    args: &AmxArgs<'_>,
    [chunk, next]: [&Chunk; 2],
    first_row: usize,
    register: usize,
) {
    let rows = (args.num_rows - first_row).min(ROWS);
    let rows_at_a_time = rows.div_ceil(BLOCKS);
    let x = args.rows.wrapping_add(first_row * args.stride_bytes);
    for block in 0..BLOCKS {
        let part = (block * rows_at_a_time).min(rows)..((block + 1) * rows_at_a_time).min(rows);
        // SAFETY: the caller's promise.
        unsafe {
            if next.exists {
                multiply_block(args, x, next, block, (register + block) % 4);
            }
            add::<S, BLOCKS>(s, args, chunk, first_row, part);
        }
    }
}

/// Up to 16 rows from `first_row` on.
///
/// # Safety
/// As [`Amx`].
#[inline(always)]
unsafe fn multiply_group<S: Simd, const BLOCKS: usize>(
    s: S,
    args: &AmxArgs<'_>,
    first_row: usize,
    sums: &mut ChunkSums,
) {
    let sums = sums.0.as_mut_ptr().cast::<i32>();
    let chunk_at = |block: usize| {
        let group = (block - args.first_block) / BLOCKS;
        let codes = args.part.wrapping_add(group * (BLOCKS * WIDE_BLOCK_BYTES + 2 * LINE_BYTES));
        let sums = sums.wrapping_add(group % 2 * BLOCKS * ROWS * TILE_ROWS);
        Chunk { block, exists: block < args.end_block, codes, sums }
    };
    let x = args.rows.wrapping_add(first_row * args.stride_bytes);
    let mut even = chunk_at(args.first_block);
    // SAFETY: the caller's promise; chunks that exist are parts of the part.
    unsafe {
        for block in 0..BLOCKS {
            multiply_block(args, x, &even, block, block);
        }
        while even.exists {
            let odd = chunk_at(even.block + BLOCKS);
            add_and_multiply::<S, BLOCKS>(s, args, [&even, &odd], first_row, 2);
            if !odd.exists {
                break;
            }
            even = chunk_at(odd.block + BLOCKS);
            add_and_multiply::<S, BLOCKS>(s, args, [&odd, &even], first_row, 0);
        }
    }
}

impl<const BLOCKS: usize> Kernel for Amx<BLOCKS> {
    type Args = AmxArgs<'static>;

    const BYTE_DOTS: bool = true;

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &AmxArgs<'static>) {
        let mut sums = ChunkSums([MaybeUninit::uninit(); _]);
        // SAFETY: `args` holds a part of a tile, rows and room for the outputs; only levels with tiles run this.
        unsafe {
            if args.first_block == 0 {
                for row in 0..args.num_rows {
                    s.store(s.splat(0.0), args.out.add(row * TILE_ROWS));
                }
            }
            let mut configured = 0;
            for first_row in (0..args.num_rows).step_by(ROWS) {
                let rows = (args.num_rows - first_row).min(ROWS);
                if rows != configured {
                    configure(rows);
                    configured = rows;
                }
                multiply_group::<S, BLOCKS>(s, args, first_row, &mut sums);
            }
            release();
            if args.end_block == args.layout.blocks {
                let factor = s.splat(args.factor);
                for row in 0..args.num_rows {
                    let out = args.out.add(row * TILE_ROWS);
                    s.store(s.mul(s.load(out), factor), out);
                }
            }
        }
    }
}
