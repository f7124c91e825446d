//! Weights on their way to the device. A matrix's bytes are copied through page-locked memory as they lie in the checkpoint, by as many
//! threads as rayon has, and repacked by a kernel; meanwhile the pieces before are on the bus.

use crate::args::{Pack, Packed};
use crate::driver::{Device, DevicePtr, Event, Kernel, Memory, Pinned, device_error};
use crate::kernels::Kernels;
use crate::weights::{DeviceWeight, format_name, inline_scale_bytes, lane_words, scale_row_tile_bytes, unsupported};
use moellon_ops::Result;
use moellon_tensor::{MatrixView, Rows, ScaleDtype, WeightFormat};
use rayon::prelude::*;

/// Bytes of one piece: parts of a matrix, or several small matrices. Threads meet at the end of each: four pieces of 16 MiB took 0.66 s for 13.4 GB
/// where two of 64 take 0.585 (receipt `cuda-load-variants`).
const PIECE: usize = 64 << 20;
/// Pieces in flight: one is filled, the other is copied and packed.
const SLOTS: usize = 2;
/// Bytes that a thread copies at a time. Most of its time goes into pages that nobody has touched yet.
const SHARE: usize = 1 << 20;

/// Where a piece waits on both sides.
struct Slot {
    pinned: Pinned,
    staging: Memory,
    /// The device has done with both.
    done: Event,
}

/// What the next piece will be.
#[derive(Default)]
struct Piece<'a> {
    /// Bytes so far.
    len: usize,
    /// What is copied from where, and where to, in order and without overlap.
    copies: Vec<(usize, &'a [u8])>,
    /// Kernels that repack parts of it: blocks, and arguments whose addresses count from the piece's start.
    packs: Vec<(u32, Pack)>,
}

impl<'a> Piece<'a> {
    /// Takes `count` rows; returns where they will be.
    fn put(&mut self, rows: Rows<'a>, count: usize) -> usize {
        let (start, row_bytes) = (self.len, rows.row_bytes());
        if rows.stride_bytes() == row_bytes {
            let whole = &rows.span(count)[..row_bytes * count];
            self.copies.extend(whole.chunks(SHARE).enumerate().map(|(i, part)| (start + i * SHARE, part)));
        } else {
            self.copies.extend((0..count).map(|row| (start + row * row_bytes, rows.row(row))));
        }
        // Kernels read 16 bytes at a time.
        self.len = (start + row_bytes * count).next_multiple_of(ALIGNMENT);
        start
    }

    /// Copies everything to `to`.
    fn fill(&self, mut to: &mut [u8]) {
        let mut at = 0;
        let mut pairs = Vec::with_capacity(self.copies.len());
        for (start, from) in &self.copies {
            let (part, rest) = to[start - at..].split_at_mut(from.len());
            at = start + from.len();
            pairs.push((part, *from));
            to = rest;
        }
        pairs.into_par_iter().for_each(|(to, from)| to.copy_from_slice(from));
    }
}

/// Of all that a piece holds.
const ALIGNMENT: usize = 256;

/// Copies matrices to the device and packs them.
pub(crate) struct Loader {
    slots: Vec<Slot>,
    next: usize,
}

impl Loader {
    pub(crate) fn new(device: &mut Device) -> Result<Self> {
        let slot = |device: &mut Device| -> Result<Slot> {
            let staging = device.alloc("loading weights", PIECE as u64)?;
            Ok(Slot { pinned: device.alloc_pinned(PIECE)?, staging, done: device.event()? })
        };
        Ok(Loader { slots: (0..SLOTS).map(|_| slot(device)).collect::<Result<_>>()?, next: 0 })
    }

