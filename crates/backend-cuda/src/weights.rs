//! Weights on the device: plain ones as they are, quantized ones in the packed layout of `kernels/packed.cuh`.

use crate::args::Packed;
use crate::driver::{DevicePtr, Memory};
use moellon_ops::{Error, Result};
use moellon_tensor::{ScaleDtype, WeightFormat};

/// Name of a packed format in kernel names.
pub(crate) fn format_name(format: WeightFormat) -> Option<&'static str> {
    Some(match format {
        WeightFormat::Affine { bits: 2, .. } => "affine2",
        WeightFormat::Affine { bits: 3, .. } => "affine3",
        WeightFormat::Affine { bits: 4, .. } => "affine4",
        WeightFormat::Affine { bits: 5, .. } => "affine5",
        WeightFormat::Affine { bits: 6, .. } => "affine6",
        WeightFormat::Affine { bits: 8, .. } => "affine8",
        WeightFormat::Nvfp4 => "nvfp4",
        WeightFormat::Mxfp4 => "mxfp4",
        WeightFormat::Mxfp8 => "mxfp8",
        WeightFormat::Fp8Block { .. } => "fp8",
        _ => return None,
    })
}

/// Whether the format is multiplied as bytes (activations as digits) rather than as bfloat16.
pub(crate) fn takes_digits(format: WeightFormat) -> bool {
    matches!(format, WeightFormat::Affine { .. })
}

/// Ending of product kernels: affine formats have one for the usual scales and groups and one for any.
pub(crate) fn product_suffix(format: WeightFormat) -> Option<String> {
    let name = format_name(format)?;
    Some(match format {
        WeightFormat::Affine { group: 64, scale: ScaleDtype::Bf16, .. } => name.to_owned(),
        WeightFormat::Affine { .. } => format!("{name}_any"),
        _ => name.to_owned(),
    })
}

/// Name of a format in the kernels for one row: those whose scales stand behind the codes of their tile.
pub(crate) fn fast_format(format: WeightFormat) -> Option<&'static str> {
    let usual = !matches!(format, WeightFormat::Affine { .. })
        || matches!(format, WeightFormat::Affine { group: 64, scale: ScaleDtype::Bf16, .. });
    format_name(format).filter(|_| usual)
}

/// Shared memory of a kernel for few rows that streams tiles of `matrices` matrices: `Ring` of product.cuh, for a block of eight warps.
pub(crate) fn ring_bytes(format: WeightFormat, matrices: u32) -> u32 {
    let words = lane_words(format) as u32;
    let slots = if matrices == 2 || words > 5 { 4 } else { 8 };
    8 * slots * matrices * (words * 128 + 64)
}

/// Shared memory of a kernel for one row that streams tiles of `matrices` matrices: `Pipe` of decode.cu, for a block of eight warps.
pub(crate) fn pipe_bytes(format: WeightFormat, matrices: u32) -> u32 {
    let (tiles, slots) = match (matrices, lane_words(format) > 5) {
        (1, false) => (4, 3),
        (1, true) => (2, 4),
        (_, false) => (3, 2),
        (_, true) => (2, 3),
    };
    8 * (slots * matrices * tiles * tile_bytes(format) + 64)
}

/// The same of `deep_*`: four slots of three tiles of two row tiles a warp, of up to four bits; more than half of a multiprocessor's memory.
pub(crate) fn deep_bytes(format: WeightFormat) -> u32 {
    8 * (4 * 2 * 3 * tile_bytes(format) + 64)
}

/// The same of `row_heads_*` (`RowHeads` of latent.cu): rings of 16 warps, tiles of the other two products and their barriers, the row, and what comes of it.
pub(crate) fn row_heads_bytes(format: WeightFormat) -> u32 {
    const KEY_STRIDE: u32 = 328;
    const PARTS: u32 = 16 * (4 + 256) * 4;
    let (tiles, slots) = match lane_words(format) {
        ..=4 => (8, 1),
        5 => (3, 2),
        6 => (2, 2),
        _ => (1, 3),
    };
    let tile = tile_bytes(format);
    let rings = 16 * (slots * 2 * tiles * tile + 64);
    let others = 16 * 4 * tile + 144;
    let row = 32 * if takes_digits(format) { 144 } else { 128 };
    let batch = (rings - PARTS) / (32 * KEY_STRIDE * 2);
    let scores = 2 * batch * 32 * 4 + batch * 2 * 40 * 2;
    let rest = 16 * 2 * 16 * 4 + 256 * 4 + 576 * 2 + 16 * 32 * 4 + 16 * 4;
    rings + others + row + 2 * KEY_STRIDE * 2 + scores + rest
}

/// The rings of a kernel of few.cu (`Size`): tiles of a slot, slots of a warp's ring of two row tiles, slots of the rows' ring.
type Rings = (u32, u32, u32);

/// The same of the kernels of few.cu: `warps` warps with a ring of tiles each, and one of as many tiles of `rows` rows
/// (`SharedRows` of shared_rows.cuh).
fn few_bytes(format: WeightFormat, warps: u32, (tiles, slots, row_slots): Rings, rows: u32) -> u32 {
    // Formats that are multiplied as bfloat16 have eight rows at least, and 64 bytes more a row.
    let (columns, pad, rows) = if takes_digits(format) { (144, 0, rows) } else { (128, 64, rows.max(8)) };
    warps * (slots * tiles * 2 * tile_bytes(format) + 64) + row_slots * (rows * (tiles * columns + pad) + 16)
}

