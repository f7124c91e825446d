//! Weights on the device: plain ones as they are, quantized ones in the packed layout of `kernels/packed.cuh`. A matrix's bytes
//! are copied through page-locked memory as they lie in the checkpoint and repacked by a kernel, two pieces in flight.

use crate::args::{Pack, Packed};
use crate::driver::{Device, DevicePtr, Memory, Pinned, device_error};
use crate::kernels::Kernels;
use moellon_ops::{Error, Result};
use moellon_tensor::{MatrixView, ScaleDtype, WeightFormat};

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
/// Bytes of 64 columns of so many rows of activations (`BLOCKED_BYTES`).
pub(crate) const BLOCKED_BYTES: usize = PROMPT_TOKENS * 136;

/// Shared memory of `prompt_*` (`Stage` of prompt.cu): stages of digits, a kilobyte of ones, rings of tiles of weights, the totals of its threads.
pub(crate) fn prompt_bytes(format: WeightFormat) -> u32 {
    let slots = if lane_words(format) == 8 { 4 } else { 8 };
    let weights = slots * (PROMPT_ROWS / 16) as u32 * tile_bytes(format);
    8 * (BLOCKED_BYTES as u32).next_multiple_of(1024) + 1024 + weights + (PROMPT_ROWS * PROMPT_TOKENS * 4) as u32
}

/// Bytes of a tile with its scales behind it.
pub(crate) fn tile_bytes(format: WeightFormat) -> u32 {
    let scales = if matches!(format, WeightFormat::Mxfp4 | WeightFormat::Mxfp8) { 32 } else { 64 };
    lane_words(format) as u32 * 128 + scales
}

/// Words of codes that a lane has in a tile (`Words` of packed.cuh).
fn lane_words(format: WeightFormat) -> u64 {
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
    _memory: Vec<Memory>,
}

impl DeviceWeight {
    /// Address of the biases, 0 for none.
    pub(crate) fn bias(&self) -> DevicePtr {
        self.packed.bias
    }
}

/// Bytes of one piece of a matrix on its way to the device.
const PIECE: usize = 32 << 20;

/// Copies matrices to the device and packs them.
pub(crate) struct Loader {
    pinned: [Pinned; 2],
    staging: [Memory; 2],
    next: usize,
    in_flight: usize,
}

impl Loader {
    pub(crate) fn new(device: &mut Device) -> Result<Self> {
        Ok(Loader {
            pinned: [device.alloc_pinned(PIECE)?, device.alloc_pinned(PIECE)?],
            staging: [device.alloc("loading weights", PIECE as u64)?, device.alloc("loading weights", PIECE as u64)?],
            next: 0,
            in_flight: 0,
        })
    }

