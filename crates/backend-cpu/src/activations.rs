//! Activations as kernels read them: rows of f32 padded to whole blocks, or rows of 8-bit integers with their scales.
//!
//! An 8-bit row is made once and read by every tile of every weight that shares it. Per 32 or 64 columns it has one f32
//! scale (`amax / 127`), so outliers spoil only their own group; which of the two, the weight's format says
//! ([`crate::layout::activation_scale_blocks`]). Everything about a row depends on that row alone.
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
    /// Blocks that share a scale: 1 or 2.
    pub(crate) scale_blocks: usize,
    /// `[num_scales]` f32: what a code is worth.
    pub(crate) scales: usize,
    /// `[num_scales]` f32: sums of the (rounded) activations that share a scale. Offsets of affine groups are multiplied
    /// with them.
    sums: usize,
    /// `[num_scales / 2]` f32, rounded up: the same of two scales, where these are of 64 columns.
    pair_sums: usize,
    /// `[2 * blocks]` i32: -12 times the sum of the codes of 16 columns, where scales are of 32. E2M1 weights are looked up
    /// as `2 value + 12`, unsigned; a sum that starts here ends as if they were signed.
    pub(crate) e2m1_starts_16: usize,
    /// `[blocks]` i32: the same for 32 columns.
    pub(crate) e2m1_starts_32: usize,
    /// Bytes of a row, whole lines.
    pub(crate) row_bytes: usize,
}

impl Int8Layout {
    /// The layout of rows of `cols` columns with a scale for `scale_blocks` (1 or 2) blocks.
    pub(crate) fn new(cols: usize, scale_blocks: usize) -> Self {
        assert!(matches!(scale_blocks, 1 | 2), "a scale for {scale_blocks} blocks, expected 1 or 2");
        let blocks = cols.div_ceil(BLOCK_COLS);
        let num_scales = blocks.div_ceil(scale_blocks);
        // What weights with groups of 32 columns and less read, and what those with larger ones do.
        let (pairs, starts) = if scale_blocks == 1 { (0, blocks) } else { (num_scales.div_ceil(2), 0) };
        let scales = blocks * BLOCK_COLS;
        let sums = scales + 4 * num_scales;
        let pair_sums = sums + 4 * num_scales;
        let e2m1_starts_16 = pair_sums + 4 * pairs;
        let e2m1_starts_32 = e2m1_starts_16 + 8 * starts;
        let row_bytes = (e2m1_starts_32 + 4 * starts).next_multiple_of(64);
        Int8Layout { cols, blocks, scale_blocks, scales, sums, pair_sums, e2m1_starts_16, e2m1_starts_32, row_bytes }
    }

    /// Where the sums over `group` columns start.
    pub(crate) fn sums_of_group(&self, group: usize) -> usize {
        match group / BLOCK_COLS {
            blocks if blocks == self.scale_blocks => self.sums,
            4 if self.scale_blocks == 2 => self.pair_sums,
            _ => unreachable!("`activation_scale_blocks` knows no groups of {group} columns"),
        }
    }

    /// Floats from the first scale to the end of the sums, each of which is one of [`Across`].
    fn numbers_across(&self) -> usize {
        (self.e2m1_starts_16 - self.scales) / 4
    }
}

/// Scales and sums of many 8-bit rows once more, those of neighbouring rows side by side: tile registers take 16 rows at
/// once, and finding the numbers of 16 rows would take as many instructions as using them.
///
/// The scales and sums of [`Int8Layout`] in its order; each of these numbers is `stride` floats, one a row.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Across {
    first: *mut f32,
    stride: usize,
}

impl Across {
    /// Rows that are read at once: so many behind the last one may be read, too.
    pub(crate) const ROWS: usize = 16;

    /// Floats for `num_rows` rows.
    pub(crate) fn num_floats(layout: &Int8Layout, num_rows: usize) -> usize {
        layout.numbers_across() * Self::new(std::ptr::null_mut(), num_rows).stride + Self::ROWS
    }

    /// For `num_rows` rows, in memory of [`Across::num_floats`].
    pub(crate) fn new(first: *mut f32, num_rows: usize) -> Self {
        // An odd number of lines: all the numbers of a row would share a few sets of the nearest cache otherwise.
        Across { first, stride: (num_rows.div_ceil(Self::ROWS) | 1) * Self::ROWS }
    }

    /// Rows from `row` on.
    pub(crate) fn at_row(self, row: usize) -> Self {
        Across { first: self.first.wrapping_add(row), ..self }
    }