    /// Loads matrices of one shape and format. When it returns the host has read them all; the device may be at work with the last.
    pub(crate) fn load(
        &mut self,
        name: &str,
        matrices: &[MatrixView<'_>],
        bias: Option<&[f32]>,
        device: &mut Device,
        kernels: &mut Kernels,
    ) -> Result<DeviceWeight> {
        let first = &matrices[0];
        let (format, rows, cols) = (first.format, first.rows, first.cols);
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
            let block = device.alloc(name, (matrices.len() * rows * format.code_row_bytes(cols)) as u64)?;
            self.copy_plain(name, matrices, block.pointer(), device)?;
            let plain = block.pointer();
            memory.push(block);
            let packed = Packed { bias, global_scales, ..Packed::default() };
            return Ok(DeviceWeight { format, rows, cols, plain, packed, _memory: memory });
        };
        let kernel = kernels.pack(&format!("pack_{kernel_name}"))?;
        let (mut packed, both) = packed_memory(name, format, [rows, cols], matrices.len() as u64, device)?;
        (packed.bias, packed.global_scales) = (bias, global_scales);
        self.pack(name, matrices, &packed, &kernel, device)?;
        memory.extend(both);
        Ok(DeviceWeight { format, rows, cols, plain: 0, packed, _memory: memory })
    }

