//! The little dense algebra that surgery needs: Gram matrices of activations, the upper Cholesky factor, and a product
//! that feeds errors forward. f32 with sums in fixed order; parallel over rows, so results do not depend on threads.

use crate::simd::{Kernel, LANES, dispatch};
use rayon::prelude::*;

/// Rows of the output that one pass over a strip serves: with [`LANES`] columns their sums fill half of AVX2's registers.
const ROW_TILE: usize = 4;
/// Rows of the output that share a packed strip.
const ROW_BLOCK: usize = 64;
/// Columns that are packed together.
const PANEL: usize = 128;
/// Terms of a sum that are packed together: a strip of them is 32 KB.
const DEPTH: usize = 512;

/// `c[i][j] += sum_t a[t][i] * b[t][j]` for one tile of rows and one strip of columns.
struct Tile<'a> {
    a: &'a [[f32; ROW_TILE]],
    b: &'a [[f32; LANES]],
    sums: &'a mut [[f32; LANES]; ROW_TILE],
}

impl Kernel for Tile<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        // Four names and not an array of arrays: the compiler keeps these in registers.
        let [mut c0, mut c1, mut c2, mut c3] = [[0.0f32; LANES]; ROW_TILE];
        for (a, b) in self.a.iter().zip(self.b) {
            for lane in 0..LANES {
                c0[lane] += a[0] * b[lane];
            }
            for lane in 0..LANES {
                c1[lane] += a[1] * b[lane];
            }
            for lane in 0..LANES {
                c2[lane] += a[2] * b[lane];
            }
            for lane in 0..LANES {
                c3[lane] += a[3] * b[lane];
            }
        }
        *self.sums = [c0, c1, c2, c3];
    }
}

/// Columns of a row-major matrix.
#[derive(Clone, Copy)]
pub(crate) struct Columns<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) stride: usize,
    pub(crate) first: usize,
    pub(crate) count: usize,
}

/// `c[i][c_first + j] += sum_t a(t, i) * b[t][j]` for `depth` terms, rows `c` `[rows, c_stride]`.
pub(crate) fn add_product(
    a: impl Fn(usize, usize) -> f32,
    depth: usize,
    b: Columns<'_>,
    c: &mut [f32],
    [c_stride, c_first]: [usize; 2],
) {
    let rows = c.len() / c_stride;
    let tiles = ROW_BLOCK.min(rows).div_ceil(ROW_TILE);
    let mut packed_a = vec![[0.0; ROW_TILE]; tiles * DEPTH.min(depth)];
    let mut packed_b = vec![[0.0; LANES]; PANEL / LANES * DEPTH.min(depth)];
    for first_row in (0..rows).step_by(ROW_BLOCK) {
        let block_rows = ROW_BLOCK.min(rows - first_row);
        for first_t in (0..depth).step_by(DEPTH) {
            let depth = DEPTH.min(depth - first_t);
            for (tile, packed) in packed_a.chunks_exact_mut(depth).take(block_rows.div_ceil(ROW_TILE)).enumerate() {
                for (t, packed) in packed.iter_mut().enumerate() {
                    for (i, packed) in packed.iter_mut().enumerate() {
                        let row = tile * ROW_TILE + i;
                        *packed = if row < block_rows { a(first_t + t, first_row + row) } else { 0.0 };
                    }
                }
            }
            for first_col in (0..b.count).step_by(PANEL) {
                let cols = PANEL.min(b.count - first_col);
                // Whole cache lines of a page at a time: a strip alone would meet a new page with every term.
                for t in 0..depth {
                    let row = &b.data[(first_t + t) * b.stride + b.first + first_col..][..cols];
                    for (strip, values) in row.chunks(LANES).enumerate() {
                        packed_b[strip * depth + t][..values.len()].copy_from_slice(values);
                    }
                }
                for (strip, packed) in packed_b.chunks_exact(depth).take(cols.div_ceil(LANES)).enumerate() {
                    let cols = LANES.min(cols - strip * LANES);
                    for tile in 0..block_rows.div_ceil(ROW_TILE) {
                        let mut sums = [[0.0; LANES]; ROW_TILE];
                        dispatch(Tile { a: &packed_a[tile * depth..][..depth], b: packed, sums: &mut sums });
                        for (i, sums) in sums.iter().enumerate().take(block_rows - tile * ROW_TILE) {
                            let row = first_row + tile * ROW_TILE + i;
                            let c = &mut c[row * c_stride + c_first + first_col + strip * LANES..][..cols];
                            c.iter_mut().zip(sums).for_each(|(c, sum)| *c += sum);
                        }
                    }
                }
            }
        }
    }
}

/// `gram[i][j] += sum_t x[t][i] * x[t][j]` on and above the diagonal, `x` `[tokens, width]`.
pub(crate) fn add_gram(x: &[f32], width: usize, gram: &mut [f32]) {
    let tokens = x.len() / width;
    gram.par_chunks_mut(ROW_BLOCK * width).enumerate().for_each(|(block, rows)| {
        let first_row = block * ROW_BLOCK;
        let columns = Columns { data: x, stride: width, first: first_row, count: width - first_row };
        add_product(|t, i| x[t * width + first_row + i], tokens, columns, rows, [width, first_row]);
    });
}