    /// Loads matrices of one shape and format.
    pub(crate) fn load(
        &mut self,
        name: &str,
        matrices: &[MatrixView<'_>],
        bias: Option<&[f32]>,
        device: &mut Device,
        kernels: &mut Kernels,
    ) -> Result<DeviceWeight> {
        let first = &matrices[0];
        let (format, rows, cols, count) = (first.format, first.rows, first.cols, matrices.len() as u64);
        let mut memory = Vec::new();
        let mut floats = |device: &mut Device, values: &[f32]| -> Result<DevicePtr> {
            let block = device.alloc(name, 4 * values.len() as u64)?;
            device.upload(block.pointer(), bytemuck::cast_slice(values))?;
            let pointer = block.pointer();
            memory.push(block);
            Ok(pointer)
        };
        let bias = bias.map_or(Ok(0), |b| floats(device, b))?;
        let global: Vec<f32> = matrices.iter().map(|m| m.global_scale).collect();
        let global_scales = if global.iter().all(|g| *g == 1.0) { 0 } else { floats(device, &global)? };
        let Some(kernel_name) = format_name(format) else {
            if matches!(format, WeightFormat::Affine { .. }) {
                return Err(unsupported(name, format));
            }
            let row_bytes = format.code_row_bytes(cols);
            let block = device.alloc(name, count * (rows * row_bytes) as u64)?;
            let mut to = block.pointer();
            for matrix in matrices {
                self.copy_rows(matrix, to, device)?;
                to += (rows * row_bytes) as u64;
            }
            device.synchronize()?;
            self.in_flight = 0;
            let plain = block.pointer();
            memory.push(block);
            let packed = Packed { bias, global_scales, ..Packed::default() };
            return Ok(DeviceWeight { format, rows, cols, plain, packed, _memory: memory });
        };
        let kernel = kernels.pack(&format!("pack_{kernel_name}"))?;
        let (row_tiles, tiles) = (rows.div_ceil(16) as u64, cols.div_ceil(64) as u64);
        let inline_bytes = inline_scale_bytes(format);
        let tile_words = lane_words(format) * 32 + inline_bytes / 4;
        let scale_row_tile = scale_row_tile_bytes(name, format, cols)?;
        let codes = device.alloc(name, count * row_tiles * tiles * tile_words * 4)?;
        // The last tile of a row may hold half a group more than there are columns: zeroed, never read as garbage.
        let scales = device.alloc_zeroed(name, count * row_tiles * scale_row_tile)?;
        let (group, scale_f32, scale_f16) = match format {
            WeightFormat::Affine { group, scale, .. } => {
                (group, u32::from(scale == ScaleDtype::F32), u32::from(scale == ScaleDtype::F16))
            }
            _ => (64, 0, 0),
        };
        let packed = Packed {
            codes: codes.pointer(),
            scales: scales.pointer(),
            global_scales,
            bias,
            codes_stride: row_tiles * tiles * tile_words,
            scales_stride: row_tiles * scale_row_tile,
            rows: rows as u32,
            cols: cols as u32,
            group,
            scale_f32,
            scale_f16,
            inline_scales: u32::from(inline_bytes > 0),
            tile_words: tile_words as u32,
            pad: 0,
        };
        let (block_rows, block_cols) = match format {
            WeightFormat::Fp8Block { block_rows, block_cols } => (block_rows as usize, block_cols),
            _ => (1, 1),
        };
        for (index, matrix) in matrices.iter().enumerate() {
            let code_row = format.code_row_bytes(cols);
            let scale_row = format.scales_per_row(cols) * format.scale_bytes();
            let per_row = code_row + scale_row * if format.has_offsets() { 2 } else { 1 };
            // Pieces are whole row tiles.
            let piece_rows = ((PIECE - 64 * 1024 - 4 * scale_row) / per_row / 16 * 16).max(16);
            for begin in (0..rows).step_by(piece_rows) {
                let end = (begin + piece_rows).min(rows);
                let part = matrix.row_range(begin..end);
                let scale_rows = match format {
                    WeightFormat::Fp8Block { .. } => (part.first_block_row + part.rows).div_ceil(block_rows),
                    _ => part.rows,
                };
                let mut cursor = 0;
                let slot = self.slot(device)?;
                let bytes = self.pinned[slot].bytes_mut();
                let mut put = |rows: moellon_tensor::Rows<'_>, count: usize| -> Result<usize> {
                    let start = cursor;
                    cursor += copy_span(rows, count, &mut bytes[start..], name)?;
                    cursor = cursor.next_multiple_of(256);
                    Ok(start)
                };
                let codes_at = put(part.codes, part.rows)?;
                let scales_at = put(part.scales, scale_rows)?;
                let offsets_at = if format.has_offsets() { put(part.offsets, part.rows)? } else { 0 };
                let used = cursor.min(PIECE);
                let base = self.staging[slot].pointer();
                device.upload_async(base, &self.pinned[slot].bytes_mut()[..used])?;
                let row_tile = (begin / 16) as u64;
                let to = Packed {
                    codes: packed.codes + 4 * (index as u64 * packed.codes_stride + row_tile * tiles * tile_words),
                    scales: packed.scales + index as u64 * packed.scales_stride + row_tile * scale_row_tile,
                    rows: part.rows as u32,
                    ..packed
                };
                let args = Pack {
                    to,
                    codes: base + codes_at as u64,
                    scales: base + scales_at as u64,
                    offsets: base + offsets_at as u64,
                    code_row_bytes: code_row as u64,
                    scale_row_bytes: scale_row as u64,
                    first_block_row: part.first_block_row as u32,
                    block_rows: block_rows as u32,
                    block_cols,
                    pad: 0,
                };
                let warps = (part.rows.div_ceil(16) as u64 * tiles).div_ceil(8).min(4096) as u32;
                device.launch(&kernel, [warps, 1, 1], 256, 0, &args)?;
            }
        }
        device.synchronize()?;
        self.in_flight = 0;
        memory.extend([codes, scales]);
        Ok(DeviceWeight { format, rows, cols, plain: 0, packed, _memory: memory })
    }

