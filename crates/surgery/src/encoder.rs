//! From a matrix of any format to one of another: rounding to nearest exactly as MLX does it, a search for better scales,
//! or the search followed by error feedback. Conversions that lose nothing are recognised first.

use crate::feedback::{CodeKind, Feedback, RowGrid};
use crate::search_affine::{Group, search};
use crate::search_float::{FloatCode, search_mx, search_nvfp4};
use crate::simd::{Kernel, dispatch};
use moellon_tensor::bits::pack_row;
use moellon_tensor::encode::{EncodeOptions, GlobalScale, NVFP4_RANGE, encode_matrix};
use moellon_tensor::minifloat::{E4M3_WITHOUT_NAN, E8M0, e4m3_from_f32};
use moellon_tensor::{Error, MatrixView, OwnedMatrix, Result, ScaleDtype, WeightFormat};
use rayon::prelude::*;

/// How codes are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Method {
    /// To the nearest code of the usual grid, bit for bit as the CPU back end of MLX 0.32.4.
    Rtn,
    /// Scales and offsets with the least error, weighted by the inputs' second moments where they are known.
    Search,
    /// The search, then error feedback where the moments are known as a matrix (GPTQ on a frozen grid).
    Gptq,
}

impl Method {
    /// The name that flags and receipts use.
    pub const fn name(self) -> &'static str {
        match self {
            Method::Rtn => "rtn",
            Method::Search => "search",
            Method::Gptq => "gptq",
        }
    }
}

/// What is known of a matrix's inputs.
#[derive(Debug, Clone, Copy, Default)]
pub struct Importance<'a> {
    /// `E[x²]` of every column; `None` counts all alike.
    pub input_sq: Option<&'a [f32]>,
    /// Second moments as a matrix, factored.
    pub feedback: Option<&'a Feedback>,
    /// By how much stronger this matrix's inputs are than those of `feedback`, a column each.
    pub column_scales: Option<&'a [f32]>,
}

/// Options of an encoding that are the same for all matrices of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EncoderOptions {
    /// How codes are chosen.
    pub method: Method,
    /// Whether NVFP4 matrices get a global scale. MLX below 0.32 has none in its kernels; without one small weights
    /// underflow the E4M3 scales.
    pub nvfp4_global_scale: bool,
}

/// Sums of squares, weighted by importance.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct ErrorSum {
    /// Of the differences.
    pub error: f64,
    /// Of the original values.
    pub signal: f64,
}

impl ErrorSum {
    /// Adds another sum.
    pub fn add(&mut self, other: ErrorSum) {
        self.error += other.error;
        self.signal += other.signal;
    }

    /// Signal to noise in dB; infinite without an error.
    pub fn snr_db(&self) -> f64 {
        10.0 * (self.signal / self.error).log10()
    }
}

/// An encoded matrix.
#[derive(Debug, Clone)]
pub struct Encoded {
    /// Its bits.
    pub matrix: OwnedMatrix,
    /// How far it is from the source: over all weights, or, with feedback, of the outputs of up to 32 evenly spaced rows.
    pub error: ErrorSum,
    /// Whether every value is exactly the source's because the bits could be taken over. A global scale goes into the
    /// container's own convention, which may round it once: at most one unit in the last place of an f32.
    pub lossless: bool,
}

/// Rows that one task encodes: whole FP8 blocks, and enough to use a pass over the feedback's matrix well.
const TASK_ROWS: usize = 128;
/// Rows whose outputs are compared where feedback is known.
const SAMPLED_ROWS: usize = 32;

/// Encodes `source` in `format`.
///
/// # Errors
/// If the shape is not legal in `format`, or the source has a value that is not finite.
pub fn encode(
    source: &MatrixView<'_>,
    format: WeightFormat,
    importance: Importance<'_>,
    options: EncoderOptions,
) -> Result<Encoded> {
    format.validate(source.cols)?;
    if let Some(matrix) = lossless(source, format).filter(|m| m.global_scale == 1.0 || options.nvfp4_global_scale) {
        return Ok(Encoded { matrix, error: ErrorSum::default(), lossless: true });
    }
    let mut matrix = OwnedMatrix::zeroed(format, [source.rows, source.cols])?;
    let amax = match format {
        WeightFormat::Nvfp4 if options.nvfp4_global_scale => Some(amax(source)).filter(|amax| *amax > 0.0),
        _ => None,
    };
    matrix.global_scale = amax.map_or(1.0, |amax| amax / NVFP4_RANGE);
    let global_scale = matrix.global_scale;
    let task = RowTask { source, format, importance, options, amax, global_scale };
    let sums: Vec<Result<ErrorSum>> = row_chunks(&mut matrix).into_par_iter().map(|chunk| task.encode(chunk)).collect();
    let mut error = ErrorSum::default();
    for sum in sums {
        error.add(sum?);
    }
    if let Some(feedback) = importance.feedback {
        error = output_error(source, &matrix.view(), feedback, importance.column_scales);
    }
    Ok(Encoded { matrix, error, lossless: false })
}