/// Formats of more than four bits have shorter rings, so that as many blocks fit (`Fitting`).
fn fitting(format: WeightFormat, small: Rings, wide: Rings) -> Rings {
    if lane_words(format) > 4 { wide } else { small }
}

/// Warps of a block of `few_line` that multiply (`LINE_WARPS`).
pub(crate) const LINE_WARPS: usize = 4;

/// [`few_bytes`] of `few_line` for up to `rows` rows (4, 8, 16 or 32), and what its threads keep of the slices before.
pub(crate) fn few_line_bytes(format: WeightFormat, rows: u32) -> u32 {
    let rings = match rows {
        32 => fitting(format, (2, 3, 3), (2, 2, 3)),
        _ => fitting(format, (4, 2, 3), (2, 3, 3)),
    };
    let rows_of_lots = if takes_digits(format) { rows } else { rows.max(8) };
    few_bytes(format, LINE_WARPS as u32, rings, rows) + 4 * 32 * LINE_WARPS as u32 * rows_of_lots
}

/// [`few_bytes`] of `few_up` and `few_down`.
pub(crate) fn few_group_bytes(format: WeightFormat) -> u32 {
    few_bytes(format, 8, fitting(format, (4, 2, 3), (2, 2, 3)), 8)
}

/// Rows of weights of a block of `prompt_*` (`64 * CONSUMERS`), and of activations (`TOKENS`).
pub(crate) const PROMPT_ROWS: usize = 192;
pub(crate) const PROMPT_TOKENS: usize = 64;
/// Bytes of 64 columns of so many rows of activations (`BLOCKED_BYTES`, `BLOCKED_TWIN`).
pub(crate) fn blocked_bytes(format: WeightFormat) -> usize {
    PROMPT_TOKENS * if takes_digits(format) { 136 } else { 128 }
}

/// Shared memory of `prompt_*` (`Stage` of prompt.cu): stages of activations, a kilobyte of ones, rings of tiles of weights, the totals of its
/// threads.
pub(crate) fn prompt_bytes(format: WeightFormat) -> u32 {
    let slots = if lane_words(format) == 8 { 4 } else { 8 };
    let weights = slots * (PROMPT_ROWS / 16) as u32 * tile_bytes(format);
    8 * (blocked_bytes(format) as u32).next_multiple_of(1024)
        + 1024
        + weights
        + (PROMPT_ROWS * PROMPT_TOKENS * 4) as u32
}

/// Bytes of a tile with its scales behind it.
pub(crate) fn tile_bytes(format: WeightFormat) -> u32 {
    let scales = if matches!(format, WeightFormat::Mxfp4 | WeightFormat::Mxfp8) { 32 } else { 64 };
    lane_words(format) as u32 * 128 + scales
}

/// Words of codes that a lane has in a tile (`Words` of packed.cuh).
pub(crate) fn lane_words(format: WeightFormat) -> u64 {
    match format {
        WeightFormat::Affine { bits, .. } => u64::from(bits),
        WeightFormat::Mxfp8 | WeightFormat::Fp8Block { .. } => 8,
        _ => 4,
    }
}

/// One or several matrices on the device.
pub(crate) struct DeviceWeight {
    pub(crate) format: WeightFormat,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    /// Plain floats, row-major.
    pub(crate) plain: DevicePtr,
    /// The packed form of quantized weights.
    pub(crate) packed: Packed,
    /// Keeps what the addresses point at.
    pub(crate) _memory: Vec<Memory>,
}

impl DeviceWeight {
    /// Address of the biases, 0 for none.
    pub(crate) fn bias(&self) -> DevicePtr {
        self.packed.bias
    }
}

/// Bytes of scales behind the codes of each tile; 0 where scales stand beside (packed.cuh).
pub(crate) fn inline_scale_bytes(format: WeightFormat) -> u64 {
    match format {
        WeightFormat::Nvfp4
        | WeightFormat::Fp8Block { .. }
        | WeightFormat::Affine { group: 64, scale: ScaleDtype::Bf16, .. } => 64,
        WeightFormat::Mxfp4 | WeightFormat::Mxfp8 => 32,
        _ => 0,
    }
}

/// Bytes of the scales of a row tile that stand beside its codes (`scale_tile_bytes` of packed.cuh).
pub(crate) fn scale_row_tile_bytes(name: &str, format: WeightFormat, cols: usize) -> Result<u64> {
    Ok(match format {
        WeightFormat::Fp8Block { block_cols, .. } if !block_cols.is_multiple_of(64) => {
            return Err(unsupported(name, format));
        }
        _ if inline_scale_bytes(format) > 0 => 0,
        WeightFormat::Affine { group: 32 | 64 | 128, scale, .. } => {
            format.scales_per_row(cols) as u64 * if scale == ScaleDtype::F32 { 128 } else { 64 }
        }
        _ => return Err(unsupported(name, format)),
    })
}

pub(crate) fn unsupported(name: &str, format: WeightFormat) -> Error {
    Error::UnsupportedFormat {
        backend: crate::driver::NAME,
        weight: name.to_owned(),
        format: format.to_string(),
        takes: "f32, f16, bf16, mxfp4, mxfp8, nvfp4, affine 2-6 and 8 bits with groups of 32, 64, 128, fp8 in blocks of 64 columns or multiples"
            .to_owned(),
    }
}
