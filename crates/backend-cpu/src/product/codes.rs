//! Codes out of bit planes: four columns of sixteen rows as bytes.

use crate::layout::LINE_BYTES;
use crate::simd::Simd;

/// A coding of small integers or table entries.
pub(super) trait Codes {
    /// Lines of a block of 32 columns.
    const LINES: usize;
    /// Whether operands may exceed 127.
    const FULL_BYTE: bool;
    /// Steps of four columns whose sums [`Simd::dot4_pairs`] holds: 1, 2, 4 or 8.
    const STEPS: usize;
    /// Whether tiles were expanded: one operand a byte, scales in f32.
    const WIDE: bool = false;

    /// Columns `4 M .. 4 M + 4` of the block at `block`: byte `4 r + j` is column `4 M + j` of row `r`.
    ///
    /// # Safety
    /// `block` is valid for reads of `LINES` lines.
    unsafe fn operand<S: Simd, const M: usize>(s: S, block: *const u8) -> S::I;
}

/// Unsigned codes of `BITS` bits.
pub(super) struct Affine<const BITS: usize>;

/// E2M1 codes as `2 * value + 12`, which is 0 to 24.
pub(super) struct E2m1;

/// Operands of small codes that [`super::wide::Expand`] made.
pub(super) struct Wide<const STEPS: usize>;

/// What [`E2m1`] adds so that operands are unsigned.
pub(super) const E2M1_BIAS: i32 = 12;
/// And what it multiplies with so that they are whole.
pub(super) const E2M1_FACTOR: f32 = 2.0;

/// The operand of each E2M1 code.
pub(super) const E2M1_OPERANDS: [u8; 16] = {
    let mut table = [0; 16];
    let mut code = 0;
    while code < 16 {
        table[code] = (moellon_tensor::minifloat::E2M1[code] * E2M1_FACTOR + E2M1_BIAS as f32) as u8;
        code += 1;
    }
    table
};

/// [`Codes::STEPS`] of unsigned codes: `254 * steps * (2^bits - 1)` stays below 2^15.
pub(super) const fn steps_of_bits(bits: usize) -> usize {
    match bits {
        0..=4 => 8,
        5 => 4,
        6 => 2,
        _ => 1,
    }
}

/// Bits of a plane of width `width` whose lines start `first_line` lines into the block, as bits `lowest ..` of each byte.
///
/// # Safety
/// `block` is valid for reads of the plane's lines.
#[inline(always)]
unsafe fn plane<S: Simd, const M: usize>(
    s: S,
    block: *const u8,
    first_line: usize,
    width: usize,
    lowest: usize,
) -> S::I {
    let per_line = 8 / width;
    // SAFETY: the caller's promise.
    let line = unsafe { s.load_i(block.add((first_line + M / per_line) * LINE_BYTES)) };
    if width == 8 {
        return line;
    }
    let shift = M % per_line * width;
    let moved = if shift > lowest {
        s.shr(line, (shift - lowest) as u32)
    } else if shift < lowest {
        s.shl(line, (lowest - shift) as u32)
    } else {
        line
    };
    // Shifts of 32-bit lanes carry bits across bytes; the mask removes them.
    s.and(moved, s.splat_i(0x0101_0101_i32.wrapping_mul(((1 << width) - 1) << lowest)))
}

impl<const BITS: usize> Codes for Affine<BITS> {
    const LINES: usize = BITS;
    const FULL_BYTE: bool = BITS == 8;
    const STEPS: usize = steps_of_bits(BITS);

    #[inline(always)]
    unsafe fn operand<S: Simd, const M: usize>(s: S, block: *const u8) -> S::I {
        // SAFETY: the planes of `bit_planes(BITS)` are `BITS` lines together.
        unsafe {
            match BITS {
                3 => s.or(plane::<S, M>(s, block, 0, 2, 0), plane::<S, M>(s, block, 2, 1, 2)),
                5 => s.or(plane::<S, M>(s, block, 0, 4, 0), plane::<S, M>(s, block, 4, 1, 4)),
                6 => s.or(plane::<S, M>(s, block, 0, 4, 0), plane::<S, M>(s, block, 4, 2, 4)),
                width => plane::<S, M>(s, block, 0, width, 0),
            }
        }
    }
}

impl Codes for E2m1 {
    const LINES: usize = 4;
    const FULL_BYTE: bool = false;
    // 254 * 4 * 24 < 2^15.
    const STEPS: usize = 4;

    #[inline(always)]
    unsafe fn operand<S: Simd, const M: usize>(s: S, block: *const u8) -> S::I {
        // SAFETY: the caller's promise.
        let codes = unsafe { plane::<S, M>(s, block, 0, 4, 0) };
        s.look_up(s.load_table(&E2M1_OPERANDS), codes)
    }
}

impl<const STEPS: usize> Codes for Wide<STEPS> {
    const LINES: usize = 8;
    const FULL_BYTE: bool = false;
    const STEPS: usize = STEPS;
    const WIDE: bool = true;

    #[inline(always)]
    unsafe fn operand<S: Simd, const M: usize>(s: S, block: *const u8) -> S::I {
        // SAFETY: the caller's promise.
        unsafe { s.load_i(block.add(M * LINE_BYTES)) }
    }
}

/// Fetches line `M` of the blocks `PREFETCH_BYTES` ahead of each stream, if blocks have so many lines.
#[inline(always)]
pub(super) fn prefetch_line<S: Simd, C: Codes, const T: usize, const M: usize>(s: S, at: &[*const u8; T]) {
    // Expanded tiles are in the nearest cache.
    if M < C::LINES && !C::WIDE {
        for block in at {
            s.prefetch(block.wrapping_add(super::PREFETCH_BYTES + M * LINE_BYTES));
        }
    }
}