/// The error of the outputs of up to [`SAMPLED_ROWS`] rows.
fn output_error(
    source: &MatrixView<'_>,
    encoded: &MatrixView<'_>,
    feedback: &Feedback,
    column_scales: Option<&[f32]>,
) -> ErrorSum {
    let step = source.rows.div_ceil(SAMPLED_ROWS);
    let rows: Vec<usize> = (0..source.rows).step_by(step).collect();
    let cols = source.cols;
    // The rows and, after them, their differences.
    let mut values = vec![0.0; 2 * rows.len() * cols];
    let (originals, differences) = values.split_at_mut(rows.len() * cols);
    let pairs = originals.chunks_exact_mut(cols).zip(differences.chunks_exact_mut(cols));
    for (&row, (original, difference)) in rows.iter().zip(pairs) {
        source.decode_row(row, original);
        encoded.decode_row(row, difference);
        difference.iter_mut().zip(original).for_each(|(found, value)| *found = *value - *found);
    }
    let energies = feedback.output_energies(&values, column_scales);
    let (signal, error) = energies.split_at(rows.len());
    ErrorSum { error: error.iter().sum(), signal: signal.iter().sum() }
}

/// The largest magnitude of a matrix.
fn amax(source: &MatrixView<'_>) -> f32 {
    (0..source.rows)
        .into_par_iter()
        .map_init(
            || vec![0.0; source.cols],
            |values, row| {
                source.decode_row(row, values);
                values.iter().fold(0.0f32, |amax, value| amax.max(value.abs()))
            },
        )
        .reduce(|| 0.0, f32::max)
}

/// A matrix in `format` with exactly the source's values, if taking over its codes gives one.
fn lossless(source: &MatrixView<'_>, format: WeightFormat) -> Option<OwnedMatrix> {
    // A block that begins above the view's first row cannot be moved to a matrix of its own.
    if source.format == format && source.first_block_row == 0 {
        return Some(copy(source));
    }
    match (source.format, format) {
        (WeightFormat::Mxfp4, WeightFormat::Nvfp4) => mxfp4_as_nvfp4(source),
        (WeightFormat::Affine { bits, group, .. }, WeightFormat::Affine { bits: to_bits, group: to_group, .. })
            if (bits, group) == (to_bits, to_group) =>
        {
            affine_with_other_scales(source, format)
        }
        _ => None,
    }
}

/// The bytes of a view, row by row.
fn copy(source: &MatrixView<'_>) -> OwnedMatrix {
    let scale_rows = source.format.scale_rows(source.rows);
    let offset_rows = if source.format.has_offsets() { source.rows } else { 0 };
    OwnedMatrix {
        format: source.format,
        rows: source.rows,
        cols: source.cols,
        codes: (0..source.rows).flat_map(|row| source.codes.row(row)).copied().collect(),
        scales: (0..scale_rows).flat_map(|row| source.scales.row(row)).copied().collect(),
        offsets: (0..offset_rows).flat_map(|row| source.offsets.row(row)).copied().collect(),
        global_scale: source.global_scale,
    }
}

/// The same codes with scales and offsets of another type, if that holds each of them exactly.
fn affine_with_other_scales(source: &MatrixView<'_>, format: WeightFormat) -> Option<OwnedMatrix> {
    let (WeightFormat::Affine { scale: from, .. }, WeightFormat::Affine { scale: to, .. }) = (source.format, format)
    else {
        return None;
    };
    let convert = |bytes: &[u8]| -> Option<Vec<u8>> {
        let mut values = vec![0.0; bytes.len() / from.size_bytes()];
        from.read_slice(bytes, 0, &mut values);
        let exact = values.iter().all(|&value| to.round(value) == value);
        exact.then(|| OwnedMatrix::plain(to, [1, values.len()], &values).codes)
    };
    let matrix = copy(source);
    let (scales, offsets) = (convert(&matrix.scales)?, convert(&matrix.offsets)?);
    Some(OwnedMatrix { format, scales, offsets, ..matrix })
}

