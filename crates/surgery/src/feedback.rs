//! GPTQ on a frozen grid: columns are rounded one after the other, and what one column loses is fed into those after it, so
//! that the error of the *outputs* and not of the weights gets small (Frantar et al. 2022; in the form of LDLQ, Chee et
//! al. 2023, which needs one Cholesky factor and no inverse).
//!
//! With the second moments of the inputs `H = E[x xᵀ] = R Rᵀ`, `R` upper triangular, the error of an output row is
//! `|(w - ŵ) R|²`, and its column `j` is `R_jj (e_j + sum_{i<j} e_i N_ij)` with `e = w - ŵ` and `N_ij = R_ij / R_jj`. So
//! `ŵ_j` is the code nearest to `w_j + sum_{i<j} e_i N_ij`.

use crate::linear_algebra::{Columns, add_gram, add_product, mirror, upper_cholesky};
use crate::search_float::FloatCode;
use crate::simd::{Kernel, dispatch};
use rayon::prelude::*;

/// Columns whose errors are fed forward together.
const BLOCK: usize = 64;
/// Columns whose share of an energy one task computes.
const ENERGY_COLS: usize = 512;

/// `N` and the diagonal of `R` for one input, in the order in which columns are rounded.
#[derive(Debug, Clone)]
pub struct Feedback {
    /// `order[p]`: the column that is rounded at step `p`; strong inputs first, while there is most left to make good.
    order: Vec<u32>,
    /// `[width, width]`, zero on and below the diagonal.
    forward: Vec<f32>,
    /// `R_pp`.
    diagonal: Vec<f32>,
}

impl Feedback {
    /// From second moments `[width, width]` (both triangles). `damping` times the mean of the diagonal is added to the
    /// diagonal, and ten times more each time the matrix is not positive definite. `None` if it has a value that is not
    /// finite or no positive diagonal.
    pub fn new(moments: &[f32], width: usize, damping: f32) -> Option<Self> {
        let mean = (0..width).map(|i| f64::from(moments[i * width + i])).sum::<f64>() / width as f64;
        if !mean.is_finite() || mean <= 0.0 {
            return None;
        }
        let mut order: Vec<u32> = (0..width as u32).collect();
        let strength = |column: u32| moments[column as usize * width + column as usize];
        order.sort_by(|&a, &b| strength(b).total_cmp(&strength(a)).then(a.cmp(&b)));
        let mut damping = f64::from(damping);
        for _ in 0..4 {
            let mut matrix = vec![0.0f32; width * width];
            for (p, row) in matrix.chunks_exact_mut(width).enumerate() {
                let source = &moments[order[p] as usize * width..][..width];
                for (value, &column) in row.iter_mut().zip(&order) {
                    *value = source[column as usize];
                }
                row[p] += (damping * mean) as f32;
            }
            if upper_cholesky(&mut matrix, width).is_some() {
                let diagonal: Vec<f32> = (0..width).map(|p| matrix[p * width + p]).collect();
                for (p, row) in matrix.chunks_exact_mut(width).enumerate() {
                    row[p] = 0.0;
                    row[p + 1..].iter_mut().zip(&diagonal[p + 1..]).for_each(|(value, d)| *value /= d);
                }
                return Some(Feedback { order, forward: matrix, diagonal });
            }
            damping *= 10.0;
        }
        None
    }

    /// Columns.
    pub fn width(&self) -> usize {
        self.order.len()
    }

    /// `|d R|²` for each of some rows of differences `[rows, width]` in the weights' own order, inputs scaled by
    /// `column_scales` where given.
    pub(crate) fn output_energies(&self, differences: &[f32], column_scales: Option<&[f32]>) -> Vec<f64> {
        let width = self.width();
        let rows = differences.len() / width;
        let scaled: Vec<f32> = differences
            .chunks_exact(width)
            .flat_map(|row| self.order.iter().map(|&c| row[c as usize] * scale_of(column_scales, c)))
            .collect();
        let panels: Vec<Vec<f64>> = (0..width.div_ceil(ENERGY_COLS))
            .into_par_iter()
            .map(|panel| {
                let first = panel * ENERGY_COLS;
                let count = ENERGY_COLS.min(width - first);
                let mut fed: Vec<f32> =
                    scaled.chunks_exact(width).flat_map(|row| &row[first..first + count]).copied().collect();
                let columns = Columns { data: &self.forward, stride: width, first, count };
                // Below the diagonal stand zeros.
                add_product(|t, row| scaled[row * width + t], first + count, columns, &mut fed, [count, 0]);
                let diagonal = &self.diagonal[first..first + count];
                let energy =
                    |row: &[f32]| row.iter().zip(diagonal).map(|(e, d)| (f64::from(*e) * f64::from(*d)).powi(2)).sum();
                fed.chunks_exact(count).map(energy).collect()
            })
            .collect();
        (0..rows).map(|row| panels.iter().map(|panel| panel[row]).sum()).collect()
    }