    /// A staging slot that the device has done with. Two pieces are in flight: the host fills one while the other is copied.
    fn slot(&mut self, device: &mut Device) -> Result<usize> {
        if self.in_flight == 2 {
            device.synchronize()?;
            self.in_flight = 0;
        }
        self.in_flight += 1;
        self.next = 1 - self.next;
        Ok(self.next)
    }

    /// Copies the codes of a plain matrix as they are.
    fn copy_rows(&mut self, matrix: &MatrixView<'_>, mut to: DevicePtr, device: &mut Device) -> Result<()> {
        let row_bytes = matrix.codes.row_bytes();
        let piece_rows = (PIECE / row_bytes.max(1)).max(1);
        for begin in (0..matrix.rows).step_by(piece_rows) {
            let part = matrix.row_range(begin..(begin + piece_rows).min(matrix.rows));
            let slot = self.slot(device)?;
            let used = copy_span(part.codes, part.rows, self.pinned[slot].bytes_mut(), "plain weight")?;
            device.upload_async(to, &self.pinned[slot].bytes_mut()[..used])?;
            to += used as u64;
        }
        Ok(())
    }
}

/// Copies `count` rows one after another; returns the bytes.
fn copy_span(rows: moellon_tensor::Rows<'_>, count: usize, to: &mut [u8], name: &str) -> Result<usize> {
    let total = rows.row_bytes() * count;
    let Some(to) = to.get_mut(..total) else {
        return Err(device_error(format!(
            "{name}: a row of {} bytes does not fit a piece of {PIECE}",
            rows.row_bytes()
        )));
    };
    if rows.stride_bytes() == rows.row_bytes() {
        to.copy_from_slice(&rows.span(count)[..total]);
    } else {
        for (row, to) in to.chunks_exact_mut(rows.row_bytes()).enumerate() {
            to.copy_from_slice(rows.row(row));
        }
    }
    Ok(total)
}

/// Bytes of scales behind the codes of each tile; 0 where scales stand beside (packed.cuh).
fn inline_scale_bytes(format: WeightFormat) -> u64 {
    match format {
        WeightFormat::Nvfp4
        | WeightFormat::Fp8Block { .. }
        | WeightFormat::Affine { group: 64, scale: ScaleDtype::Bf16, .. } => 64,
        WeightFormat::Mxfp4 | WeightFormat::Mxfp8 => 32,
        _ => 0,
    }
}

/// Bytes of the scales of a row tile that stand beside its codes (`scale_tile_bytes` of packed.cuh).
fn scale_row_tile_bytes(name: &str, format: WeightFormat, cols: usize) -> Result<u64> {
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

fn unsupported(name: &str, format: WeightFormat) -> Error {
    Error::UnsupportedFormat {
        backend: crate::driver::NAME,
        weight: name.to_owned(),
        format: format.to_string(),
        takes: "f32, f16, bf16, mxfp4, mxfp8, nvfp4, affine 2-6 and 8 bits with groups of 32, 64, 128, fp8 in blocks of 64 columns or multiples"
            .to_owned(),
    }
}