/// E8M0 scales as E4M3 scales times a power of two, each for two groups of 16: exact if the exponents of the matrix lie
/// within the 18 powers of two that E4M3 has (2^-9 to 2^8).
fn mxfp4_as_nvfp4(source: &MatrixView<'_>) -> Option<OwnedMatrix> {
    const LOWEST: i32 = -9;
    const HIGHEST: i32 = 8;
    let scale_rows = || (0..source.rows).map(|row| source.scale_row(row));
    let largest = scale_rows().flatten().copied().max()?;
    let smallest = scale_rows().flatten().copied().min()?;
    if largest == 0xFF || i32::from(largest) - i32::from(smallest) > HIGHEST - LOWEST || source.global_scale != 1.0 {
        return None;
    }
    let global_exponent = i32::from(largest) - 127 - HIGHEST;
    if !(-126..=100).contains(&global_exponent) {
        return None;
    }
    let mut matrix = copy(source);
    matrix.format = WeightFormat::Nvfp4;
    matrix.global_scale = (global_exponent as f32).exp2();
    matrix.scales = scale_rows()
        .flatten()
        .flat_map(|&exponent| {
            let power = i32::from(exponent) - 127 - global_exponent;
            [e4m3_from_f32((power as f32).exp2()); 2]
        })
        .collect();
    Some(matrix)
}

/// Consecutive rows of a matrix that is being encoded.
struct RowChunk<'a> {
    first_row: usize,
    rows: usize,
    codes: &'a mut [u8],
    scales: &'a mut [u8],
    offsets: &'a mut [u8],
}

fn row_chunks(matrix: &mut OwnedMatrix) -> Vec<RowChunk<'_>> {
    let (format, total, cols) = (matrix.format, matrix.rows, matrix.cols);
    let scale_row = format.scales_per_row(cols) * format.scale_bytes();
    let (mut codes, mut scales, mut offsets) =
        (matrix.codes.as_mut_slice(), matrix.scales.as_mut_slice(), matrix.offsets.as_mut_slice());
    let mut chunks = Vec::new();
    for first_row in (0..total).step_by(TASK_ROWS) {
        let rows = TASK_ROWS.min(total - first_row);
        // Blocks of more rows than a task has (FP8 per matrix) are encoded by the first task alone.
        let scale_rows = format.scale_rows(first_row + rows) - format.scale_rows(first_row);
        let offset_bytes = if format.has_offsets() { rows * scale_row } else { 0 };
        chunks.push(RowChunk {
            first_row,
            rows,
            codes: take(&mut codes, rows * format.code_row_bytes(cols)),
            scales: take(&mut scales, scale_rows * scale_row),
            offsets: take(&mut offsets, offset_bytes),
        });
    }
    chunks
}

/// The first `len` bytes of `rest`, which keeps the others.
fn take<'a>(rest: &mut &'a mut [u8], len: usize) -> &'a mut [u8] {
    let (part, after) = std::mem::take(rest).split_at_mut(len);
    *rest = after;
    part
}

/// What all tasks of a matrix share.
struct RowTask<'a> {
    source: &'a MatrixView<'a>,
    format: WeightFormat,
    importance: Importance<'a>,
    options: EncoderOptions,
    /// The magnitude that the NVFP4 global scale stands for.
    amax: Option<f32>,
    global_scale: f32,
}

