//! The little dense algebra that surgery needs: Gram matrices of activations, the upper Cholesky factor, and a product
//! that feeds errors forward. f32 with sums in fixed order; parallel over rows, so results do not depend on threads.

use crate::simd::{Kernel, LANES, dispatch, sum_lanes};
use rayon::prelude::*;

/// Rows of the output that one pass over `b` serves.
const ROW_TILE: usize = 4;
/// Columns of the output that stay in registers.
const COL_TILE: usize = 32;

/// `c[i][j] += sum_t a[t][i] * b[t][j]`, `a` `[depth, ROW_TILE]` packed, `b` `[depth, ..]` with a stride.
struct Tile<'a> {
    a: &'a [[f32; ROW_TILE]],
    b: &'a [f32],
    b_stride: usize,
    /// First column.
    first: usize,
    c: [&'a mut [f32]; ROW_TILE],
}

impl Kernel for Tile<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let [c0, c1, c2, c3] = self.c;
        let cols = c0.len();
        let mut col = self.first;
        while col + COL_TILE <= cols {
            let mut sums = [[0.0f32; COL_TILE]; ROW_TILE];
            for (t, a) in self.a.iter().enumerate() {
                let b = &self.b[t * self.b_stride + col..][..COL_TILE];
                for (sums, &a) in sums.iter_mut().zip(a) {
                    for lane in 0..COL_TILE {
                        sums[lane] += a * b[lane];
                    }
                }
            }
            for (c, sums) in [&mut *c0, &mut *c1, &mut *c2, &mut *c3].into_iter().zip(&sums) {
                for (c, &sum) in c[col..col + COL_TILE].iter_mut().zip(sums) {
                    *c += sum;
                }
            }
            col += COL_TILE;
        }
        for (t, a) in self.a.iter().enumerate() {
            let b = &self.b[t * self.b_stride..];
            for (c, &a) in [&mut *c0, &mut *c1, &mut *c2, &mut *c3].into_iter().zip(a) {
                for at in col..cols {
                    c[at] += a * b[at];
                }
            }
        }
    }
}

/// `c[i][j] += sum_t a(t, i) * b[t][j]` for the columns `j >= first_col` of rows `c` `[rows, b_stride]`.
pub(crate) fn add_product(
    a: impl Fn(usize, usize) -> f32,
    depth: usize,
    b: &[f32],
    b_stride: usize,
    first_col: usize,
    c: &mut [f32],
) {
    let rows = c.len() / b_stride;
    let mut packed = vec![[0.0; ROW_TILE]; depth];
    for (tile, c) in c.chunks_mut(ROW_TILE * b_stride).enumerate() {
        let first_row = tile * ROW_TILE;
        for (t, packed) in packed.iter_mut().enumerate() {
            for (i, packed) in packed.iter_mut().enumerate() {
                *packed = if first_row + i < rows { a(t, first_row + i) } else { 0.0 };
            }
        }
        let mut spare = [vec![], vec![], vec![]];
        let mut parts = c.chunks_mut(b_stride);
        let first = parts.next().expect("a chunk has a row");
        let mut next = spare.iter_mut().map(|spare| match parts.next() {
            Some(row) => row,
            None => {
                spare.resize(b_stride, 0.0);
                spare.as_mut_slice()
            }
        });
        let mut row = || next.next().expect("there are three more");
        let c = [first, row(), row(), row()];
        dispatch(Tile { a: &packed, b, b_stride, first: first_col, c });
    }
}

/// `gram[i][j] += sum_t x[t][i] * x[t][j]` on and above the diagonal, `x` `[tokens, width]`.
pub(crate) fn add_gram(x: &[f32], width: usize, gram: &mut [f32]) {
    let tokens = x.len() / width;
    gram.par_chunks_mut(ROW_TILE * width).enumerate().for_each(|(tile, rows)| {
        let first_row = tile * ROW_TILE;
        add_product(|t, i| x[t * width + first_row + i], tokens, x, width, first_row, rows);
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

struct Dot<'a>(&'a [f32], &'a [f32]);

impl Kernel for Dot<'_> {
    type Output = f64;

    #[inline(always)]
    fn run(self) -> f64 {
        let mut lanes = [0.0f32; LANES];
        let (a, b) = (self.0.as_chunks::<LANES>(), self.1.as_chunks::<LANES>());
        for (a, b) in a.0.iter().zip(b.0) {
            for lane in 0..LANES {
                lanes[lane] += a[lane] * b[lane];
            }
        }
        let rest: f64 = a.1.iter().zip(b.1).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
        sum_lanes(&lanes) + rest
    }
}

/// `sum a[i] * b[i]`.
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f64 {
    dispatch(Dot(a, b))
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
        // Rows of the block, their finished tails `R[j][end..]`.
        let tails: Vec<f32> = (begin..end).flat_map(|j| matrix[j * width + end..(j + 1) * width].to_vec()).collect();
        let tail_len = width - end;
        // Subtract what the finished columns explain.
        matrix[..end * width].par_chunks_mut(width).for_each(|row| {
            let (head, tail) = row.split_at_mut(end);
            if tail_len > 0 {
                for (value, other) in head[begin..].iter_mut().zip(tails.chunks_exact(tail_len)) {
                    *value = (f64::from(*value) - dot(tail, other)) as f32;
                }
            }
        });
        // Inside the block, column by column from the right.
        for j in (begin..end).rev() {
            let pivot_row: Vec<f32> = matrix[j * width + j + 1..j * width + end].to_vec();
            let pivot =
                f64::from(matrix[j * width + j]) - pivot_row.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>();
            if pivot.is_nan() || pivot <= 0.0 {
                return None;
            }
            let pivot = pivot.sqrt();
            matrix[j * width + j] = pivot as f32;
            matrix[..j * width].par_chunks_mut(width).for_each(|row| {
                let explained: f64 =
                    row[j + 1..end].iter().zip(&pivot_row).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                row[j] = ((f64::from(row[j]) - explained) / pivot) as f32;
            });
        }
        end = begin;
    }
    for row in 1..width {
        matrix[row * width..row * width + row].fill(0.0);
    }
    Some(())
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