    /// Floats between two numbers of a row.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn stride(&self) -> usize {
        self.stride
    }

    /// Scale `number` of the first row.
    pub(crate) fn scale(&self, number: usize) -> *mut f32 {
        self.first.wrapping_add(number * self.stride)
    }

    /// Sum `number` over `group` columns of the first row.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn sum(&self, layout: &Int8Layout, group: usize, number: usize) -> *mut f32 {
        // Here they follow each other as they do in a row.
        self.scale((layout.sums_of_group(group) - layout.scales) / 4 + number)
    }

    /// Copies the numbers of blocks `first_block..end_block` (as [`round_part_to_int8`]) of an 8-bit row to the first row.
    ///
    /// # Safety
    /// `row` is an 8-bit row with these blocks; no other thread touches their numbers here.
    pub(crate) unsafe fn copy(&self, layout: &Int8Layout, row: *const u8, [first_block, end_block]: [usize; 2]) {
        let blocks = layout.scale_blocks;
        let pairs = (layout.pair_sums < layout.e2m1_starts_16).then_some((layout.pair_sums, 2 * blocks));
        for (at, blocks) in [(layout.scales, blocks), (layout.sums, blocks)].into_iter().chain(pairs) {
            let start = (at - layout.scales) / 4;
            for number in start + first_block / blocks..start + end_block.div_ceil(blocks) {
                // SAFETY: the caller's promise; numbers follow each other in the row and here.
                unsafe {
                    let from = row.add(layout.scales + 4 * number).cast::<f32>();
                    self.scale(number).write(from.read_unaligned());
                }
            }
        }
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
            let [sums, pair_sums] = [layout.sums, layout.pair_sums].map(|at| args.row.add(at).cast::<f32>());
            let starts_16 = args.row.add(layout.e2m1_starts_16).cast::<i32>();
            let starts_32 = args.row.add(layout.e2m1_starts_32).cast::<i32>();
            let scale_blocks = layout.scale_blocks;
            // Four at a time: a sum over the lanes of four vectors takes hardly more than one over those of one.
            for four in (args.first_block..args.end_block).step_by(4) {
                let zero = s.splat(0.0);
                let (mut low, mut high) = ([zero; 4], [zero; 4]);
                let count = (args.end_block - four).min(4);
                for i in 0..count {
                    let first = (four + i) * BLOCK_COLS;
                    (low[i], high[i]) = if first + BLOCK_COLS <= layout.cols {
                        (s.load(args.x.add(first)), s.load(args.x.add(first + 16)))
                    } else {
                        let left = layout.cols - first;
                        let low = s.load_partial(args.x.add(first), left.min(16));
                        (low, if left > 16 { s.load_partial(args.x.add(first + 16), left - 16) } else { zero })
                    };
                }
                let (mut magnitudes, mut poisons) = ([zero; 4], [zero; 4]);
                for i in 0..4 {
                    magnitudes[i] = s.max(abs(s, low[i]), abs(s, high[i]));
                    // Infinities and NaN give NaN here (and zero otherwise), and a scale of NaN gives outputs of NaN.
                    poisons[i] = s.mul_add(low[i], zero, s.mul(high[i], zero));
                }
                let (largest, poisons) = (s.max_lane_4(magnitudes), s.sum_4(poisons));
                let mut group_scales = [0.0; 4];
                let (mut low_codes, mut high_codes) = ([s.splat_i(0); 4], [s.splat_i(0); 4]);
                for first in (0..count).step_by(scale_blocks) {
                    let end = (first + scale_blocks).min(count);
                    let (mut amax, mut poison) = (largest[first], poisons[first]);
                    for i in first + 1..end {
                        (amax, poison) = (amax.max(largest[i]), poison + poisons[i]);
                    }
                    // Below this the reciprocal overflows; such a group counts as zeros.
                    let tiny = amax < 1e-35;
                    let (scale, inverse) = if tiny { (0.0, 0.0) } else { (amax / 127.0, 127.0 / amax) };
                    group_scales[first] = scale + poison;
                    let inverse = s.splat(inverse);
                    for i in first..end {
                        low_codes[i] = s.to_i(s.mul(low[i], inverse));
                        high_codes[i] = s.to_i(s.mul(high[i], inverse));
                        let to = args.row.add((four + i) * BLOCK_COLS);
                        s.store_low_bytes(low_codes[i], to);
                        s.store_low_bytes(high_codes[i], to.add(16));
                    }
                }
                let (low_sums, high_sums) = (s.sum_i_4(low_codes), s.sum_i_4(high_codes));
                if scale_blocks == 1 {
                    for i in 0..count {
                        let (block, sum) = (four + i, low_sums[i].wrapping_add(high_sums[i]));
                        scales.add(block).write_unaligned(group_scales[i]);
                        sums.add(block).write_unaligned(group_scales[i] * sum as f32);
                        starts_16.add(2 * block).write_unaligned(low_sums[i].wrapping_mul(-12));
                        starts_16.add(2 * block + 1).write_unaligned(high_sums[i].wrapping_mul(-12));
                        starts_32.add(block).write_unaligned(sum.wrapping_mul(-12));
                    }
                } else {
                    let mut all = 0.0;
                    for first in (0..count).step_by(2) {
                        let (scale, number) = (group_scales[first], (four + first) / 2);
                        // Codes behind the last block are zeros.
                        let halves = low_sums[first].wrapping_add(high_sums[first]);
                        let sum = halves.wrapping_add(low_sums[first + 1]).wrapping_add(high_sums[first + 1]);
                        let sum = scale * sum as f32;
                        scales.add(number).write_unaligned(scale);
                        sums.add(number).write_unaligned(sum);
                        all = if first == 0 { sum } else { all + sum };
                    }
                    pair_sums.add(four / 4).write_unaligned(all);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