impl RowTask<'_> {
    fn encode(&self, chunk: RowChunk<'_>) -> Result<ErrorSum> {
        let cols = self.source.cols;
        let mut values = vec![0.0; chunk.rows * cols];
        for (at, row) in values.chunks_exact_mut(cols).enumerate() {
            self.source.decode_row(chunk.first_row + at, row);
        }
        if let Some(at) = values.iter().position(|value| !value.is_finite()) {
            let (row, group) = (chunk.first_row + at / cols, at % cols);
            return Err(Error::NotFinite { what: "value to encode", found: values[at].to_string(), row, group });
        }
        let ones;
        let weights = match self.importance.input_sq {
            Some(input_sq) => input_sq,
            None => {
                ones = vec![1.0; cols];
                &ones
            }
        };
        let grid = match self.format {
            WeightFormat::Affine { bits, group, scale } => {
                Some((CodeKind::Integer(u32::from(bits)), group, Some(scale)))
            }
            WeightFormat::Mxfp4 | WeightFormat::Nvfp4 => {
                Some((CodeKind::Float(FloatCode::E2m1), self.format.group().unwrap_or(0) as u32, None))
            }
            WeightFormat::Mxfp8 => Some((CodeKind::Float(FloatCode::E4m3), 32, None)),
            // Plain floats round to nearest, and so do FP8 blocks: scaling a tile does not change its relative error.
            WeightFormat::F32 | WeightFormat::F16 | WeightFormat::Bf16 | WeightFormat::Fp8Block { .. } => None,
        };
        match grid {
            Some((kind, group, scale)) if self.options.method != Method::Rtn => {
                Ok(self.searched(&values, weights, kind, group as usize, scale, chunk))
            }
            _ => self.nearest(&values, weights, chunk),
        }
    }

    /// Round to nearest, by the codec.
    fn nearest(&self, values: &[f32], weights: &[f32], chunk: RowChunk<'_>) -> Result<ErrorSum> {
        let shape = [chunk.rows, self.source.cols];
        // MLX's MX and NVFP4 encoders round every step to the type of the array.
        let arithmetic = match self.source.format {
            WeightFormat::F16 => ScaleDtype::F16,
            WeightFormat::Bf16 => ScaleDtype::Bf16,
            _ => ScaleDtype::F32,
        };
        let global_scale = self.amax.map_or(GlobalScale::Off, GlobalScale::FromAmax);
        let part = encode_matrix(self.format, shape, values, EncodeOptions { arithmetic, global_scale })?;
        let sum = difference(values, &part.view(), weights);
        chunk.codes.copy_from_slice(&part.codes);
        chunk.scales.copy_from_slice(&part.scales);
        chunk.offsets.copy_from_slice(&part.offsets);
        Ok(sum)
    }

    /// Grids by search, codes by nearest value or by feedback.
    fn searched(
        &self,
        values: &[f32],
        weights: &[f32],
        kind: CodeKind,
        group: usize,
        scale_dtype: Option<ScaleDtype>,
        chunk: RowChunk<'_>,
    ) -> ErrorSum {
        let cols = self.source.cols;
        let grids: Vec<RowGrid> = values
            .chunks_exact(cols)
            .map(|row| {
                dispatch(SearchRow {
                    values: row,
                    weights,
                    kind,
                    group,
                    scale_dtype,
                    is_nvfp4: self.format == WeightFormat::Nvfp4,
                    global_scale: self.global_scale,
                })
            })
            .collect();
        let mut codes = vec![0u8; values.len()];
        match (self.options.method, self.importance.feedback) {
            (Method::Gptq, Some(feedback)) => {
                feedback.round_rows(values, &grids, kind, group, self.importance.column_scales, &mut codes);
            }
            _ => {
                for ((row, grid), codes) in values.chunks_exact(cols).zip(&grids).zip(codes.chunks_exact_mut(cols)) {
                    dispatch(RoundRow { values: row, grid, kind, group, codes });
                }
            }
        }
        let bits = self.format.code_bits();
        let code_row = self.format.code_row_bytes(cols);
        let groups = cols / group;
        let mut sum = ErrorSum::default();
        for (row, grid) in grids.iter().enumerate() {
            let row_codes = &codes[row * cols..][..cols];
            pack_row(row_codes, bits, &mut chunk.codes[row * code_row..][..code_row]);
            for at in 0..groups {
                match scale_dtype {
                    Some(dtype) => {
                        dtype.write(grid.scales[at], chunk.scales, row * groups + at);
                        dtype.write(grid.offsets[at], chunk.offsets, row * groups + at);
                    }
                    None => chunk.scales[row * groups + at] = grid.scale_codes[at],
                }
            }
            sum.add(dispatch(RowError {
                values: &values[row * cols..][..cols],
                weights,
                codes: row_codes,
                grid,
                kind,
                group,
            }));
        }
        sum
    }
}

/// Weighted sums of squares between values and a matrix.
fn difference(values: &[f32], matrix: &MatrixView<'_>, weights: &[f32]) -> ErrorSum {
    let mut sum = ErrorSum::default();
    let mut found = vec![0.0; matrix.cols];
    for (row, values) in values.chunks_exact(matrix.cols.max(1)).enumerate() {
        matrix.decode_row(row, &mut found);
        for ((&value, &found), &weight) in values.iter().zip(&found).zip(weights) {
            let (value, weight, difference) = (f64::from(value), f64::from(weight), f64::from(value - found));
            sum.add(ErrorSum { error: weight * difference * difference, signal: weight * value * value });
        }
    }
    sum
}

