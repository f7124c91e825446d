//! Activations as kernels read them: rows of f32 padded to whole blocks, or rows of 8-bit integers with their scales.
//!
//! An 8-bit row is made once and read by every tile of every weight that shares it. Per 32 columns it has one f32 scale
//! (`amax / 127`), so outliers spoil only their own group. Everything about a row depends on that row alone.
//!
//! `unsafe`: SIMD kernels over raw rows.
#![allow(unsafe_code)]

use crate::layout::BLOCK_COLS;
use crate::simd::math::abs;
use crate::simd::{Kernel, Level, Simd};

/// The parts of one 8-bit row, as byte offsets from its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Int8Layout {
    /// Columns of the activations.
    pub(crate) cols: usize,
    /// Blocks of 32 columns, the last one padded with zeros. The codes stand at offset 0, one byte each.
    pub(crate) blocks: usize,
    /// `[blocks]` f32: what a code of the block is worth.
    pub(crate) scales: usize,
    /// Sums of the (rounded) activations over 32, 64 and 128 columns, f32: what offsets of affine groups are
    /// multiplied with. Three arrays of `[blocks]`, `[blocks / 2]` and `[blocks / 4]`, rounded up.
    pub(crate) sums: [usize; 3],
    /// `[2 * blocks]` i32: -12 times the sum of the codes of 16 columns. E2M1 weights are looked up as `2 value + 12`,
    /// unsigned; a sum that starts here ends as if they were signed.
    pub(crate) e2m1_starts_16: usize,
    /// `[blocks]` i32: the same for 32 columns.
    pub(crate) e2m1_starts_32: usize,
    /// Bytes of a row, whole lines.
    pub(crate) row_bytes: usize,
}

impl Int8Layout {
    /// The layout of rows of `cols` columns.
    pub(crate) fn new(cols: usize) -> Self {
        let blocks = cols.div_ceil(BLOCK_COLS);
        let scales = blocks * BLOCK_COLS;
        let sums_32 = scales + 4 * blocks;
        let sums_64 = sums_32 + 4 * blocks;
        let sums_128 = sums_64 + 4 * blocks.div_ceil(2);
        let e2m1_starts_16 = sums_128 + 4 * blocks.div_ceil(4);
        let e2m1_starts_32 = e2m1_starts_16 + 8 * blocks;
        let row_bytes = (e2m1_starts_32 + 4 * blocks).next_multiple_of(64);
        Int8Layout {
            cols,
            blocks,
            scales,
            sums: [sums_32, sums_64, sums_128],
            e2m1_starts_16,
            e2m1_starts_32,
            row_bytes,
        }
    }

    /// Where the sums over `group` columns (32, 64 or 128) start.
    pub(crate) fn sums_of_group(&self, group: usize) -> usize {
        self.sums[match group {
            32 => 0,
            64 => 1,
            128 => 2,
            other => unreachable!("affine groups are 32, 64 or 128, not {other}: WeightFormat::validate"),
        }]
    }
}

/// Rounds columns of one row to 8 bits.
pub(crate) struct RoundToInt8 {
    /// The f32 row, `[cols]`.
    x: *const f32,
    /// The 8-bit row.
    row: *mut u8,
    layout: Int8Layout,
    /// Multiples of four: sums over 128 columns belong to one call.
    first_block: usize,
    end_block: usize,
}

/// Rounds blocks `first_block..end_block` of `x` into the 8-bit row `row`; several threads may fill parts of one row.
///
/// # Safety
/// `x` holds `layout.cols` floats and `row` `layout.row_bytes` bytes; no other thread touches the parts of these blocks.
///
/// # Panics
/// If the range splits 128 columns or leaves the row.
pub(crate) unsafe fn round_part_to_int8(
    level: Level,
    x: *const f32,
    row: *mut u8,
    layout: Int8Layout,
    [first_block, end_block]: [usize; 2],
) {
    assert!(first_block.is_multiple_of(4), "blocks {first_block}..{end_block} split 128 columns");
    assert!(
        end_block.is_multiple_of(4) || end_block == layout.blocks,
        "blocks {first_block}..{end_block} split 128 columns"
    );
    assert!(end_block <= layout.blocks, "blocks {first_block}..{end_block} of {}", layout.blocks);
    // SAFETY: the blocks are inside the row; the rest is the caller's promise.
    unsafe { level.call::<RoundToInt8>(&RoundToInt8 { x, row, layout, first_block, end_block }) }
}

impl Kernel for RoundToInt8 {
    type Args = Self;

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &Self) {
        let layout = &args.layout;
        // SAFETY: every index below is a block (or half block, or pair or four of blocks) of the row, and the row holds
        // them by the layout; `x` holds `cols` floats.
        unsafe {
            let scales = args.row.add(layout.scales).cast::<f32>();
            let sums = [0, 1, 2].map(|i| args.row.add(layout.sums[i]).cast::<f32>());
            let starts_16 = args.row.add(layout.e2m1_starts_16).cast::<i32>();
            let starts_32 = args.row.add(layout.e2m1_starts_32).cast::<i32>();
            for block in args.first_block..args.end_block {
                let first = block * BLOCK_COLS;
                let (low, high) = if first + BLOCK_COLS <= layout.cols {
                    (s.load(args.x.add(first)), s.load(args.x.add(first + 16)))
                } else {
                    let left = layout.cols - first;
                    let low = s.load_partial(args.x.add(first), left.min(16));
                    let high = if left > 16 { s.load_partial(args.x.add(first + 16), left - 16) } else { s.splat(0.0) };
                    (low, high)
                };
                let largest = s.max_lane(s.max(abs(s, low), abs(s, high)));
                // Infinities and NaN give NaN here (and zero otherwise), and a scale of NaN gives outputs of NaN.
                let zero = s.splat(0.0);
                let poison = s.sum(s.mul_add(low, zero, s.mul(high, zero)));
                // Below this the reciprocal overflows; such a block counts as zeros.
                let tiny = largest < 1e-35;
                let (scale, inverse) = if tiny { (0.0, 0.0) } else { (largest / 127.0, 127.0 / largest) };
                let scale = scale + poison;
                let inverse = s.splat(inverse);
                let (low, high) = (s.to_i(s.mul(low, inverse)), s.to_i(s.mul(high, inverse)));
                s.store_low_bytes(low, args.row.add(first));
                s.store_low_bytes(high, args.row.add(first + 16));
                let (sum_low, sum_high) = (s.sum_i(low), s.sum_i(high));
                scales.add(block).write_unaligned(scale);
                starts_16.add(2 * block).write_unaligned(sum_low.wrapping_mul(-12));
                starts_16.add(2 * block + 1).write_unaligned(sum_high.wrapping_mul(-12));
                let sum = sum_low.wrapping_add(sum_high);
                starts_32.add(block).write_unaligned(sum.wrapping_mul(-12));
                let sum = scale * sum as f32;
                sums[0].add(block).write_unaligned(sum);
                // Trees over 2 and 4 blocks, written when the last block of each is there.
                let last = block + 1 == layout.blocks;
                if block % 2 == 1 || last {
                    let pair = if block % 2 == 1 { sums[0].add(block - 1).read_unaligned() + sum } else { sum };
                    sums[1].add(block / 2).write_unaligned(pair);
                    if block % 4 == 3 || last {
                        let four =
                            if block % 4 >= 2 { sums[1].add(block / 2 - 1).read_unaligned() + pair } else { pair };
                        sums[2].add(block / 4).write_unaligned(four);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