    /// Rounds rows `values` (`[rows, width]`) to their grids and writes one code a weight to `codes` (`[rows, width]`).
    /// `column_scales` (`[width]`) say by how much stronger this matrix's inputs are than those of the moments: the
    /// correlations are shared, the strengths its own.
    pub(crate) fn round_rows(
        &self,
        values: &[f32],
        grids: &[RowGrid],
        kind: CodeKind,
        group: usize,
        column_scales: Option<&[f32]>,
        codes: &mut [u8],
    ) {
        let width = self.width();
        let scales: Vec<f32> = self.order.iter().map(|&c| scale_of(column_scales, c)).collect();
        let original: Vec<f32> = values
            .chunks_exact(width)
            .flat_map(|row| self.order.iter().zip(&scales).map(move |(&c, scale)| row[c as usize] * scale))
            .collect();
        let mut work = original.clone();
        let mut errors = vec![0.0f32; work.len()];
        for begin in (0..width).step_by(BLOCK) {
            let end = (begin + BLOCK).min(width);
            for (row, grid) in grids.iter().enumerate() {
                let span = row * width..(row + 1) * width;
                dispatch(RoundBlock {
                    feedback: self,
                    block: [begin, end],
                    scales: &scales,
                    original: &original[span.clone()],
                    work: &mut work[span.clone()],
                    errors: &mut errors[span.clone()],
                    codes: &mut codes[span],
                    grid,
                    kind,
                    group,
                });
            }
            if end < width {
                let forward = &self.forward[begin * width..end * width];
                let columns = Columns { data: forward, stride: width, first: end, count: width - end };
                add_product(|t, i| errors[i * width + begin + t], end - begin, columns, &mut work, [width, end]);
            }
        }
    }
}

/// `E[x xᵀ]` over rows `x` (`[rows, width]`), both triangles.
pub fn second_moments(x: &[f32], width: usize) -> Vec<f32> {
    let mut moments = vec![0.0; width * width];
    add_gram(x, width, &mut moments);
    mirror(&mut moments, width);
    let factor = width as f32 / x.len().max(1) as f32;
    moments.iter_mut().for_each(|moment| *moment *= factor);
    moments
}

/// How far moments of `rows` rows can be trusted against a prior: as many rows as columns make an estimate of full rank,
/// which counts half. With fewer, directions that no row happened to take look free, and errors fed into them come back
/// on other texts (measured: `docs/surgery.md`, "At the sizes of GLM-5.2").
fn trust(rows: u32, width: usize) -> f32 {
    rows as f32 / (rows as f32 + width as f32)
}

/// Shrinks moments of `rows` rows towards `diagonal` (`[width]`): what is off the diagonal by as much as `rows` leave in
/// doubt.
pub fn shrink(moments: &mut [f32], diagonal: &[f32], rows: u32) {
    let width = diagonal.len();
    let own = trust(rows, width);
    moments.par_chunks_mut(width).enumerate().for_each(|(row, values)| {
        let kept = own * values[row] + (1.0 - own) * diagonal[row];
        values.iter_mut().for_each(|value| *value *= own);
        values[row] = kept;
    });
}

/// Mixes moments of `rows` rows with those of a prior (`[width, width]`).
pub(crate) fn mix(moments: &mut [f32], prior: &[f32], width: usize, rows: u32) {
    let own = trust(rows, width);
    moments.iter_mut().zip(prior).for_each(|(value, prior)| *value = own * *value + (1.0 - own) * prior);
}

fn scale_of(column_scales: Option<&[f32]>, column: u32) -> f32 {
    column_scales.map_or(1.0, |scales| scales[column as usize])
}

/// What the codes of a format are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CodeKind {
    /// Unsigned integers of this many bits.
    Integer(u32),
    /// Minifloats.
    Float(FloatCode),
}

/// The grids of one row: one scale and offset a group, as they decode.
#[derive(Debug, Clone, Default)]
pub(crate) struct RowGrid {
    pub(crate) scales: Vec<f32>,
    /// Empty for minifloats.
    pub(crate) offsets: Vec<f32>,
    /// The codes of the scales, for minifloats.
    pub(crate) scale_codes: Vec<u8>,
}

impl RowGrid {
    /// The nearest code of `value` in group `group` and what it decodes to.
    #[inline(always)]
    pub(crate) fn round(&self, kind: CodeKind, group: usize, value: f32) -> (u8, f32) {
        let scale = self.scales[group];
        match kind {
            CodeKind::Integer(bits) => {
                let offset = self.offsets[group];
                let largest = ((1u32 << bits) - 1) as f32;
                let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
                let code = crate::simd::round_even(((value - offset) * inverse).max(0.0).min(largest));
                (code as u8, code * scale + offset)
            }
            CodeKind::Float(codes) => {
                if scale == 0.0 {
                    return (0, 0.0);
                }
                let code = codes.encode(value / scale);
                (code, codes.decode(code) * scale)
            }
        }
    }
}

