//! How weights lie in memory here: tiles of 16 rows, each one sequential stream of 64-byte lines.
//!
//! Row `r` of a tile is lane `r` of every vector, so a product needs no sum across lanes, a row's result does not
//! depend on its neighbours, and 16 outputs leave at once. Bytes are those of the checkpoint, in another order: nothing
//! is widened, so the packed weights take the file's space (plus padding to 16 rows, 32 columns and whole lines of
//! scales).
//!
//! **Codes.** A block is 32 columns: `bits` lines of `bits`-bit codes. Byte `4 r + j` of a line holds (parts of) the codes
//! of columns `4 m + j` of row `r`, for several `m`; [`code_parts`] says where. Shifting and masking a line gives four
//! columns of 16 rows as bytes: the operand of a dot product of bytes, with the same four activations in every lane.
//! Codes of 2, 4 and 8 bits fill a byte, lowest `m` in the lowest bits; 5 and 6 are planes of 4 and of 1 or 2 bits. Of
//! 3-bit codes two stand whole in a byte, and the two bits that are left hold the parts of a third of the remaining
//! ones: a quarter fewer instructions than planes of 2 and 1 bits, where every code is in two lines.
//!
//! **Scales** follow the codes that they scale, 16 numbers a group (one a row), as in the checkpoint:
//!
//! | format | record: blocks, then scales |
//! |---|---|
//! | affine, group `g` | `g / 32` blocks; 16 scales, 16 offsets (64 bytes when 16-bit) |
//! | NVFP4 | 2 blocks; 16 x 4 numbers of [`nvfp4_scale`] (64 bytes): those of a row are the bytes of its lane |
//! | MXFP4, MXFP8 | 4 blocks; 4 x 16 E8M0 (64 bytes) |
//! | FP8 block | all scales first (f32; one a column block if the tile's rows share it, 16 otherwise), then all blocks |
//!
//! The last record may have fewer blocks; its scales are padded to whole lines.
//!
//! **Floats.** bf16: a line holds two columns of 16 rows, as pairs. f16: 16 rows of one column, then of the next.
//! f32: a line a column.

use moellon_tensor::minifloat::E4M3_WITHOUT_NAN;
use moellon_tensor::{ScaleDtype, WeightFormat};

/// Rows of a tile.
pub(crate) const TILE_ROWS: usize = 16;
/// Columns of a block: what rows are padded to.
pub(crate) const BLOCK_COLS: usize = 32;
/// Bytes of a line.
pub(crate) const LINE_BYTES: usize = 64;

/// The families of formats that share a kernel body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Coding {
    /// binary32
    F32,
    /// binary16
    F16,
    /// bfloat16
    Bf16,
    /// E4M3 codes, f32 scales before the codes.
    Fp8Block,
    /// E4M3 codes, E8M0 scales.
    Mxfp8,
    /// Unsigned codes of 2, 3, 4, 5, 6 or 8 bits, scales and offsets.
    Affine {
        /// Width of a code.
        bits: u8,
    },
    /// E2M1 codes, E8M0 scales.
    Mxfp4,
    /// E2M1 codes, E4M3 scales.
    Nvfp4,
}

/// The shape of one tile of a matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TileLayout {
    /// The checkpoint's format.
    pub(crate) format: WeightFormat,
    /// The kernel family.
    pub(crate) coding: Coding,
    /// Type of affine scales; unused by other formats.
    pub(crate) scale_dtype: ScaleDtype,
    /// Columns of the matrix.
    pub(crate) cols: usize,
    /// Blocks of 32 columns, the last one padded.
    pub(crate) blocks: usize,
    /// Bytes of the codes (or floats) of one block.
    pub(crate) block_bytes: usize,
    /// Blocks of 8-bit activations that share a scale: [`activation_scale_blocks`].
    pub(crate) scale_blocks: usize,
    /// Blocks between two groups of scales; all of them where scales are elsewhere or absent.
    pub(crate) record_blocks: usize,
    /// Bytes of the scales of a record, whole lines.
    pub(crate) record_scale_bytes: usize,
    /// FP8 block: columns that share a scale.
    pub(crate) fp8_block_cols: usize,
    /// FP8 block: scales a column block, 1 or 16.
    pub(crate) fp8_scale_lanes: usize,
    /// FP8 block: bytes of scales before the codes, whole lines.
    pub(crate) header_bytes: usize,
    /// Bytes of a tile.
    pub(crate) tile_bytes: usize,
}