    /// Copies matrices and repacks them, pieces of whole row tiles.
    fn pack(
        &mut self,
        name: &str,
        matrices: &[MatrixView<'_>],
        packed: &Packed,
        kernel: &Kernel,
        device: &mut Device,
    ) -> Result<()> {
        let (format, rows, cols) = (matrices[0].format, matrices[0].rows, matrices[0].cols);
        let code_row = format.code_row_bytes(cols);
        let scale_row = format.scales_per_row(cols) * format.scale_bytes();
        let per_row = code_row + scale_row * if format.has_offsets() { 2 } else { 1 };
        let piece_rows = ((PIECE - 3 * ALIGNMENT - 4 * scale_row) / per_row / 16 * 16).max(16);
        let (block_rows, block_cols) = match format {
            WeightFormat::Fp8Block { block_rows, block_cols } => (block_rows as usize, block_cols),
            _ => (1, 1),
        };
        let tiles = cols.div_ceil(64) as u64;
        let scale_row_tile = packed.scales_stride / rows.div_ceil(16) as u64;
        let mut piece = Piece::default();
        for (index, matrix) in matrices.iter().enumerate() {
            for begin in (0..rows).step_by(piece_rows) {
                let part = matrix.row_range(begin..(begin + piece_rows).min(rows));
                let scale_rows = match format {
                    WeightFormat::Fp8Block { .. } => (part.first_block_row + part.rows).div_ceil(block_rows),
                    _ => part.rows,
                };
                let offset_rows = if format.has_offsets() { part.rows } else { 0 };
                let needed = part.rows * code_row + (scale_rows + offset_rows) * scale_row + 3 * ALIGNMENT;
                if piece.len + needed > PIECE {
                    self.send(name, std::mem::take(&mut piece), kernel, device)?;
                }
                let codes = piece.put(part.codes, part.rows) as u64;
                let scales = piece.put(part.scales, scale_rows) as u64;
                let offsets = if offset_rows > 0 { piece.put(part.offsets, part.rows) as u64 } else { 0 };
                let row_tile = (begin / 16) as u64;
                let to = Packed {
                    codes: packed.codes
                        + 4 * (index as u64 * packed.codes_stride + row_tile * tiles * u64::from(packed.tile_words)),
                    scales: packed.scales + index as u64 * packed.scales_stride + row_tile * scale_row_tile,
                    rows: part.rows as u32,
                    ..*packed
                };
                let args = Pack {
                    to,
                    codes,
                    scales,
                    offsets,
                    code_row_bytes: code_row as u64,
                    scale_row_bytes: scale_row as u64,
                    first_block_row: part.first_block_row as u32,
                    block_rows: block_rows as u32,
                    block_cols,
                    pad: 0,
                };
                let blocks = (part.rows.div_ceil(16) as u64 * tiles).div_ceil(8).min(4096) as u32;
                piece.packs.push((blocks, args));
            }
        }
        self.send(name, piece, kernel, device)
    }

    /// Fills a slot that the device has done with, and has it copied and packed.
    fn send(&mut self, name: &str, piece: Piece<'_>, kernel: &Kernel, device: &mut Device) -> Result<()> {
        let base = self.upload(name, &piece, None, device)?;
        for (blocks, mut args) in piece.packs {
            args.codes += base;
            args.scales += base;
            args.offsets += base;
            device.launch(kernel, [blocks, 1, 1], 256, 0, &args)?;
        }
        device.separate();
        self.pass(device)
    }

    /// Copies a piece to the device, to `to` or its slot there; returns where it is.
    fn upload(
        &mut self,
        name: &str,
        piece: &Piece<'_>,
        to: Option<DevicePtr>,
        device: &mut Device,
    ) -> Result<DevicePtr> {
        if piece.len > PIECE {
            let message =
                format!("{name}: rows that belong together have {} bytes, expected at most {PIECE}", piece.len);
            return Err(device_error(message));
        }
        let slot = &mut self.slots[self.next];
        device.wait_for(&slot.done)?;
        let to = to.unwrap_or(slot.staging.pointer());
        let bytes = &mut slot.pinned.bytes_mut()[..piece.len];
        piece.fill(bytes);
        device.upload_async(to, bytes)?;
        Ok(to)
    }

    /// The slot is the device's until all that was asked for so far is done.
    fn pass(&mut self, device: &mut Device) -> Result<()> {
        device.record(&self.slots[self.next].done)?;
        self.next = (self.next + 1) % SLOTS;
        Ok(())
    }

    /// Copies the codes of plain matrices one behind the other.
    fn copy_plain(
        &mut self,
        name: &str,
        matrices: &[MatrixView<'_>],
        mut to: DevicePtr,
        device: &mut Device,
    ) -> Result<()> {
        let row_bytes = matrices[0].codes.row_bytes();
        let piece_rows = (PIECE / row_bytes.max(1)).max(1);
        for matrix in matrices {
            for begin in (0..matrix.rows).step_by(piece_rows) {
                let part = matrix.row_range(begin..(begin + piece_rows).min(matrix.rows));
                let mut piece = Piece::default();
                piece.put(part.codes, part.rows);
                piece.len = part.rows * row_bytes;
                self.upload(name, &piece, Some(to), device)?;
                self.pass(device)?;
                to += piece.len as u64;
            }
        }
        Ok(())
    }
}

/// Memory for the packed form of `count` matrices, and what kernels know of it but biases and global scales.
fn packed_memory(
    name: &str,
    format: WeightFormat,
    [rows, cols]: [usize; 2],
    count: u64,
    device: &mut Device,
) -> Result<(Packed, [Memory; 2])> {
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
        global_scales: 0,
        bias: 0,
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
    Ok((packed, [codes, scales]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_piece_holds_rows_one_behind_the_other() {
        let bytes: Vec<u8> = (0..=255).cycle().take(3 * SHARE).collect();
        let apart = Rows::new("apart", &bytes, 3, 5, 7).expect("they fit");
        let dense = Rows::new("dense", &bytes, 3, SHARE, SHARE).expect("they fit");
        let mut piece = Piece::default();
        assert_eq!(piece.put(apart, 3), 0);
        assert_eq!(piece.put(dense, 2), ALIGNMENT);
        assert_eq!(piece.len, ALIGNMENT + 2 * SHARE);
        let mut found = vec![77; piece.len];
        piece.fill(&mut found);
        let rows: Vec<u8> = (0..3).flat_map(|row| bytes[7 * row..][..5].to_vec()).collect();
        assert_eq!(found[..15], rows);
        assert!(found[15..ALIGNMENT].iter().all(|byte| *byte == 77), "nothing is written between parts");
        assert!(found[ALIGNMENT..] == bytes[..2 * SHARE]);
    }
}
