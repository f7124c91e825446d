//! Repacking checkpoint matrices into tiles ([`crate::layout`]) and reading rows back.
//!
//! `unsafe`: threads fill different tiles of one buffer.
#![allow(unsafe_code)]

use crate::disjoint::Disjoint;
use crate::layout::{
    BLOCK_COLS, Coding, LINE_BYTES, TILE_ROWS, TileLayout, code_parts, nvfp4_scale, nvfp4_scale_value,
};
use moellon_tensor::arena::AlignedBuf;
use moellon_tensor::bits::unpack_codes;
use moellon_tensor::minifloat::{E2M1, E4M3_WITHOUT_NAN, E8M0};
use moellon_tensor::pool::{Pool, partition};
use moellon_tensor::{MatrixView, ScaleDtype, WeightFormat};
use std::io;
use std::ops::Range;

/// Where the tiles of one or several matrices of one shape stand in a buffer.
#[derive(Debug, Clone)]
pub(crate) struct TileMap {
    /// The shape of a tile.
    pub(crate) layout: TileLayout,
    /// Matrices.
    pub(crate) count: usize,
    /// Rows of each.
    pub(crate) rows: usize,
    /// Tiles of each.
    pub(crate) tiles: usize,
    /// First tile of the first matrix.
    offset: usize,
    /// Bytes between two tiles of a matrix (more than a tile where gate and up alternate).
    tile_stride: usize,
    /// Bytes between two matrices.
    matrix_stride: usize,
    /// `[count]`: what a matrix's products are multiplied with at the end.
    pub(crate) global_scales: Vec<f32>,
}