impl TileLayout {
    /// The layout of tiles of a matrix with `cols` columns. `shared_fp8_scales`: whether the rows of every tile lie in
    /// one row of FP8 blocks.
    pub(crate) fn new(format: WeightFormat, cols: usize, shared_fp8_scales: bool) -> Self {
        let blocks = cols.div_ceil(BLOCK_COLS);
        let block_bytes = TILE_ROWS * BLOCK_COLS * format.code_bits() / 8;
        let (coding, record_blocks, scale_bytes) = match format {
            WeightFormat::F32 => (Coding::F32, blocks, 0),
            WeightFormat::F16 => (Coding::F16, blocks, 0),
            WeightFormat::Bf16 => (Coding::Bf16, blocks, 0),
            WeightFormat::Fp8Block { .. } => (Coding::Fp8Block, blocks, 0),
            WeightFormat::Affine { bits, group, scale } => {
                (Coding::Affine { bits }, group as usize / BLOCK_COLS, 2 * TILE_ROWS * scale.size_bytes())
            }
            WeightFormat::Mxfp4 => (Coding::Mxfp4, 4, LINE_BYTES),
            WeightFormat::Mxfp8 => (Coding::Mxfp8, 4, LINE_BYTES),
            WeightFormat::Nvfp4 => (Coding::Nvfp4, 2, LINE_BYTES),
        };
        let scale_dtype = match format {
            WeightFormat::Affine { scale, .. } => scale,
            WeightFormat::F32
            | WeightFormat::F16
            | WeightFormat::Bf16
            | WeightFormat::Fp8Block { .. }
            | WeightFormat::Mxfp4
            | WeightFormat::Mxfp8
            | WeightFormat::Nvfp4 => ScaleDtype::F32,
        };
        let (fp8_block_cols, fp8_scale_lanes, header_bytes) = match format {
            WeightFormat::Fp8Block { block_cols, .. } => {
                let lanes = if shared_fp8_scales { 1 } else { TILE_ROWS };
                let bytes = cols.div_ceil(block_cols as usize) * lanes * 4;
                (block_cols as usize, lanes, bytes.next_multiple_of(LINE_BYTES))
            }
            WeightFormat::F32
            | WeightFormat::F16
            | WeightFormat::Bf16
            | WeightFormat::Affine { .. }
            | WeightFormat::Mxfp4
            | WeightFormat::Mxfp8
            | WeightFormat::Nvfp4 => (0, 0, 0),
        };
        let records = if scale_bytes == 0 { 0 } else { blocks.div_ceil(record_blocks) };
        TileLayout {
            format,
            coding,
            scale_dtype,
            cols,
            blocks,
            block_bytes,
            scale_blocks: activation_scale_blocks(format),
            record_blocks,
            record_scale_bytes: scale_bytes,
            fp8_block_cols,
            fp8_scale_lanes,
            header_bytes,
            tile_bytes: header_bytes + blocks * block_bytes + records * scale_bytes,
        }
    }

    /// Where block `block` starts in a tile.
    pub(crate) fn block_offset(&self, block: usize) -> usize {
        let records_before = if self.record_scale_bytes == 0 { 0 } else { block / self.record_blocks };
        self.header_bytes + block * self.block_bytes + records_before * self.record_scale_bytes
    }

    /// Where the scales of the record of block `block` start in a tile.
    pub(crate) fn scale_offset(&self, block: usize) -> usize {
        let record = block / self.record_blocks;
        let end = ((record + 1) * self.record_blocks).min(self.blocks);
        self.header_bytes + end * self.block_bytes + record * self.record_scale_bytes
    }

    /// Columns of activations that kernels read: a multiple of 32.
    pub(crate) fn padded_cols(&self) -> usize {
        self.blocks * BLOCK_COLS
    }
}

/// Blocks of 8-bit activations that share a scale where they meet weights of `format`: the one place that says so, for
/// every kernel and level. 64 columns where the weights' own groups have 64 or more, else 32.
pub(crate) const fn activation_scale_blocks(format: WeightFormat) -> usize {
    match format {
        WeightFormat::Affine { group: 64.., .. } => 2,
        // Their kernels scale sums of 16 or 32 columns anyway. What is not quantized, or as 8-bit floats, takes f32.
        WeightFormat::Affine { .. }
        | WeightFormat::Mxfp4
        | WeightFormat::Nvfp4
        | WeightFormat::F32
        | WeightFormat::F16
        | WeightFormat::Bf16
        | WeightFormat::Fp8Block { .. }
        | WeightFormat::Mxfp8 => 1,
    }
}

/// Where bits of codes stand in the lines of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CodePart {
    /// Line of the block.
    pub(crate) line: usize,
    /// Lowest bit in each byte of the line.
    pub(crate) shift: usize,
    /// How many bits.
    pub(crate) width: usize,
    /// The bit of the code that the lowest one is.
    pub(crate) lowest: usize,
}

