//! Weights on the device. Codes lie as in the checkpoint, row after row: a chunk of 32 columns is a whole number of words in every format,
//! and neighbouring invocations have neighbouring chunks, so nothing needs to be interleaved (`kernels/product.wgsl`). Rows are padded to
//! whole chunks. Scales are repacked so that what a chunk needs is one word (two for f32 scales with offsets).
//!
//! A weight that is larger than one binding of the adapter is cut into shards: ranges of matrices, or of rows of one matrix.

use crate::device::{Device, Memory, NAME, wait};
use crate::kernels::{Code, Company, ROWS, ScaleKind};
use moellon_ops::{Error, Result};
use moellon_tensor::{MatrixView, WeightFormat};

/// Bytes that are handed to the queue at a time.
const PIECE: usize = 16 << 20;

/// A range of a weight in memory of its own.
pub(crate) struct Shard {
    pub(crate) codes: Memory,
    pub(crate) scales: Memory,
    pub(crate) first_matrix: usize,
    pub(crate) num_matrices: usize,
    /// Rows of each of its matrices.
    pub(crate) first_row: usize,
    pub(crate) num_rows: usize,
}

/// One or several matrices on the device.
pub(crate) struct DeviceWeight {
    pub(crate) code: Code,
    pub(crate) count: usize,
    pub(crate) rows: usize,
    /// Chunks of a row.
    pub(crate) chunks: usize,
    /// Invocations of a team: a function of the shape alone, because the order of sums depends on it.
    pub(crate) lanes: usize,
    /// Words of scales of a row.
    pub(crate) scale_words: usize,
    /// FP8: columns that share a scale.
    pub(crate) block_columns: usize,
    pub(crate) shards: Vec<Shard>,
    /// Global scales `[count]` where there are any, then biases `[count, rows]` where there are any.
    pub(crate) extra: Memory,
    pub(crate) has_global: bool,
    pub(crate) has_bias: bool,
}

impl DeviceWeight {
    /// Copies matrices of one shape and format to the device.
    pub(crate) fn load(
        name: &str,
        matrices: &[MatrixView<'_>],
        bias: Option<&[f32]>,
        company: Company,
        device: &mut Device,
    ) -> Result<Self> {
        let first = &matrices[0];
        let (format, rows, cols, count) = (first.format, first.rows, first.cols, matrices.len());
        let Some(code) = Code::of(format).filter(|code| *code != Code::F16 || device.self_test.half_subnormals) else {
            return Err(unsupported(name, format));
        };
        let chunks = cols.div_ceil(32);
        let row_bytes = chunks * code.chunk_words() * 4;
        let block_columns = match format {
            WeightFormat::Fp8Block { block_cols, .. } => block_cols as usize,
            _ => 32,
        };
        let scale_words = scale_words(code, cols, block_columns);
        let largest = (row_bytes.max(scale_words * 4) as u64).max(1);
        let rows_per_shard = (device.max_binding_bytes() / largest) as usize;
        if rows_per_shard == 0 {
            return Err(Error::OutOfMemory {
                backend: NAME,
                what: format!("a row of {name} in one buffer of this adapter"),
                needed_bytes: largest,
                free_bytes: device.max_binding_bytes(),
            });
        }
        let mut shards = Vec::new();
        if rows_per_shard >= rows {
            let matrices_per_shard = (rows_per_shard / rows.max(1)).max(1);
            for first_matrix in (0..count).step_by(matrices_per_shard) {
                let num_matrices = matrices_per_shard.min(count - first_matrix);
                shards.push((first_matrix, num_matrices, 0, rows));
            }
        } else {
            let step = (rows_per_shard / ROWS * ROWS).max(1);
            for matrix in 0..count {
                shards.extend((0..rows).step_by(step).map(|row| (matrix, 1, row, step.min(rows - row))));
            }
        }
        let shards = shards
            .into_iter()
            .map(|(first_matrix, num_matrices, first_row, num_rows)| {
                let total_rows = (num_matrices * num_rows) as u64;
                let mut codes = Upload::new(name, total_rows * row_bytes as u64, device)?;
                let mut scales = Upload::new(name, total_rows * 4 * scale_words as u64, device)?;
                for (i, matrix) in matrices[first_matrix..first_matrix + num_matrices].iter().enumerate() {
                    let part = matrix.row_range(first_row..first_row + num_rows);
                    codes.codes(i * num_rows * row_bytes, row_bytes, &part)?;
                    scales.scales(i * num_rows * scale_words * 4, code, scale_words, &part)?;
                }
                let (codes, scales) = (codes.finish()?, scales.finish()?);
                Ok(Shard { codes, scales, first_matrix, num_matrices, first_row, num_rows })
            })
            .collect::<Result<Vec<Shard>>>()?;
        let globals: Vec<f32> = matrices.iter().map(|m| m.global_scale).collect();
        let has_global = globals.iter().any(|g| *g != 1.0);
        let mut floats = if has_global { globals } else { Vec::new() };
        floats.extend_from_slice(bias.unwrap_or_default());
        let mut extra = Upload::new(name, 4 * floats.len() as u64, device)?;
        extra.write(0, bytemuck::cast_slice(&floats))?;
        let extra = extra.finish()?;
        let beside = match company {
            Company::Alone => 1,
            Company::Heads => count,
            Company::Experts => count.min(8),
        };
        Ok(DeviceWeight {
            code,
            count,
            rows,
            chunks,
            lanes: lanes(rows * beside, chunks),
            scale_words,
            block_columns,
            shards,
            extra,
            has_global,
            has_bias: bias.is_some(),
        })
    }
}

impl DeviceWeight {
    /// Where biases start in `extra`.
    pub(crate) fn bias_offset(&self) -> usize {
        if self.has_global { self.count } else { 0 }
    }