impl TileMap {
    /// A map for `matrices`, which agree in shape and format, with tiles `tile_stride` and matrices `matrix_stride`
    /// bytes apart; zero strides mean packed without gaps.
    fn new(
        matrices: &[MatrixView<'_>],
        layout: TileLayout,
        offset: usize,
        [tile_stride, matrix_stride]: [usize; 2],
    ) -> Self {
        let tiles = matrices[0].rows.div_ceil(TILE_ROWS);
        let global_scales = matrices.iter().map(|m| m.global_scale).collect();
        TileMap {
            layout,
            count: matrices.len(),
            rows: matrices[0].rows,
            tiles,
            offset,
            tile_stride,
            matrix_stride,
            global_scales,
        }
    }

    /// Where tile `tile` of matrix `matrix` starts.
    pub(crate) fn tile_offset(&self, matrix: usize, tile: usize) -> usize {
        self.offset + matrix * self.matrix_stride + tile * self.tile_stride
    }
}

/// Matrices of one shape and format, one after the other.
#[derive(Debug)]
pub(crate) struct PackedMatrices {
    /// All tiles.
    pub(crate) bytes: AlignedBuf<u8>,
    /// Where they stand.
    pub(crate) map: TileMap,
}

/// Pairs of matrices of one shape (gate and up), tiles alternating, so that a pair is one sequential stream.
#[derive(Debug)]
pub(crate) struct PackedPairs {
    /// All tiles.
    pub(crate) bytes: AlignedBuf<u8>,
    /// The first of each pair.
    pub(crate) gate: TileMap,
    /// The second.
    pub(crate) up: TileMap,
}

/// The layout that fits all of `matrices`.
fn layout_of(matrices: &[MatrixView<'_>]) -> TileLayout {
    let first = &matrices[0];
    let shared = matrices.iter().all(|m| match m.format {
        WeightFormat::Fp8Block { block_rows, .. } => {
            let block_row = |row: usize| (m.first_block_row + row) / block_rows as usize;
            (0..m.rows).step_by(TILE_ROWS).all(|row| block_row(row) == block_row((row + TILE_ROWS).min(m.rows) - 1))
        }
        WeightFormat::F32
        | WeightFormat::F16
        | WeightFormat::Bf16
        | WeightFormat::Affine { .. }
        | WeightFormat::Mxfp4
        | WeightFormat::Mxfp8
        | WeightFormat::Nvfp4 => true,
    });
    TileLayout::new(first.format, first.cols, shared)
}

impl PackedMatrices {
    /// Repacks `matrices` (at least one, of one shape and format) on all threads. Each thread fills the tiles that it
    /// will read later, so that they lie on its NUMA node.
    ///
    /// # Errors
    /// If memory runs out.
    pub(crate) fn pack(pool: &Pool, matrices: &[MatrixView<'_>]) -> io::Result<Self> {
        let layout = layout_of(matrices);
        let tiles = matrices[0].rows.div_ceil(TILE_ROWS);
        let map = TileMap::new(matrices, layout, 0, [layout.tile_bytes, tiles * layout.tile_bytes]);
        let mut bytes = AlignedBuf::zeroed(matrices.len() * tiles * layout.tile_bytes)?;
        fill(pool, &mut bytes, &[(matrices, &map)]);
        Ok(PackedMatrices { bytes, map })
    }

    /// Decodes columns `cols` of row `row` of matrix `matrix` into `out`, to the bits that [`MatrixView::decode_row`]
    /// gives.
    pub(crate) fn unpack_columns(&self, matrix: usize, row: usize, cols: Range<usize>, out: &mut [f32]) {
        unpack_columns(&self.bytes, &self.map, matrix, row, cols, out);
    }
}

impl PackedPairs {
    /// Repacks pairs of matrices: `gate` and `up` have equally many of one shape; formats may differ.
    ///
    /// # Errors
    /// If memory runs out.
    pub(crate) fn pack(pool: &Pool, gate: &[MatrixView<'_>], up: &[MatrixView<'_>]) -> io::Result<Self> {
        let (gate_layout, up_layout) = (layout_of(gate), layout_of(up));
        let tiles = gate[0].rows.div_ceil(TILE_ROWS);
        let tile_stride = gate_layout.tile_bytes + up_layout.tile_bytes;
        let strides = [tile_stride, tiles * tile_stride];
        let gate_map = TileMap::new(gate, gate_layout, 0, strides);
        let up_map = TileMap::new(up, up_layout, gate_layout.tile_bytes, strides);
        let mut bytes = AlignedBuf::zeroed(gate.len() * tiles * tile_stride)?;
        fill(pool, &mut bytes, &[(gate, &gate_map), (up, &up_map)]);
        Ok(PackedPairs { bytes, gate: gate_map, up: up_map })
    }
}

/// Packs every tile of every list, each matrix's tiles split among the threads.
fn fill(pool: &Pool, bytes: &mut [u8], lists: &[(&[MatrixView<'_>], &TileMap)]) {
    let target = Disjoint::new(bytes);
    pool.run(|index, num_threads| {
        let mut codes = Vec::new();
        for matrix in 0..lists[0].0.len() {
            for tile in partition(lists[0].1.tiles, num_threads, index, 1) {
                for (matrices, map) in lists {
                    let start = map.tile_offset(matrix, tile);
                    // SAFETY: tiles do not overlap, and each is packed by one thread.
                    let out = unsafe { target.part(start..start + map.layout.tile_bytes) };
                    pack_tile(&matrices[matrix], &map.layout, tile, &mut codes, out);
                }
            }
        }
    });
}

/// Packs rows `16 tile ..` of `matrix` into `out`, which is zeroed. `codes` is work space.
fn pack_tile(matrix: &MatrixView<'_>, layout: &TileLayout, tile: usize, codes: &mut Vec<u8>, out: &mut [u8]) {
    let rows = tile * TILE_ROWS..((tile + 1) * TILE_ROWS).min(matrix.rows);
    for (lane, row) in rows.enumerate() {
        match layout.coding {
            Coding::F32 => pack_floats::<4>(layout, matrix.codes.row(row), lane, out, |col| (col, 0)),
            Coding::F16 => pack_floats::<2>(layout, matrix.codes.row(row), lane, out, |col| (col, 0)),
            Coding::Bf16 => pack_floats::<2>(layout, matrix.codes.row(row), lane, out, |col| (col / 2, col % 2)),
            Coding::Fp8Block | Coding::Mxfp8 | Coding::Affine { .. } | Coding::Mxfp4 | Coding::Nvfp4 => {
                let bits = layout.format.code_bits();
                codes.clear();
                codes.resize(layout.padded_cols(), 0);
                unpack_codes(matrix.codes.row(row), bits, 0, &mut codes[..matrix.cols]);
                if layout.coding == Coding::Nvfp4 {
                    take_signs(matrix.scale_row(row), codes);
                }
                pack_codes(layout, bits, codes, lane, out);
                pack_scales(matrix, layout, row, lane, out);
            }
        }
    }
}

/// Floats of `N` bytes: `place(col)` is the group of 16 rows and the position in the lane's slot.
fn pack_floats<const N: usize>(
    layout: &TileLayout,
    row: &[u8],
    lane: usize,
    out: &mut [u8],
    place: impl Fn(usize) -> (usize, usize),
) {
    // A bf16 lane slot holds a pair: the slot is 4 bytes although a number is 2.
    let slot_bytes = if layout.coding == Coding::Bf16 { 2 * N } else { N };
    for (col, value) in row.chunks_exact(N).enumerate() {
        let (group, within) = place(col);
        out[group * TILE_ROWS * slot_bytes + lane * slot_bytes + within * N..][..N].copy_from_slice(value);
    }
}

/// Gives NVFP4 codes (one a byte, 16 a scale) what [`nvfp4_scale`] does not hold: signs and zeros of their scales.
fn take_signs(scales: &[u8], codes: &mut [u8]) {
    const SIGN: u8 = 8;
    for (scale, codes) in scales.iter().zip(codes.chunks_exact_mut(16)) {
        let flipped = if scale & 0x80 == 0 { 0 } else { SIGN };
        let kept = if nvfp4_scale(*scale).is_some() { 0xf } else { SIGN };
        if flipped != 0 || kept == SIGN {
            for code in codes {
                *code = (*code ^ flipped) & kept;
            }
        }
    }
}

/// One row's codes (`[padded_cols]`, one a byte) into the lines of every block.
fn pack_codes(layout: &TileLayout, bits: usize, codes: &[u8], lane: usize, out: &mut [u8]) {
    for (block, codes) in codes.chunks_exact(BLOCK_COLS).enumerate() {
        // Word m: columns 4m .. 4m + 3, a byte each.
        let mut words = [0u32; 8];
        for (word, four) in words.iter_mut().zip(codes.chunks_exact(4)) {
            *word = u32::from_le_bytes([four[0], four[1], four[2], four[3]]);
        }
        let mut lines = [0u32; 8];
        for (m, word) in words.iter().enumerate() {
            for part in code_parts(bits, m).into_iter().flatten() {
                let mask = 0x0101_0101 * u32::from(part.mask());
                lines[part.line] |= ((word >> part.lowest) & mask) << part.shift;
            }
        }
        let start = layout.block_offset(block) + 4 * lane;
        for (number, line) in lines[..bits].iter().enumerate() {
            out[start + number * LINE_BYTES..][..4].copy_from_slice(&line.to_le_bytes());
        }
    }
}

/// One row's scales (and offsets) into their records.
fn pack_scales(matrix: &MatrixView<'_>, layout: &TileLayout, row: usize, lane: usize, out: &mut [u8]) {
    let scales = matrix.scale_row(row);
    match layout.coding {
        Coding::Affine { .. } => {
            let size = layout.scale_dtype.size_bytes();
            let offsets = matrix.offsets.row(row);
            for group in 0..layout.blocks / layout.record_blocks {
                let at = layout.scale_offset(group * layout.record_blocks) + lane * size;
                out[at..][..size].copy_from_slice(&scales[group * size..][..size]);
                out[at + TILE_ROWS * size..][..size].copy_from_slice(&offsets[group * size..][..size]);
            }
        }
        Coding::Nvfp4 => {
            for (group, scale) in scales.iter().enumerate() {
                // Two groups a block, four a record.
                out[layout.scale_offset(group / 2) + 4 * lane + group % 4] = nvfp4_scale(*scale).unwrap_or(0);
            }
        }
        Coding::Mxfp4 | Coding::Mxfp8 => {
            let group_cols = layout.format.group().expect("these formats have groups");
            for (group, scale) in scales.iter().enumerate() {
                let block = group * group_cols / BLOCK_COLS;
                let within = group % (layout.record_blocks * BLOCK_COLS / group_cols);
                out[layout.scale_offset(block) + within * TILE_ROWS + lane] = *scale;
            }
        }
        Coding::Fp8Block => {
            // Rows that share a scale write the same number to the same place.
            let lane = if layout.fp8_scale_lanes == 1 { 0 } else { lane };
            for (group, scale) in scales.chunks_exact(4).enumerate() {
                out[(group * layout.fp8_scale_lanes + lane) * 4..][..4].copy_from_slice(scale);
            }
        }
        Coding::F32 | Coding::F16 | Coding::Bf16 => {}
    }
}

/// Decodes a part of one row of packed tiles.
fn unpack_columns(bytes: &[u8], map: &TileMap, matrix: usize, row: usize, cols: Range<usize>, out: &mut [f32]) {
    let layout = &map.layout;
    assert!(
        cols.end <= layout.cols && cols.len() == out.len(),
        "columns {cols:?} of {} into {}",
        layout.cols,
        out.len()
    );
    assert!(
        matrix < map.count && row < map.rows,
        "row {row} of matrix {matrix}, expected below {} of {}",
        map.rows,
        map.count
    );
    let tile = &bytes[map.tile_offset(matrix, row / TILE_ROWS)..][..layout.tile_bytes];
    let lane = row % TILE_ROWS;
    let global_scale = map.global_scales[matrix];
    let mut out = out.iter_mut();
    for block in cols.start / BLOCK_COLS..cols.end.div_ceil(BLOCK_COLS) {
        let here = cols.start.max(block * BLOCK_COLS)..cols.end.min((block + 1) * BLOCK_COLS);
        let codes = unpack_block(tile, layout, lane, block);
        let code = |col: usize| codes[col % BLOCK_COLS];
        let scales_at = layout.scale_offset(block);
        let e8m0_scale = || E8M0[usize::from(tile[scales_at + block % layout.record_blocks * TILE_ROWS + lane])];
        let out = here.clone().zip(&mut out);
        match layout.coding {
            Coding::F32 => {
                out.for_each(|(col, out)| *out = ScaleDtype::F32.read(tile, col * TILE_ROWS + lane) * global_scale)
            }
            Coding::F16 => {
                out.for_each(|(col, out)| *out = ScaleDtype::F16.read(tile, col * TILE_ROWS + lane) * global_scale)
            }
            Coding::Bf16 => out.for_each(|(col, out)| {
                *out = ScaleDtype::Bf16.read(tile, (col / 2 * TILE_ROWS + lane) * 2 + col % 2) * global_scale;
            }),
            Coding::Affine { .. } => {
                let scales = &tile[scales_at..];
                let scale = layout.scale_dtype.read(scales, lane);
                let offset = layout.scale_dtype.read(scales, TILE_ROWS + lane);
                out.for_each(|(col, out)| *out = (f32::from(code(col)) * scale + offset) * global_scale);
            }
            Coding::Mxfp4 => {
                let scale = e8m0_scale() * global_scale;
                out.for_each(|(col, out)| *out = E2M1[usize::from(code(col))] * scale);
            }
            Coding::Nvfp4 => out.for_each(|(col, out)| {
                let scale = nvfp4_scale_value(tile[scales_at + 4 * lane + col / 16 % 4]);
                *out = E2M1[usize::from(code(col))] * (scale * global_scale);
            }),
            Coding::Mxfp8 => {
                let scale = e8m0_scale() * global_scale;
                out.for_each(|(col, out)| *out = E4M3_WITHOUT_NAN[usize::from(code(col))] * scale);
            }
            Coding::Fp8Block => {
                let lane = if layout.fp8_scale_lanes == 1 { 0 } else { lane };
                out.for_each(|(col, out)| {
                    let at = col / layout.fp8_block_cols * layout.fp8_scale_lanes + lane;
                    *out = E4M3_WITHOUT_NAN[usize::from(code(col))] * (ScaleDtype::F32.read(tile, at) * global_scale);
                });
            }
        }
    }
}

/// The codes of lane `lane` of block `block`, one a column; zeros where weights are floats.
fn unpack_block(tile: &[u8], layout: &TileLayout, lane: usize, block: usize) -> [u8; BLOCK_COLS] {
    let mut codes = [0; BLOCK_COLS];
    if matches!(layout.coding, Coding::F32 | Coding::F16 | Coding::Bf16) {
        return codes;
    }
    let bits = layout.format.code_bits();
    let start = layout.block_offset(block) + 4 * lane;
    // As `pack_codes` left them: a word of each line.
    let mut lines = [0u32; 8];
    for (number, line) in lines[..bits].iter_mut().enumerate() {
        *line = u32::from_le_bytes(*tile[start + number * LINE_BYTES..].first_chunk().expect("blocks are whole lines"));
    }
    for (m, four) in codes.chunks_exact_mut(4).enumerate() {
        let mut word = 0;
        for part in code_parts(bits, m).into_iter().flatten() {
            word |= (lines[part.line] >> part.shift & (0x0101_0101 * u32::from(part.mask()))) << part.lowest;
        }
        four.copy_from_slice(&word.to_le_bytes());
    }
    codes
}

#[cfg(test)]
pub(crate) mod tests;
