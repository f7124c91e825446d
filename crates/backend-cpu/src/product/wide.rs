//! Tiles expanded for many rows: codes one operand a byte and scales as f32, so that unpacking is paid once and not for
//! every four rows. A part of a tile at a time, small enough to stay in the nearest cache; sums go on from part to part.
//! The numbers and their order are those of the packed tile, so results are the same bits.

use super::codes::Codes;
use super::expanded::STREAMS;
use super::{fetch_ahead, load_e8m0, load_scales, nvfp4_scales};
use crate::layout::{Coding, LINE_BYTES, TILE_ROWS, TileLayout};
use crate::simd::{Kernel, Simd};
use std::marker::PhantomData;

/// Blocks of a part: 512 columns, whole records of every format.
pub(super) const PART_BLOCKS: usize = 16;
/// Bytes of an expanded part: eight lines a block, and up to two lines of scales.
const PART_BYTES: usize = PART_BLOCKS * (8 + 2) * LINE_BYTES;

/// An expanded part of one tile.
#[repr(align(64))]
pub(super) struct Part(pub(super) [std::mem::MaybeUninit<u8>; PART_BYTES]);

/// What to expand.
pub(super) struct ExpandArgs<'a> {
    pub(super) layout: &'a TileLayout,
    /// The first block of the part.
    pub(super) from: *const u8,
    /// Up to [`PART_BLOCKS`].
    pub(super) blocks: usize,
    /// A [`Part`].
    pub(super) to: *mut u8,
}

/// Expands codes of kind `C`: records of blocks and the scales of these blocks, without padding.
pub(super) struct Expand<C>(PhantomData<C>);

impl<C: Codes> Kernel for Expand<C> {
    type Args = ExpandArgs<'static>;

    const WIDE_DOTS: bool = true;
    const LOOKS_UP: bool = C::LOOKS_UP;

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &ExpandArgs<'static>) {
        let layout = args.layout;
        let (mut at, mut to, mut left) = (args.from, args.to, args.blocks);
        // SAFETY: the tile holds these blocks and their scales from `from` on, a part has room for them.
        unsafe {
            while left > 0 {
                let count = layout.record_blocks.min(left);
                for _ in 0..count {
                    store_block::<S, C>(s, at, to);
                    at = at.add(C::LINES * LINE_BYTES);
                    to = to.add(8 * LINE_BYTES);
                }
                fetch_ahead::<S, STREAMS>(s, at);
                let lines = match layout.coding {
                    Coding::Affine { .. } => 2,
                    Coding::Mxfp4 => count,
                    Coding::Nvfp4 => 2 * count,
                    Coding::F32 | Coding::F16 | Coding::Bf16 | Coding::Fp8Block | Coding::Mxfp8 => {
                        unreachable!("`Product::expands` names the codings that are expanded")
                    }
                };
                for line in 0..lines {
                    let scale = match layout.coding {
                        Coding::Affine { .. } => {
                            let offset = line * TILE_ROWS * layout.scale_dtype.size_bytes();
                            load_scales(s, layout.scale_dtype, at.add(offset))
                        }
                        Coding::Mxfp4 => load_e8m0(s, at.add(line * TILE_ROWS)),
                        _ => nvfp4_scales(s, at, line / 2)[line % 2],
                    };
                    s.store(scale, to.add(line * LINE_BYTES).cast());
                }
                at = at.add(layout.record_scale_bytes);
                to = to.add(lines * LINE_BYTES);
                left -= count;
            }
        }
    }
}

/// Fetches line `M` of what comes after `block`, if blocks have so many lines.
#[inline(always)]
fn fetch_line<S: Simd, C: Codes, const M: usize>(s: S, block: *const u8) {
    if M < C::LINES {
        fetch_ahead::<S, STREAMS>(s, block.wrapping_add(M * LINE_BYTES));
    }
}

/// The eight operands of a block.
///
/// # Safety
/// `block` is a block, `to` has room for eight lines.
#[inline(always)]
unsafe fn store_block<S: Simd, C: Codes>(s: S, block: *const u8, to: *mut u8) {
    macro_rules! store {
        ($($m:literal)+) => {
            $(
                fetch_line::<S, C, $m>(s, block);
                s.store(s.cast_to_f(C::operand::<S, $m>(s, block)), to.add($m * LINE_BYTES).cast());
            )+
        };
    }
    macro_rules! store_eights {
        ($($low:literal $high:literal)+) => {
            $(
                fetch_line::<S, C, $low>(s, block);
                fetch_line::<S, C, $high>(s, block);
                let (low, high) = (C::operand::<S, $low>(s, block), C::operand::<S, $high>(s, block));
                s.store_eights(low, high, to.add($low * LINE_BYTES));
            )+
        };
    }
    // SAFETY: the caller's promise.
    unsafe {
        if S::EIGHTS {
            store_eights!(0 1 2 3 4 5 6 7);
        } else {
            store!(0 1 2 3 4 5 6 7);
        }
    }
}