    /// What `extra` has, as kernels take it: bias, and twice a global scale.
    pub(crate) fn has(&self) -> usize {
        usize::from(self.has_bias) + 2 * usize::from(self.has_global)
    }
}

/// Invocations of a team. Few rows get large teams, so that every part of the adapter has work.
fn lanes(rows: usize, chunks: usize) -> usize {
    const WORKGROUPS: usize = 512;
    let largest = chunks.next_power_of_two().min(256);
    let mut lanes = largest.min(32);
    while lanes < largest && rows.div_ceil(ROWS * 256 / lanes) < WORKGROUPS {
        lanes *= 2;
    }
    lanes
}

/// Words of scales of a row of `cols` columns.
fn scale_words(code: Code, cols: usize, block_columns: usize) -> usize {
    match code {
        Code::Affine { group, scale, .. } => {
            cols.div_ceil(group as usize) * if scale == ScaleKind::F32 { 2 } else { 1 }
        }
        Code::Nvfp4 => cols.div_ceil(64),
        Code::Mxfp4 | Code::Mxfp8 => cols.div_ceil(128),
        Code::Fp8 => cols.div_ceil(block_columns),
        Code::F32 | Code::F16 | Code::Bf16 => 0,
    }
}

/// Memory that is being filled: by the host itself where it is the host's memory too, else by copies, a piece at a time.
struct Upload {
    /// Its own handles: the device is free to make more memory.
    device: wgpu::Device,
    queue: wgpu::Queue,
    to: Memory,
    mapped: Option<wgpu::BufferViewMut>,
    in_flight: usize,
    row: Vec<u8>,
}

impl Upload {
    fn new(what: &str, bytes: u64, device: &mut Device) -> Result<Self> {
        let (to, mapped) = device.alloc_to_fill(what, bytes)?;
        Ok(Upload {
            device: device.device.clone(),
            queue: device.queue.clone(),
            to,
            mapped,
            in_flight: 0,
            row: Vec::new(),
        })
    }

    fn write(&mut self, at: usize, bytes: &[u8]) -> Result<()> {
        if let Some(mapped) = &mut self.mapped {
            mapped.slice(at..at + bytes.len()).copy_from_slice(bytes);
            return Ok(());
        }
        self.queue.write_buffer(&self.to.buffer, self.to.offset + at as u64, bytes);
        self.in_flight += bytes.len();
        // The queue keeps copies until they are submitted.
        if self.in_flight >= 4 * PIECE { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<()> {
        self.in_flight = 0;
        self.queue.submit([]);
        wait(&self.device)
    }

    fn finish(mut self) -> Result<Memory> {
        match self.mapped.take() {
            Some(mapped) => {
                drop(mapped);
                self.to.buffer.unmap();
            }
            None => self.flush()?,
        }
        Ok(self.to)
    }

    /// Codes of a matrix, from byte `at` on, rows padded to `row_bytes`.
    fn codes(&mut self, at: usize, row_bytes: usize, matrix: &MatrixView<'_>) -> Result<()> {
        let rows = matrix.codes;
        if rows.row_bytes() == row_bytes && rows.stride_bytes() == row_bytes {
            let all = &rows.span(matrix.rows)[..row_bytes * matrix.rows];
            for (i, piece) in all.chunks(PIECE).enumerate() {
                self.write(at + i * PIECE, piece)?;
            }
            return Ok(());
        }
        self.rows(at, matrix.rows, row_bytes, |row, out| {
            out[..rows.row_bytes()].copy_from_slice(rows.row(row));
        })
    }

    /// Scales of a matrix, from byte `at` on.
    fn scales(&mut self, at: usize, code: Code, words: usize, matrix: &MatrixView<'_>) -> Result<()> {
        if words == 0 {
            return Ok(());
        }
        self.rows(at, matrix.rows, 4 * words, |row, out| {
            let scales = matrix.scale_row(row);
            match code {
                Code::Affine { scale, .. } => {
                    // Scale and offset of a group side by side.
                    let size = if scale == ScaleKind::F32 { 4 } else { 2 };
                    let pairs = scales.chunks_exact(size).zip(matrix.offsets.row(row).chunks_exact(size));
                    for (out, (s, o)) in out.chunks_exact_mut(2 * size).zip(pairs) {
                        out[..size].copy_from_slice(s);
                        out[size..].copy_from_slice(o);
                    }
                }
                _ => out[..scales.len()].copy_from_slice(scales),
            }
        })
    }

    /// Rows of `row_bytes` bytes that `fill` makes out of zeros.
    fn rows(&mut self, at: usize, num_rows: usize, row_bytes: usize, fill: impl Fn(usize, &mut [u8])) -> Result<()> {
        let per_piece = (PIECE / row_bytes).max(1);
        let mut buffer = std::mem::take(&mut self.row);
        for begin in (0..num_rows).step_by(per_piece) {
            let here = per_piece.min(num_rows - begin);
            buffer.clear();
            buffer.resize(here * row_bytes, 0);
            for (i, out) in buffer.chunks_exact_mut(row_bytes).enumerate() {
                fill(begin + i, out);
            }
            self.write(at + begin * row_bytes, &buffer)?;
        }
        self.row = buffer;
        Ok(())
    }
}

fn unsupported(name: &str, format: WeightFormat) -> Error {
    Error::UnsupportedFormat {
        backend: NAME,
        weight: name.to_owned(),
        format: format.to_string(),
        takes: "f32, bf16, f16 where the adapter keeps its subnormals, mxfp4, mxfp8, nvfp4, affine 2-6 and 8 bits with groups of 32, 64 or \
                128, fp8 in blocks of 32 columns or multiples"
            .to_owned(),
    }
}
