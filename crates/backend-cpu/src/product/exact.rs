//! Integer and E2M1 weights, dequantized to f32, times f32 activations: one fused multiply-add a column, in order.
//! For references and golden tests, so all formats share one body that finds its bits at run time.
// Loops run over arrays of registers, several at once; iterators would hide vectors in closures.
#![allow(clippy::needless_range_loop)]

use super::codes::{E2M1_BIAS, E2M1_FACTOR, E2M1_OPERANDS};
use super::{TileArgs, TileKernel, finish, load_e8m0, load_scales, nvfp4_scales};
use crate::layout::{BLOCK_COLS, Coding, LINE_BYTES, TILE_ROWS, TileLayout, code_parts};
use crate::simd::Simd;

/// Sizes of this kernel.
pub(super) const SIZES: [usize; 4] = [1, 1, 0, 0];

/// Affine and E2M1 codes.
pub(super) struct Exact;

/// Columns `4 m .. 4 m + 4` of the block at `block`, a byte each.
///
/// # Safety
/// `block` is valid for reads of `bits` lines.
#[inline(always)]
unsafe fn operand<S: Simd>(s: S, block: *const u8, m: usize, bits: usize) -> S::I {
    let mut codes = s.splat_i(0);
    for part in code_parts(bits, m).into_iter().flatten() {
        // SAFETY: the caller's promise.
        let line = unsafe { s.load_i(block.add(part.line * LINE_BYTES)) };
        let mask = s.splat_i(0x0101_0101_i32.wrapping_mul(i32::from(part.mask())));
        let found = s.and(s.shr(line, part.shift as u32), mask);
        codes = s.or(codes, s.shl(found, part.lowest as u32));
    }
    codes
}

/// Scales of the two halves of a block, and its offsets (zero where there are none).
///
/// # Safety
/// `tile` is a tile of the layout, `block` one of its blocks.
#[inline(always)]
unsafe fn block_scales<S: Simd>(s: S, layout: &TileLayout, tile: *const u8, block: usize) -> ([S::F; 2], S::F) {
    let within = block % layout.record_blocks;
    // SAFETY: the caller's promise.
    unsafe {
        let scales = tile.add(layout.scale_offset(block));
        match layout.coding {
            Coding::Affine { .. } => {
                let offsets = scales.add(TILE_ROWS * layout.scale_dtype.size_bytes());
                let scale = load_scales(s, layout.scale_dtype, scales);
                ([scale, scale], load_scales(s, layout.scale_dtype, offsets))
            }
            Coding::Mxfp4 => {
                let scale = load_e8m0(s, scales.add(within * TILE_ROWS));
                ([scale, scale], s.splat(0.0))
            }
            Coding::Nvfp4 => (nvfp4_scales(s, scales, within), s.splat(0.0)),
            Coding::F32 | Coding::F16 | Coding::Bf16 | Coding::Fp8Block | Coding::Mxfp8 => {
                unreachable!("`Product::dispatch` sends these to other kernels")
            }
        }
    }
}

impl TileKernel for Exact {
    const STREAMS: [usize; 4] = SIZES;

    #[inline(always)]
    unsafe fn run<S: Simd, const T: usize, const R: usize>(s: S, args: &TileArgs<'_>) {
        let layout = args.layout;
        let bits = layout.format.code_bits();
        let is_affine = matches!(layout.coding, Coding::Affine { .. });
        let (table, bias) = (s.load_table(&E2M1_OPERANDS), s.splat_i(E2M1_BIAS));
        let mut totals = [[s.splat(0.0); R]; T];
        // SAFETY: tiles are whole, rows hold `padded_cols` floats.
        unsafe {
            for t in 0..T {
                for block in 0..layout.blocks {
                    let codes = args.tiles[t].add(layout.block_offset(block));
                    let (scales, offset) = block_scales(s, layout, args.tiles[t], block);
                    for m in 0..8 {
                        let mut bytes = operand(s, codes, m, bits);
                        if !is_affine {
                            bytes = s.look_up(table, bytes);
                        }
                        for j in 0..4 {
                            let code = s.and(s.shr(bytes, 8 * j as u32), s.splat_i(0xff));
                            // Two roundings, as decoding has them.
                            let weight = if is_affine {
                                s.add(s.mul(s.to_f(code), scales[0]), offset)
                            } else {
                                s.mul(s.to_f(s.sub_i(code, bias)), scales[m / 4])
                            };
                            for r in 0..R {
                                let x = args.rows[r].cast::<f32>().add(block * BLOCK_COLS + 4 * m + j);
                                totals[t][r] = s.mul_add(weight, s.splat(*x), totals[t][r]);
                            }
                        }
                    }
                }
            }
            let factor = if is_affine { 1.0 } else { 1.0 / E2M1_FACTOR };
            finish::<S, T, R>(s, args, factor, &totals);
        }
    }
}