impl CodePart {
    /// `width` ones.
    pub(crate) const fn mask(&self) -> u8 {
        ((1u32 << self.width) - 1) as u8
    }
}

/// Where the codes (of `bits` bits) of columns `4 m .. 4 m + 4` of a block stand: one or two parts.
pub(crate) const fn code_parts(bits: usize, m: usize) -> [Option<CodePart>; 2] {
    /// Codes, or a plane of `width` bits of them, from line `first` on.
    const fn plane(first: usize, width: usize, m: usize, lowest: usize) -> Option<CodePart> {
        let in_byte = 8 / width;
        Some(CodePart { line: first + m / in_byte, shift: m % in_byte * width, width, lowest })
    }
    const fn part(line: usize, shift: usize, width: usize, lowest: usize) -> Option<CodePart> {
        Some(CodePart { line, shift, width, lowest })
    }
    assert!(m < 8, "a block is eight times four columns");
    match bits {
        2 | 4 | 8 => [plane(0, bits, m, 0), None],
        3 => match m {
            6 => [part(0, 6, 2, 0), part(1, 6, 1, 2)],
            7 => [part(2, 6, 2, 0), part(1, 7, 1, 2)],
            _ => [part(m / 2, m % 2 * 3, 3, 0), None],
        },
        5 => [plane(0, 4, m, 0), plane(4, 1, m, 4)],
        6 => [plane(0, 4, m, 0), plane(4, 2, m, 4)],
        _ => panic!("codes have 2, 3, 4, 5, 6 or 8 bits"),
    }
}

/// Exponent of the smallest number of [`nvfp4_scale`], as f32 has it.
pub(crate) const NVFP4_SCALE_EXPONENT: u32 = 127 - 9;

/// The magnitude of an E4M3 number as five bits of exponent and three of mantissa, without subnormals: moved up by 20
/// bits and added to [`NVFP4_SCALE_EXPONENT`], it is an f32, which takes half the instructions that E4M3 takes. `None`:
/// zero. Packing gives the sign of a scale, or its zeros, to the codes.
pub(crate) fn nvfp4_scale(e4m3: u8) -> Option<u8> {
    let magnitude = E4M3_WITHOUT_NAN[usize::from(e4m3 & 0x7f)];
    (magnitude > 0.0).then(|| ((magnitude.to_bits() >> 20) - (NVFP4_SCALE_EXPONENT << 3)) as u8)
}

/// What [`nvfp4_scale`] made.
pub(crate) fn nvfp4_scale_value(scale: u8) -> f32 {
    f32::from_bits((u32::from(scale) << 20) + (NVFP4_SCALE_EXPONENT << 23))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bit_of_a_block_holds_one_bit_of_one_code() {
        for bits in [2, 3, 4, 5, 6, 8] {
            let mut taken = vec![0u8; bits];
            for m in 0..8 {
                let mut code = 0;
                for part in code_parts(bits, m).into_iter().flatten() {
                    let here = part.mask() << part.shift;
                    assert_eq!(taken[part.line] & here, 0, "{bits} bits, line {}", part.line);
                    taken[part.line] |= here;
                    code |= u32::from(part.mask()) << part.lowest;
                }
                assert_eq!(code, (1 << bits) - 1, "{bits} bits, columns {}", 4 * m);
            }
            assert!(taken.iter().all(|byte| *byte == 0xff), "{bits} bits: {taken:x?}");
        }
    }

    #[test]
    fn groups_are_whole_numbers_of_scales_of_activations() {
        for (group, scale_blocks) in [(32, 1), (64, 2), (128, 2)] {
            let format = WeightFormat::Affine { bits: 4, group, scale: ScaleDtype::Bf16 };
            let layout = TileLayout::new(format, 256, false);
            assert_eq!(layout.scale_blocks, scale_blocks, "groups of {group}");
            assert!(layout.record_blocks.is_multiple_of(scale_blocks), "groups of {group}");
        }
        assert_eq!(activation_scale_blocks(WeightFormat::Nvfp4), 1);
        assert_eq!(activation_scale_blocks(WeightFormat::Mxfp4), 1);
    }

    #[test]
    fn every_e4m3_magnitude_is_kept() {
        for code in 0..=255u8 {
            let expected = E4M3_WITHOUT_NAN[usize::from(code)].abs();
            let actual = nvfp4_scale(code).map_or(0.0, nvfp4_scale_value);
            assert_eq!(actual, expected, "{code:#x}");
        }
    }
}