struct SearchRow<'a> {
    values: &'a [f32],
    weights: &'a [f32],
    kind: CodeKind,
    group: usize,
    scale_dtype: Option<ScaleDtype>,
    is_nvfp4: bool,
    global_scale: f32,
}

impl Kernel for SearchRow<'_> {
    type Output = RowGrid;

    #[inline(always)]
    fn run(self) -> RowGrid {
        let mut grid = RowGrid::default();
        let floor = weight_floor(self.weights);
        let mut weights = vec![0.0; self.group];
        for (values, raw) in self.values.chunks_exact(self.group).zip(self.weights.chunks_exact(self.group)) {
            weights.iter_mut().zip(raw).for_each(|(weight, raw)| *weight = raw.max(floor));
            match (self.kind, self.scale_dtype) {
                (CodeKind::Integer(bits), Some(dtype)) => {
                    let start = nearest_grid(values, bits);
                    let start = (dtype.round(start.0), dtype.round(start.1));
                    let fit = search(Group { values, weights: &weights }, bits, dtype, start);
                    grid.scales.push(fit.scale);
                    grid.offsets.push(fit.offset);
                }
                (CodeKind::Float(_), _) if self.is_nvfp4 => {
                    let code = search_nvfp4(values, &weights, self.global_scale);
                    grid.scale_codes.push(code);
                    grid.scales.push(E4M3_WITHOUT_NAN[usize::from(code)] * self.global_scale);
                }
                (CodeKind::Float(codes), _) => {
                    let code = search_mx(values, &weights, codes);
                    grid.scale_codes.push(code);
                    grid.scales.push(E8M0[usize::from(code)]);
                }
                (CodeKind::Integer(_), None) => unreachable!("affine formats have a scale type"),
            }
        }
        grid
    }
}

/// The least weight of a column: one that no token of the calibration used still has to be near its value. 1e-4 of the mean
/// leaves the others free.
#[inline(always)]
fn weight_floor(weights: &[f32]) -> f32 {
    let mean = weights.iter().map(|w| f64::from(*w)).sum::<f64>() / weights.len() as f64;
    if mean > 0.0 { (mean * 1e-4) as f32 } else { 1.0 }
}

/// The grid of round-to-nearest (MLX's), unrounded.
#[inline(always)]
fn nearest_grid(values: &[f32], bits: u32) -> (f32, f32) {
    let (min, max) = values.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(min, max), &v| (min.min(v), max.max(v)));
    let steps = ((1u32 << bits) - 1) as f32;
    let edge_is_min = min.abs() > max.abs();
    let width = ((max - min) / steps).max(1e-7);
    let (scale, edge) = if edge_is_min { (width, min) } else { (-width, max) };
    let edge_code = (edge / scale).round_ties_even();
    if edge_code == 0.0 { (scale, 0.0) } else { (edge / edge_code, edge) }
}

struct RoundRow<'a> {
    values: &'a [f32],
    grid: &'a RowGrid,
    kind: CodeKind,
    group: usize,
    codes: &'a mut [u8],
}

impl Kernel for RoundRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let groups = self.values.chunks_exact(self.group).zip(self.codes.chunks_exact_mut(self.group));
        for (group, (values, codes)) in groups.enumerate() {
            for (code, &value) in codes.iter_mut().zip(values) {
                *code = self.grid.round(self.kind, group, value).0;
            }
        }
    }
}

struct RowError<'a> {
    values: &'a [f32],
    weights: &'a [f32],
    codes: &'a [u8],
    grid: &'a RowGrid,
    kind: CodeKind,
    group: usize,
}

impl Kernel for RowError<'_> {
    type Output = ErrorSum;

    #[inline(always)]
    fn run(self) -> ErrorSum {
        let mut sum = ErrorSum::default();
        for (group, values) in self.values.chunks_exact(self.group).enumerate() {
            let span = group * self.group..(group + 1) * self.group;
            let scale = self.grid.scales[group];
            let (mut error, mut signal) = (0.0f32, 0.0f32);
            for ((&value, &weight), &code) in values.iter().zip(&self.weights[span.clone()]).zip(&self.codes[span]) {
                let found = match self.kind {
                    CodeKind::Integer(_) => f32::from(code) * scale + self.grid.offsets[group],
                    CodeKind::Float(codes) => codes.decode(code) * scale,
                };
                let difference = value - found;
                error += weight * difference * difference;
                signal += weight * value * value;
            }
            sum.add(ErrorSum { error: f64::from(error), signal: f64::from(signal) });
        }
        sum
    }
}