/// Copies the upper triangle of a `[width, width]` matrix to the lower one.
pub(crate) fn mirror(matrix: &mut [f32], width: usize) {
    for row in 1..width {
        for col in 0..row {
            matrix[row * width + col] = matrix[col * width + row];
        }
    }
}

/// Columns that the factorization finishes at a time.
const BLOCK: usize = 64;

/// Replaces a symmetric positive definite `matrix` (`[width, width]`, both triangles) by its upper triangular factor `R`
/// with `R Rᵀ = matrix`, from the last column backwards. Below the diagonal stand zeros. `None` if it is not positive
/// definite.
pub(crate) fn upper_cholesky(matrix: &mut [f32], width: usize) -> Option<()> {
    let mut end = width;
    while end > 0 {
        let begin = end.saturating_sub(BLOCK);
        let (above, block) = matrix.split_at_mut(begin * width);
        factor_block(block, width, [begin, end])?;
        // The block's columns of the rows above: `R[i][j] = (m[i][j] - sum_{k>j} R[i][k] R[j][k]) / R[j][j]`.
        let block = &*block;
        above.par_chunks_mut(width).for_each(|row| {
            for j in (begin..end).rev() {
                let pivot_row = &block[(j - begin) * width..][..width];
                let explained = sum_of_products(&row[j + 1..end], &pivot_row[j + 1..end]);
                row[j] = ((f64::from(row[j]) - explained) / f64::from(pivot_row[j])) as f32;
            }
        });
        // What those columns explain is subtracted from all that is left, on and above the diagonal.
        let depth = end - begin;
        let mut explained = vec![0.0f32; depth * width];
        for (i, row) in above.chunks_exact(width).enumerate() {
            row[begin..end].iter().enumerate().for_each(|(t, value)| explained[t * width + i] = *value);
        }
        above.par_chunks_mut(ROW_BLOCK * width).enumerate().for_each(|(block, rows)| {
            let first_row = block * ROW_BLOCK;
            let a = |t: usize, i: usize| -explained[t * width + first_row + i];
            let columns = Columns { data: &explained, stride: width, first: first_row, count: begin - first_row };
            add_product(a, depth, columns, rows, [width, first_row]);
        });
        end = begin;
    }
    for row in 1..width {
        matrix[row * width..row * width + row].fill(0.0);
    }
    Some(())
}

/// Factors the square on the diagonal: `rows` are the matrix's rows `begin..`.
fn factor_block(rows: &mut [f32], width: usize, [begin, end]: [usize; 2]) -> Option<()> {
    for j in (begin..end).rev() {
        let (before, pivot_row) = rows.split_at_mut((j - begin) * width);
        let pivot = f64::from(pivot_row[j]) - sum_of_products(&pivot_row[j + 1..end], &pivot_row[j + 1..end]);
        if pivot.is_nan() || pivot <= 0.0 {
            return None;
        }
        let pivot = pivot.sqrt();
        pivot_row[j] = pivot as f32;
        for row in before.chunks_exact_mut(width) {
            let explained = sum_of_products(&row[j + 1..end], &pivot_row[j + 1..end]);
            row[j] = ((f64::from(row[j]) - explained) / pivot) as f32;
        }
    }
    Some(())
}

fn sum_of_products(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use moellon_tensor::rng::SplitMix64;

    #[test]
    fn factor_times_its_transpose_is_the_matrix() {
        // One past a block, and a width that is no whole number of vectors.
        for width in [1, 5, 65, 131] {
            let mut rng = SplitMix64::new(width as u64);
            let x = rng.normals(2 * width * width, 1.0);
            let mut gram = vec![0.0; width * width];
            add_gram(&x, width, &mut gram);
            mirror(&mut gram, width);
            for i in 0..width {
                for j in 0..width {
                    let expected: f64 = x.chunks_exact(width).map(|row| f64::from(row[i]) * f64::from(row[j])).sum();
                    assert!((f64::from(gram[i * width + j]) - expected).abs() < 1e-3, "gram {i},{j} of {width}");
                }
            }
            let mut factor = gram.clone();
            upper_cholesky(&mut factor, width).expect("a Gram matrix of twice as many rows is positive definite");
            for i in 0..width {
                for j in 0..width {
                    let product: f64 =
                        (0..width).map(|k| f64::from(factor[i * width + k]) * f64::from(factor[j * width + k])).sum();
                    let expected = f64::from(gram[i * width + j]);
                    assert!(
                        (product - expected).abs() < 1e-4 * width as f64,
                        "{i},{j} of {width}: {product} {expected}"
                    );
                }
            }
        }
        assert!(upper_cholesky(&mut [1.0, 2.0, 2.0, 1.0], 2).is_none());
    }
}
