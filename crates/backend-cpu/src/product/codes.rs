//! Codes out of lines: four columns of sixteen rows as bytes.

use crate::layout::{CodePart, LINE_BYTES, code_parts};
use crate::simd::Simd;

/// A coding of small integers or table entries.
pub(super) trait Codes {
    /// Lines of a block of 32 columns.
    const LINES: usize;
    /// Whether operands may exceed 127.
    const FULL_BYTE: bool;
    /// Steps of four columns whose sums [`Simd::dot4_pairs`] holds: 1, 2, 4 or 8.
    const STEPS: usize;
    /// [`crate::simd::Kernel::LOOKS_UP`]
    const LOOKS_UP: bool = false;
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

/// E2M1 codes as `2 * value`, signed: -12 to 12.
#[cfg(target_arch = "x86_64")]
pub(super) struct E2m1Signed;

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

/// The same without [`E2M1_BIAS`], as signed bytes.
#[cfg(target_arch = "x86_64")]
const E2M1_SIGNED: [u8; 16] = {
    let mut table = E2M1_OPERANDS;
    let mut code = 0;
    while code < 16 {
        table[code] = table[code].wrapping_sub(E2M1_BIAS as u8);
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

/// Where the codes of step `M` stand, known when a kernel is compiled.
struct Parts<const BITS: usize, const M: usize>;

impl<const BITS: usize, const M: usize> Parts<BITS, M> {
    const ALL: [Option<CodePart>; 2] = code_parts(BITS, M);
}

/// The bits of one part, where they belong in each byte.
///
/// # Safety
/// `block` is valid for reads of the part's line.
#[inline(always)]
unsafe fn part_bits<S: Simd>(s: S, block: *const u8, part: CodePart) -> S::I {
    // SAFETY: the caller's promise.
    let line = unsafe { s.load_i(block.add(part.line * LINE_BYTES)) };
    if part.width == 8 {
        return line;
    }
    let moved = if part.shift > part.lowest {
        s.shr(line, (part.shift - part.lowest) as u32)
    } else if part.shift < part.lowest {
        s.shl(line, (part.lowest - part.shift) as u32)
    } else {
        line
    };
    // Shifts of 32-bit lanes carry bits across bytes; the mask removes them.
    s.and(moved, s.splat_i(0x0101_0101_i32.wrapping_mul(i32::from(part.mask()) << part.lowest)))
}

/// Codes of step `M`, a byte each.
///
/// # Safety
/// `block` is valid for reads of `BITS` lines.
#[inline(always)]
unsafe fn codes<S: Simd, const BITS: usize, const M: usize>(s: S, block: *const u8) -> S::I {
    // SAFETY: parts are inside the block's lines.
    unsafe {
        match const { Parts::<BITS, M>::ALL } {
            [Some(one), Some(two)] => s.or(part_bits(s, block, one), part_bits(s, block, two)),
            [Some(one), None] => part_bits(s, block, one),
            [None, _] => unreachable!("every code has a part"),
        }
    }
}

impl<const BITS: usize> Codes for Affine<BITS> {
    const LINES: usize = BITS;
    const FULL_BYTE: bool = BITS == 8;
    const STEPS: usize = steps_of_bits(BITS);

    #[inline(always)]
    unsafe fn operand<S: Simd, const M: usize>(s: S, block: *const u8) -> S::I {
        // SAFETY: the caller's promise.
        unsafe { codes::<S, BITS, M>(s, block) }
    }
}

impl Codes for E2m1 {
    const LINES: usize = 4;
    const FULL_BYTE: bool = false;
    // 254 * 4 * 24 < 2^15.
    const STEPS: usize = 4;
    const LOOKS_UP: bool = true;

    #[inline(always)]
    unsafe fn operand<S: Simd, const M: usize>(s: S, block: *const u8) -> S::I {
        // SAFETY: the caller's promise.
        unsafe { e2m1_entry::<S, M>(s, block, &E2M1_OPERANDS) }
    }
}

#[cfg(target_arch = "x86_64")]
impl Codes for E2m1Signed {
    const LINES: usize = 4;
    const FULL_BYTE: bool = true;
    const STEPS: usize = 1;
    const LOOKS_UP: bool = true;

    #[inline(always)]
    unsafe fn operand<S: Simd, const M: usize>(s: S, block: *const u8) -> S::I {
        // SAFETY: the caller's promise.
        unsafe { e2m1_entry::<S, M>(s, block, &E2M1_SIGNED) }
    }
}

/// What `table` has for the E2M1 codes of step `M`.
///
/// # Safety
/// `block` is valid for reads of four lines.
#[inline(always)]
unsafe fn e2m1_entry<S: Simd, const M: usize>(s: S, block: *const u8, table: &[u8; 16]) -> S::I {
    let [Some(CodePart { line, shift, .. }), None] = (const { Parts::<4, M>::ALL }) else {
        unreachable!("codes of 4 bits stand whole in a byte")
    };
    // SAFETY: the caller's promise.
    let line = unsafe { s.load_i(block.add(line * LINE_BYTES)) };
    let moved = if shift == 0 { line } else { s.shr(line, shift as u32) };
    s.look_up_low(s.load_table(table), moved)
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

/// Fetches line `M` of the blocks ahead in each stream, if blocks have so many lines.
#[inline(always)]
pub(super) fn prefetch_line<S: Simd, C: Codes, const T: usize, const M: usize>(s: S, at: &[*const u8; T]) {
    // Expanded tiles are in the nearest cache.
    if M < C::LINES && !C::WIDE {
        for block in at {
            super::fetch_ahead::<S, T>(s, block.wrapping_add(M * LINE_BYTES));
        }
    }
}