/// Rounds the columns of one block in one row, feeding errors forward inside the block.
struct RoundBlock<'a> {
    feedback: &'a Feedback,
    block: [usize; 2],
    /// In rounding order.
    scales: &'a [f32],
    original: &'a [f32],
    work: &'a mut [f32],
    errors: &'a mut [f32],
    codes: &'a mut [u8],
    grid: &'a RowGrid,
    kind: CodeKind,
    group: usize,
}

impl Kernel for RoundBlock<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let [begin, end] = self.block;
        let width = self.feedback.width();
        for p in begin..end {
            let column = self.feedback.order[p] as usize;
            let scale = self.scales[p];
            // An input that was never active says nothing: its weight is rounded as it is.
            let wanted = if scale > 0.0 { self.work[p] / scale } else { 0.0 };
            let (code, value) = self.grid.round(self.kind, column / self.group, wanted);
            self.codes[column] = code;
            let error = self.original[p] - value * scale;
            self.errors[p] = error;
            let forward = &self.feedback.forward[p * width + p + 1..p * width + end];
            for (work, n) in self.work[p + 1..end].iter_mut().zip(forward) {
                *work += error * n;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use moellon_tensor::rng::SplitMix64;

    /// Inputs with strong correlations, their moments, and a row of weights with a coarse grid.
    fn example() -> (usize, Vec<f32>, Vec<f32>, RowGrid) {
        let width = 96;
        let mut rng = SplitMix64::new(5);
        let shared = rng.normals(512 * 4, 1.0);
        let noise = rng.normals(512 * width, 0.3);
        let mix = rng.normals(4 * width, 0.7);
        let x: Vec<f32> = (0..512 * width)
            .map(|at| {
                let (t, c) = (at / width, at % width);
                noise[at] + (0..4).map(|k| shared[t * 4 + k] * mix[k * width + c]).sum::<f32>()
            })
            .collect();
        let moments = second_moments(&x, width);
        let weights = rng.normals(width, 0.05);
        let grid = RowGrid { scales: vec![0.03; 3], offsets: vec![-0.105; 3], scale_codes: Vec::new() };
        (width, moments, weights, grid)
    }

    fn decoded(codes: &[u8]) -> Vec<f32> {
        codes.iter().map(|&code| f32::from(code) * 0.03 - 0.105).collect()
    }

    fn energy(difference: &[f32], moments: &[f32]) -> f64 {
        let width = difference.len();
        let rows = moments.chunks_exact(width).zip(difference);
        rows.map(|(row, d)| {
            f64::from(*d) * row.iter().zip(difference).map(|(m, e)| f64::from(*m) * f64::from(*e)).sum::<f64>()
        })
        .sum()
    }

    #[test]
    fn outputs_lose_less_than_with_rounding_to_nearest() {
        let (width, moments, weights, grid) = example();
        let kind = CodeKind::Integer(3);
        let feedback = Feedback::new(&moments, width, 0.01).expect("moments are positive definite");
        let mut fed = vec![0; width];
        feedback.round_rows(&weights, std::slice::from_ref(&grid), kind, 32, None, &mut fed);
        let nearest: Vec<u8> = weights.iter().enumerate().map(|(c, w)| grid.round(kind, c / 32, *w).0).collect();
        let loss = |codes: &[u8]| {
            let difference: Vec<f32> = weights.iter().zip(decoded(codes)).map(|(w, d)| w - d).collect();
            let (exact, factored) = (energy(&difference, &moments), feedback.output_energies(&difference, None)[0]);
            // The factor is of the damped moments.
            assert!(factored >= exact * 0.99 && factored < exact * 1.5 + 1e-3, "{factored} {exact}");
            exact
        };
        let (with, without) = (loss(&fed), loss(&nearest));
        assert!(with < 0.5 * without, "{with} against {without}");
    }

    #[test]
    fn column_scales_stand_for_stronger_inputs() {
        let (width, moments, weights, grid) = example();
        let kind = CodeKind::Integer(3);
        let scales: Vec<f32> = (0..width).map(|c| 0.5 + (c % 5) as f32 * 0.25).collect();
        let scaled: Vec<f32> =
            (0..width * width).map(|at| moments[at] * scales[at / width] * scales[at % width]).collect();
        let shared = Feedback::new(&moments, width, 1e-6).expect("positive definite");
        let mut codes = vec![0; width];
        shared.round_rows(&weights, std::slice::from_ref(&grid), kind, 32, Some(&scales), &mut codes);
        let difference: Vec<f32> = weights.iter().zip(decoded(&codes)).map(|(w, d)| w - d).collect();
        let exact = energy(&difference, &scaled);
        let factored = shared.output_energies(&difference, Some(&scales))[0];
        assert!((exact - factored).abs() < 1e-3 * exact + 1e-9, "{exact} {factored}");
    }

    #[test]
    fn moments_of_nothing_are_refused() {
        assert!(Feedback::new(&[0.0; 16], 4, 0.01).is_none());
        assert!(Feedback::new(&[f32::NAN; 16], 4, 0.01).is_none());
    }
}
